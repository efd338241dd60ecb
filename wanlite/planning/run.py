"""Settings -> the one resolved Run, which a dry run prints, training executes and messages describe.

After resolve_run(), every setting is filled in, every file of the teacher is found and every prompt is chosen.
"""

import operator
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.images import CaptionedImage
from ..files.cache import fingerprint
from ..phases import (
    Span,
    choose_validated,
    count_passes,
    count_trajectories,
    count_validated,
    limit_few_steps,
    plan_phases,
    split_trajectories,
)
from ..runtime.devices import has_gpu
from ..runtime.ranks import broadcast
from ..student.calibration import PASSES as CALIBRATION_PASSES
from ..teacher.components import check_components
from ..teacher.expert_files import TeacherFiles
from ..training.run_folder import read_fitted_settings
from .budgets import has_default_trajectories
from .defaults import (
    choose_data,
    choose_feature_width,
    choose_shape,
    count_calibration_frames,
    describe_schedule,
)
from .duration import Workload, describe_h100_hours, estimate_duration
from .estimate import MemoryEstimator
from .hardware import (
    HARDWARE_SETTINGS,
    choose_precision,
    count_states_per_step,
    fit_to_cache,
    fit_to_hardware,
    place_teacher,
    training_dtype,
)
from .messages import versions
from .part_plan import PartWork, longest_in_batch
from .resolutions import Resolution
from .resolve import image_sizes
from .teacher_folder import read_teacher_folder


@dataclass(frozen=True)
class Run:
    """A run as it is decided before anything is computed.

    Every one of `settings` is filled in from folders, the hardware or the launcher. `requested` are the
    settings before the hardware filled any in; a resumed run must have the same. `resolutions` are in the
    order of training. The `accelerator` of a dry run is a SingleProcess.
    """

    settings: Any
    requested: Any
    files: TeacherFiles
    components: dict[str, Path]
    shape: dict[str, Any]  # arguments of the student
    phases: list[Span]
    resolutions: list[Resolution]
    training: list[str]
    held_out: list[str]
    images: list[CaptionedImage]
    estimator: MemoryEstimator
    accelerator: Any

    @property
    def device(self):
        return self.accelerator.device

    @property
    def few_steps(self):
        """The numbers of steps that the student is trained for; none after phase `velocity` alone."""
        return self.settings.few_steps if self.phases[-1].name != "velocity" else []

    @property
    def base_step(self):
        """The step after the last of phase `velocity`, if other phases follow it in this run; else None."""
        ends = [span.last for span in self.phases if span.name == "velocity"]
        return ends[-1] if ends and self.few_steps else None

    @property
    def prompts(self):
        """All prompts to encode, without repetitions."""
        shown = [*self.settings.validation_prompts, self.settings.negative_prompt]
        return list(dict.fromkeys([*self.training, *self.held_out, *shown]))

    @property
    def num_trajectories(self):
        """The number of training trajectories at each resolution."""
        return split_trajectories(self.settings, self.settings.num_trajectories)

    @property
    def num_generated(self):
        """The number of teacher images at each resolution; a real image needs as many passes as a trajectory."""
        *smaller, last = self.num_trajectories
        return [*smaller, last + len(self.images)]

    @property
    def num_passes(self):
        """The number of teacher passes at each resolution after calibration, counted per image."""
        validated = choose_validated(self.training, self.held_out)
        return count_passes(self.settings, self.num_generated, len(validated), self.phases)

    @property
    def states_per_step(self):
        return self.settings.gradient_accumulation_steps * self.settings.train_batch_size

    @property
    def num_states(self):
        """The number of states that the student is trained on, on each device, with repetitions."""
        return self.settings.max_train_steps * self.states_per_step

    def workload(self, is_calibrated=True, is_trained=True):
        """Return the Workload of the run: of calibrating the student, of training it, or of both."""
        tokens = [resolution.tokens for resolution in self.resolutions]
        teacher_tokens = student_tokens = 0
        if is_calibrated:
            frames = count_calibration_frames(self.settings, self.training, tokens[-1])
            teacher_tokens += CALIBRATION_PASSES * frames * tokens[-1]
        if is_trained:
            teacher_tokens += sum(map(operator.mul, self.num_passes, tokens))
            student_tokens += self.states_per_step * sum(
                (span.last - span.first) * tokens[span.resolution] for span in self.phases
            )
        return Workload(
            self.estimator.student,
            self.files,
            teacher_tokens,
            student_tokens,
            self.resolutions[-1],
            self.part_work() if is_trained else None,
        )

    def part_work(self):
        """Return the PartWork of the small parts, None without any."""
        plan, last = self.estimator.parts, self.resolutions[-1]
        if plan is None:
            return None
        text_tokens = longest_in_batch(self.training, plan.options.text_batch)
        num_steps = self.settings.num_inference_steps
        return PartWork(plan, self.estimator.student, last.latent_shape, last.tokens, text_tokens, num_steps)

    def estimate_time(self, **parts):
        """Return the estimated time of the parts of workload()."""
        work = self.workload(**parts)
        if self.settings.plan_for is not None:
            return describe_h100_hours(work)
        text = estimate_duration(work, self.device, training_dtype(self.settings))
        # Which of them this run can use is known only after the student is initialized.
        is_cached = any(Path(self.settings.cache_dir).glob("trajectories-*"))
        return f"{text}, less for teacher images that are in the cache" if is_cached else text

    def report_memory(self):
        """Return the MemoryReport: the memory and the disk that the run needs."""
        return self.estimator.make_report(self.settings, self.training, self.held_out, len(self.images))

    def describe(self):
        """Return the content of run.json at the beginning of a run."""
        settings = self.settings
        fitted = {name: getattr(settings, name) for name in HARDWARE_SETTINGS}
        return {
            "settings": asdict(self.requested),
            "versions": versions(),
            "teacher": self.files.fingerprint,
            "student": self.shape,
            "prompts": fingerprint([self.training, self.held_out]),
            "images": fingerprint([image.sha256 for image in self.images]),
            "processes": self.accelerator.num_processes,
            "fitted": fitted,
            "fitted_sha256": fingerprint(fitted),
            "student_parameters": self.estimator.student.num_parameters(),
            "finished": False,
            "validation_prompts": settings.validation_prompts,
            "num_inference_steps": settings.num_inference_steps,
            "resolution": settings.resolution,
            "schedule": describe_schedule(settings, self.few_steps, self.phases),
        }


