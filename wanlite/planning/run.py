"""Settings -> the one resolved Run, which a dry run prints, training executes and messages describe.

Nothing after resolve_run() fills in a setting, looks for a file of the teacher or chooses a prompt.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.images import CaptionedImage
from ..files.cache import fingerprint
from ..phases import Span, choose_validated, count_passes, count_trajectories, count_validated, phases_of
from ..runtime.devices import has_gpu
from ..runtime.ranks import broadcast
from ..student.calibration import PASSES as CALIBRATION_PASSES
from ..teacher.components import check_components
from ..teacher.expert_files import TeacherFiles
from ..training.run_folder import read_fitted_settings
from .defaults import choose_data, choose_shape, describe_schedule
from .estimate import (
    FITTED,
    MemoryEstimator,
    calibration_frames,
    choose_precision,
    feature_width,
    place_teacher,
    training_dtype,
)
from .memory import estimate
from .messages import versions
from .resolve import image_sizes
from .teacher_folder import read_teacher_folder


@dataclass(frozen=True)
class Run:
    """A run as it is decided before anything is computed.

    `settings` has no None that a folder, the machine or the launcher decides; `requested` are those before
    the machine filled any in, by which a resumed run is recognised. The first of `sizes` (width, height) and
    `latent_shapes` (C, H, W) is that of validations, the others are trained on, one a bucket. `accelerator`
    may be a SingleProcess, with which nothing can be trained.
    """

    settings: Any
    requested: Any
    files: TeacherFiles
    components: dict[str, Path]
    shape: dict[str, Any]  # arguments of the student
    phases: list[Span]
    sizes: list[tuple[int, int]]
    latent_shapes: list[tuple[int, int, int]]
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
    def prompts(self):
        """Every prompt that is encoded, once."""
        settings = self.settings
        return list(
            dict.fromkeys(
                [*self.training, *self.held_out, *settings.validation_prompts, settings.negative_prompt]
            )
        )

    @property
    def num_generated(self):
        """How many trajectories the teacher generates; each image costs as many passes as one."""
        return self.settings.num_trajectories + len(self.images)

    @property
    def num_passes(self):
        """How often an image goes through the teacher after calibration."""
        validated = choose_validated(self.training, self.held_out)
        return count_passes(self.settings, self.num_generated, len(validated), self.phases)

    @property
    def num_states(self):
        """How many states the student is trained on, on each device, each as often as it comes."""
        settings = self.settings
        return settings.max_train_steps * settings.gradient_accumulation_steps * settings.train_batch_size

    @property
    def num_calibration_passes(self):
        frames = calibration_frames(self.settings, self.training, self.estimator.tokens)
        return CALIBRATION_PASSES * frames

    def estimate_time(self, passes, states):
        """Return in words how long `passes` of the teacher and training on `states` take."""
        return estimate(
            self.estimator.student,
            self.files,
            passes,
            states,
            self.estimator.tokens,
            self.latent_shapes[0][1:],
            self.device,
            training_dtype(self.settings),
        )

    def find_obstacles(self):
        """Print the memory and the disk that the run needs; return the problems in words."""
        return self.estimator.report(self.settings, self.training, self.held_out, self.images)

    def describe(self):
        """Return what run.json holds of the run from its beginning."""
        settings = self.settings
        return {
            "settings": asdict(self.requested),
            "versions": versions(),
            "teacher": self.files.fingerprint,
            "student": self.shape,
            "prompts": fingerprint([self.training, self.held_out]),
            "images": fingerprint([image.sha256 for image in self.images]),
            "processes": self.accelerator.num_processes,
            "fitted": {name: getattr(settings, name) for name in FITTED},
            "student_parameters": self.estimator.student.num_parameters(),
            "finished": False,
            "validation_prompts": settings.validation_prompts,
            "num_inference_steps": settings.num_inference_steps,
            "resolution": settings.resolution,
            "schedule": describe_schedule(settings, self.few_steps, self.phases),
        }


class SingleProcess:
    """This process alone, in the words of an Accelerator: for a dry run, which starts no process group."""

    num_processes, process_index, is_main_process = 1, 0, True
    print = staticmethod(print)
    main_process_first = staticmethod(nullcontext)

    def __init__(self, settings):
        self.device = torch.device("cuda" if has_gpu() else "cpu")


def resolve_run(settings, make_student, is_resumed=False, start: Callable = SingleProcess):
    """Return the Run of settings that complete() has checked.

    `make_student(shape)` builds a student; `start(settings)` returns the Accelerator, once the precision is
    known. A resumed run keeps what it chose for its machine before. Raises OSError and ValueError for a
    teacher, a shape or a batch that no run can have.
    """
    requested, teacher = settings, read_teacher_folder(settings.teacher)
    files = teacher.files
    if is_resumed:
        settings = replace(settings, **read_fitted_settings(settings.output_dir))
    else:
        settings = choose_precision(settings, files)
    accelerator, components = start(settings), teacher.components
    check_components(components, files.config)
    shape, sizes = choose_shape(settings, files), image_sizes(settings)
    estimator = MemoryEstimator(settings, teacher, make_student, shape, sizes, accelerator.device)
    with accelerator.main_process_first():  # one process decodes images, the others read what it found
        training, held_out, images = choose_data(
            settings, sizes[1:], accelerator.print, accelerator.is_main_process
        )
    settings = _fill(settings, estimator, shape, (training, held_out), accelerator)
    return Run(
        settings=settings,
        requested=requested,
        files=files,
        components=components,
        shape=shape,
        phases=phases_of(settings),
        sizes=sizes,
        latent_shapes=[estimator.latent_shape, *estimator.buckets],
        training=training,
        held_out=held_out,
        images=images,
        estimator=estimator,
        accelerator=accelerator,
    )


def _fill(settings, estimator, shape, prompts, accelerator):
    """Return the settings with the values that the teacher, the prompts and the device decide."""
    training, held_out = prompts
    settings = replace(
        settings,
        **{name: shape[name] for name in ("hidden_size", "depth", "num_heads", "ffn_dim")},
        num_trajectories=count_trajectories(settings, len(training)),
        feature_directions=feature_width(settings, shape["hidden_size"]),
    )
    residency = place_teacher(settings, estimator.files, accelerator.device)
    settings = replace(settings, teacher_residency=_same_everywhere(accelerator, residency))
    fitted = estimator.fit(settings, settings.num_trajectories, accelerator.num_processes)
    settings = _same_everywhere(accelerator, fitted)
    return replace(settings, validation_prompts=_choose_shown(settings, training, held_out))


def _same_everywhere(accelerator, found):
    """Return what rank 0 found, in every process: each may see other free memory."""
    return broadcast(found) if accelerator.num_processes > 1 else found


def _choose_shown(settings, training, held_out):
    """Return the prompts of the grids."""
    validated = choose_validated(training, held_out)
    count = count_validated(settings.validation_trajectories, len(validated))[1]
    return settings.validation_prompts or validated[:count]
