"""Output of a run during training: metrics, trackers, grids, checkpoints and the progress bar.

A full disk loses a record or a checkpoint, and training continues.
"""

import time
from pathlib import Path

from tqdm import tqdm

from ..data.grids import save_grid
from .checkpoints import latest_checkpoint
from .run_folder import MetricsLog
from .throughput import in_brief
from .trackers import log_image

LOG_STEPS = 10


class RunLog:
    """The log of a run whose record in run.json is `facts`; it continues after `step`.

    `pace` is a Pace; `began` is the start of this process, in seconds since the epoch.
    """

    def __init__(self, run, facts, step, pace, began):
        self.run, self.facts, self.pace = run, facts, pace
        self.accelerator, self.folder = run.accelerator, Path(run.settings.output_dir)
        self._start_trackers(step)
        is_main = self.accelerator.is_main_process
        self.metrics = MetricsLog(self.folder / "metrics.jsonl", step) if is_main else None
        # The time before an interruption counts.
        self.began = began - (self.metrics.seconds if self.metrics is not None else 0)
        self.bar = tqdm(
            total=run.settings.max_train_steps,
            initial=step,
            desc="distilling",
            unit="step",
            smoothing=0.05,
            disable=not is_main,
        )

    def _start_trackers(self, step):
        """Start the trackers; a resumed run logs the steps after its checkpoint again."""
        tensorboard = {"purge_step": step + 1} if step else {}
        self.accelerator.init_trackers(
            "wanlite", init_kwargs={"tensorboard": tensorboard, "wandb": {"dir": str(self.folder)}}
        )

    @property
    def seconds(self) -> float:
        """Duration of the run so far."""
        return time.time() - self.began

    def record(self, step, grid=None, **figures):
        """Write a record to metrics.jsonl and the trackers; `grid` is {title of a row: images}."""
        if self.metrics is None:  # only the main process writes
            return
        try:
            self.metrics.write(step=step, **figures)
            self.accelerator.log(figures, step=step)
            if grid is not None:
                image = save_grid(self.folder / "samples" / f"step-{step:06d}.png", grid)
                for tracker in self.accelerator.trackers:
                    log_image(tracker, "teacher above student", image, step)
        except OSError as error:
            self.accelerator.print(f"WARNING: step {step} is not logged: {error}")

    def record_step(self, phase, state, measured):
        """Count a step; record its StepFigures every LOG_STEPS steps, at the end of a phase and if it was skipped."""
        step = state.progress.step
        self.bar.update()
        if step % LOG_STEPS and step != phase.last and measured.is_sound:
            return
        figures = self.pace.figures()
        self.bar.set_postfix(
            phase=phase.name, loss=f"{measured.loss:.3f}", **in_brief(figures), refresh=False
        )
        self.record(
            step,
            seconds=round(self.seconds, 1),
            loss=measured.loss,
            grad_norm=measured.grad_norm,
            learning_rate=state.lr_schedulers[0].get_last_lr()[0],
            skipped_steps=state.progress.skipped_steps,
            **{name: value.item() for name, value in measured.terms.items()},
            **{f"update_{role}": ratio.item() for role, ratio in measured.update_ratios.items()},
            **figures,
        )

    def checkpoint(self, state):
        """Save a checkpoint of the current step, on the main process."""
        if self.accelerator.is_main_process:
            try:
                state.save(self.folder, self.facts, self.run.settings.checkpoints_total_limit)
            except OSError as error:
                newest = latest_checkpoint(self.folder)[0]
                self.accelerator.print(
                    f"\nWARNING: step {state.progress.step} is NOT saved: {error}\n"
                    f"The newest checkpoint is {newest}; training continues."
                )
        self.accelerator.wait_for_everyone()
        self.pace.restart()  # the time of a save does not count for a step