class SingleProcess:
    """The part of an Accelerator that a dry run uses; it does not start a process group, and cannot train."""

    num_processes, process_index, is_main_process = 1, 0, True
    print = staticmethod(print)
    main_process_first = staticmethod(nullcontext)

    def __init__(self, settings):
        has_device = has_gpu() or settings.plan_for is not None
        self.device = torch.device("cuda" if has_device else "cpu")


def resolve_run(settings, make_student, is_resumed=False, start: Callable = SingleProcess):
    """Return the Run of settings that complete() has checked.

    `make_student(shape)` builds a student; `start(settings)` returns the Accelerator, once the precision is
    chosen. A resumed run keeps its settings for the hardware. Raises OSError and ValueError for a teacher, a
    shape or a batch that cannot be trained.
    """
    requested = settings
    teacher = read_teacher_folder(settings.teacher)
    if is_resumed:
        settings = replace(settings, **read_fitted_settings(settings.output_dir))
    else:
        settings = choose_precision(settings, teacher.files)
    accelerator = start(settings)
    check_components(teacher.components, teacher.files.config)
    shape, sizes = choose_shape(settings, teacher.files), image_sizes(settings)
    estimator = MemoryEstimator(settings, teacher, make_student, shape, sizes, accelerator.device)
    with accelerator.main_process_first():  # one process decodes images, the others read its record
        training, held_out, images = choose_data(
            settings, sizes[-1][1:], accelerator.print, accelerator.is_main_process
        )
    settings = _fill(settings, estimator, training, accelerator)
    if not images:
        training = training[: settings.num_trajectories]
    settings = replace(settings, validation_prompts=_choose_grid_prompts(settings, training, held_out))
    return Run(
        settings=settings,
        requested=requested,
        files=teacher.files,
        components=teacher.components,
        shape=shape,
        phases=plan_phases(settings),
        resolutions=estimator.resolutions,
        training=training,
        held_out=held_out,
        images=images,
        estimator=estimator,
        accelerator=accelerator,
    )


def _fill(settings, estimator, training, accelerator):
    """Return the settings with the values that follow from the teacher, the prompts and the hardware."""
    shape, is_given = estimator.shape, not has_default_trajectories(settings)
    settings = replace(
        settings,
        **{name: shape[name] for name in ("hidden_size", "depth", "num_heads", "ffn_dim")},
        num_trajectories=count_trajectories(settings, len(training)),
        feature_directions=choose_feature_width(settings, shape["hidden_size"]),
    )
    settings = replace(settings, num_trajectories=fit_to_cache(settings, estimator, is_given))
    residency = place_teacher(settings, estimator.files, accelerator.device)
    settings = replace(settings, teacher_residency=_from_rank_zero(accelerator, residency))
    num_ranks = accelerator.num_processes
    *_, num_last = split_trajectories(settings, settings.num_trajectories)
    if settings.few_step_train_steps is None:
        states_per_step = count_states_per_step(settings) * num_ranks
        num_steps = limit_few_steps(settings, num_last, states_per_step)
        settings = replace(settings, few_step_train_steps=num_steps)
    fitted = fit_to_hardware(settings, estimator, num_last, num_ranks)
    return _from_rank_zero(accelerator, fitted)


def _from_rank_zero(accelerator, value):
    """Return the value of rank 0 in every process: free memory may differ between them."""
    return broadcast(value) if accelerator.num_processes > 1 else value


def _choose_grid_prompts(settings, training, held_out):
    validated = choose_validated(training, held_out)
    _, num_prompts = count_validated(settings.validation_trajectories, len(validated))
    return settings.validation_prompts or validated[:num_prompts]
