"""Output of a run during training: metrics, trackers, grids, checkpoints and the progress bar.

If the disk is full, a record or a checkpoint is skipped with a warning, and training continues.
"""

import time
from pathlib import Path

from ..data.grids import save_grid
from ..files.file_names import METRICS, REPORT, SAMPLES
from ..phases import describe_phase, list_part_phases
from ..runtime.progress import print_above, track
from ..runtime.terminal import explain
from .checkpoints import latest_checkpoint
from .report.page import write_report
from .run_folder import MetricsLog
from .trackers import log_image

LOG_STEPS = 10  # steps between two records


class RunLog:
    """The log of a run, from `step` on; `facts` is the content of its run.json.

    `pace` is a Pace; `began` is the start of this process in seconds since the epoch.
    """

    def __init__(self, run, facts, step, pace, began):
        self.run = run
        self.facts = facts
        self.pace = pace
        self.accelerator = run.accelerator
        self.folder = Path(run.settings.output_dir)
        self._start_trackers(step)
        is_main = self.accelerator.is_main_process
        self.metrics = MetricsLog(self.folder / METRICS, step) if is_main else None
        # The duration of a resumed run includes the time before its interruption.
        self.began = began - (self.metrics.seconds if self.metrics is not None else 0)
        self.bar = track(run.settings.max_train_steps, "training", step, is_hidden=not is_main, leave=True)

    def _start_trackers(self, step):
        """Start the trackers; a resumed run replaces the records after its checkpoint."""
        tensorboard = {"purge_step": step + 1} if step else {}
        self.accelerator.init_trackers(
            "wanlite", init_kwargs={"tensorboard": tensorboard, "wandb": {"dir": str(self.folder)}}
        )

    @property
    def seconds(self) -> float:
        """The duration of the run."""
        return time.time() - self.began

    def record(self, step, grid=None, **figures):
        """Write a record to metrics.jsonl and the trackers; a Grid is also saved in samples/."""
        if self.metrics is None:  # only the main process writes
            return
        try:
            self.metrics.write(step=step, **figures)
            self.accelerator.log(figures, step=step)
            if grid is not None:
                image = save_grid(self.folder / SAMPLES / f"step-{step:06d}.png", grid, step)
                for tracker in self.accelerator.trackers:
                    log_image(tracker, "teacher above student", image, step)
                self.write_report()
        except OSError as error:
            self.accelerator.print(f"WARNING: step {step} is not logged: {error}")

    def write_report(self):
        try_report(self.folder, self.accelerator.print)

    def record_step(self, phase, state, step_figures):
        """Advance the progress bar; record the StepFigures every LOG_STEPS steps, of a phase's last step, and of skipped steps."""
        step = state.progress.step
        self.bar.update()
        if step % LOG_STEPS and step != phase.last and step_figures.is_finite:
            return
        figures = self.pace.figures()
        settings = self.run.settings
        later = list_part_phases(settings.text_encoder == "small", settings.decoder == "small")
        self.bar.describe(describe_phase(phase, self.run.phases, len(later)), f"loss {step_figures.loss:.3f}")
        self.record(
            step,
            seconds=round(self.seconds, 1),
            loss=step_figures.loss,
            grad_norm=step_figures.grad_norm,
            learning_rate=state.lr_schedulers[0].get_last_lr()[0],
            skipped_steps=state.progress.skipped_steps,
            **{name: value.item() for name, value in step_figures.terms.items()},
            **{f"update_{role}": ratio.item() for role, ratio in step_figures.update_ratios.items()},
            **figures,
        )

    def checkpoint(self, state):
        """Save a checkpoint of the current step on the main process."""
        if self.accelerator.is_main_process:
            try:
                state.save(self.folder, self.facts, self.run.settings.checkpoints_total_limit)
            except OSError as error:
                newest = latest_checkpoint(self.folder)[0] or "none"
                print_above(
                    self.accelerator,
                    f"WARNING: step {state.progress.step} is NOT saved: {explain(error)}\n"
                    f"The newest checkpoint is {newest}; training continues.",
                )
        self.accelerator.wait_for_everyone()
        self.pace.restart()  # saving is not part of a step


def try_report(folder, log):
    """Write report.html from the files of a run; whatever fails, the run continues."""
    try:
        write_report(folder)
    except Exception as error:  # a page is never worth the end of a training
        log(f"WARNING: {REPORT} is not written: {error!r}")
