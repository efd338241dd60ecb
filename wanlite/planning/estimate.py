"""Settings -> what a run of them needs: memory by phase, disk; and what is left open, chosen so that it fits
the machine.

Nothing is read but headers, and nothing is computed: phases run on tensors without contents.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.training_utils import EMAModel

from ..data.autoencoder import DECODED_AT_ONCE, decode_latents, make_autoencoder
from ..data.shards import SHARD_SIZE
from ..files.atomic import SPARE
from ..phases import (
    bound_validation_and_rollout,
    choose_validated,
    count_states,
    count_trajectories,
    count_validated,
    phases_of,
)
from ..runtime.devices import free_memory, has_gpu
from ..runtime.launch import local_processes
from ..teacher.components import is_converted, num_bytes
from ..teacher.experts import PROBE_ROWS, PROBE_SIZE
from ..teacher.model import RESIDENCIES, TOKENS_AT_ONCE, choose_residency
from ..training.optimizers import make_optimizers
from ..training.steps import MATCHED
from .checks import check_batch
from .memory import (
    at_depth,
    decoding_peak,
    generation_bytes,
    generation_peak,
    largest_batch,
    pass_peak,
    report,
    simulated_peak,
    start_peaks,
    teacher_bytes,
    text_bytes,
    training_peak,
    trajectory_bytes,
)

LARGE_WIDTH = 1024  # width of a teacher from which its memory is compared with the machine's
BATCH = 128  # states in a batch on each device, where --train_batch_size is left open
MEMORY_FRACTION = 0.9  # of the free memory that a batch may use, because predictions are slightly low
CALIBRATION_TOKENS = 16384  # image tokens on which the projected weights are refitted
FITTED = (
    "mixed_precision",
    "train_batch_size",
    "gradient_accumulation_steps",
)  # are chosen for a machine where left open


class MemoryEstimator:
    """Predicts the bytes that a run needs on `device`, from a student's shape, a TeacherFolder and image `sizes`.

    The first of `sizes` (width, height) is validated, the others are trained: `latent_shape` (C, H, W) and
    `buckets` are the shapes of their latents. A validated image has `pixels` and `tokens`.
    """

    def __init__(self, settings, teacher, make_student, shape, sizes, device):
        self.files, self.make_student, self.shape, self.device = teacher.files, make_student, shape, device
        self.found, self.peak = teacher.components, partial(simulated_peak, device_type=device.type)
        self.make_autoencoder = partial(make_autoencoder, teacher.autoencoder_config)
        with init_empty_weights():
            self.student, autoencoder = make_student(shape), self.make_autoencoder()
        stride = autoencoder.config.scale_factor_spatial
        self.latent_shape, *self.buckets = (
            (self.files.config["in_channels"], height // stride, width // stride) for width, height in sizes
        )
        token, places = stride * self.student.config.patch_size[1], self.student.config.rope_max_seq_len
        if (side := max(max(size) for size in sizes)) > token * places:
            raise ValueError(
                f"--resolution: a side of {side:,} pixels is more than this teacher supports; the most is "
                f"{token * places:,}. Lower it, or choose other --aspect_ratios."
            )
        self.pixels = math.prod(sizes[0])
        self.largest = max([self.latent_shape, *self.buckets], key=math.prod)
        self.tokens = math.prod(self.latent_shape[1:]) // math.prod(self.student.config.patch_size)
        self.drawing = (
            4 * autoencoder.num_parameters()
        )  # it stays, and so does the student once it has a start
        self.weights = 4 * self.student.num_parameters()
        self.idle_bytes = self.weights * (
            3 if settings.muon_learning_rate else 4
        )  # weights, average, what optimizers remember
        self.base_bytes = (
            self.idle_bytes + self.weights + self.drawing
        )  # what training takes without any states
        self.free = free_memory(device, local_processes())[0]

    def training(self, settings, rows):
        """Return the bytes of training on `rows` states."""

        def make_student(depth):
            student = self.make_student(self.shape | {"depth": depth})
            if settings.gradient_checkpointing:
                student.enable_gradient_checkpointing()
            return student

        return self.drawing + at_depth(
            lambda depth: training_peak(
                partial(make_student, depth),
                partial(make_optimizers, settings),
                lambda network: EMAModel(network.parameters()),
                rows,
                self.largest[1:],
                training_dtype(settings) != torch.float32,
                self.peak,
            ),
            self.shape["depth"],
        )

    def generation_bytes(self, settings, at_once=SHARD_SIZE):
        """Return the bytes of the teacher, where it is while it runs, and of `at_once` trajectories under way."""
        dtype, residency = training_dtype(settings), place_teacher(settings, self.files, self.device)
        rows = min(2 * at_once, max(1, TOKENS_AT_ONCE // self.tokens))  # half of them for guidance
        kept = generation_bytes(
            at_once,
            settings.teacher_steps,
            self.largest,
            self.tokens,
            feature_width(settings, self.shape["hidden_size"]),
        )
        return teacher_bytes(self.files, residency, dtype, settings.teacher_fp8, local_processes())[
            0
        ] + generation_peak(
            pass_peak(self.files, rows, self.largest[1:], dtype, self.peak),
            at_once * self.tokens * self.files.width,
            dtype,
            kept,
        )

    def matching(self, settings, rows):
        """Return the bytes of distribution matching: the critic learns beside the student, and the teacher
        runs.
        """
        critic = self.training(settings, max(1, rows // MATCHED)) - self.drawing
        return self.training(settings, rows) + critic + self.generation_bytes(settings)

    def fit(self, settings, num_trajectories, ranks=1):
        """Return the settings with validation, batch and accumulation filled in for the device.

        The default batch has BATCH states in the largest micro-batches that fit. Raises ValueError for a batch
        that is larger than the data of a phase.
        """
        settings = replace(
            settings,
            **bound_validation_and_rollout(
                settings, is_large(self.files), num_trajectories, len(self.buckets)
            ),
        )
        states = count_states(settings, num_trajectories, phases_of(settings), len(self.buckets))
        settings = self._fit_batch(settings, min(states.values()) // ranks)
        check_batch(settings, states, ranks)
        return settings

    def _fit_batch(self, settings, states):
        rows, micro_batches = settings.train_batch_size, settings.gradient_accumulation_steps
        if rows is None:
            rows = BATCH
            if is_large(self.files):
                peak, rest = self.training(settings, BATCH), self.base_bytes
                if settings.matching_steps:
                    peak, rest = (
                        self.matching(settings, BATCH),
                        2 * rest - self.drawing + self.generation_bytes(settings),
                    )
                rows = max(1, largest_batch(BATCH, peak, rest, MEMORY_FRACTION * self.free))
            micro_batches = micro_batches or BATCH // rows
            rows = max(1, min(rows, states))
        return replace(settings, train_batch_size=rows, gradient_accumulation_steps=micro_batches or 1)

    def report(self, settings, training, held_out, images):
        """Print the memory and disk that the run needs and what is free; return the problems in words."""
        phases, disk = self._start_phases(settings, training), self._start_disk(settings, training, held_out)
        if settings.project_only:
            return report(phases, disk, self.device, self.free)
        num_generated = len(images) + count_trajectories(settings, len(training))
        validated = len(choose_validated(training, held_out))
        phases |= self._training_phases(settings, num_generated, validated)
        self._add_disk(disk, settings, num_generated, validated)
        dtype, residency = training_dtype(settings), place_teacher(settings, self.files, self.device)
        placed = {
            place: teacher_bytes(self.files, place, dtype, settings.teacher_fp8, local_processes())
            for place in dict.fromkeys((*RESIDENCIES, residency))
        }
        return report(
            phases,
            disk,
            self.device,
            self.free,
            residency,
            placed,
            settings.train_batch_size,
            settings.gradient_accumulation_steps,
            self.base_bytes,
        )

    def _start_disk(self, settings, training, held_out):
        """Return {folder: bytes} of the start, the converted components, the text and the saved student."""
        places = {place for name, place in self.found.items() if not is_converted(self.found, name)}
        text = text_bytes([*training, *held_out], self.files.config["text_dim"])
        return {
            settings.cache_dir: self.weights + sum(map(num_bytes, places)) + text + SPARE,
            settings.output_dir: self.weights + sum(map(num_bytes, set(self.found.values()))) + SPARE,
        }

    def _training_phases(self, settings, num_generated, validated):
        """Return {phase: bytes} of generation, training, validation and matching."""
        num_validated, several = count_validated(settings.validation_trajectories, validated)
        drawn = max(num_validated, several**2)
        together = min(drawn, max(1, DECODED_AT_ONCE // self.pixels))
        generating = self.generation_bytes(settings, min(SHARD_SIZE, max(num_generated, drawn)))
        decoding = at_depth(
            lambda chunks: decoding_peak(
                self.make_autoencoder, decode_latents, chunks * together, self.latent_shape, self.peak
            ),
            -(-drawn // together),
        )
        phases = {
            "trajectories": generating + self.drawing + self.weights,
            "training": self.training(settings, settings.train_batch_size),
            "validation": self.idle_bytes + self.weights + decoding,
        }
        if settings.matching_steps:
            phases["matching"] = self.matching(settings, settings.train_batch_size)
        return phases

    def _add_disk(self, disk, settings, num_generated, validated):
        """Add the trajectories to the cache, and the checkpoints to the output."""
        num_validated, several = count_validated(settings.validation_trajectories, validated)
        best = 1.5 if settings.matching_steps else 1  # with the best student so far
        disk[settings.cache_dir] += trajectory_bytes(
            num_generated + num_validated + min(several, validated) * several,
            settings.teacher_steps,
            self.largest,
            self.tokens,
            feature_width(settings, self.shape["hidden_size"]),
        )
        checkpoint = (self.idle_bytes + self.weights) * best
        disk[settings.output_dir] += (settings.checkpoints_total_limit + 1) * checkpoint

    def _start_phases(self, settings, training):
        """Return the bytes of what comes before the teacher runs."""
        frames = calibration_frames(settings, training, self.tokens)
        comparing, calibrating = start_peaks(
            self.files, (PROBE_ROWS, PROBE_SIZE), frames, self.latent_shape[1:], self.peak
        )
        is_started = any(
            Path(settings.cache_dir).glob("start-*/manifest.json")
        )  # and is taken as it is, if it is this run's
        return {
            "text": num_bytes(self.found["text_encoder"]),
            "start": 0 if is_started else max(comparing, calibrating + self.drawing + self.weights),
        }


def feature_width(settings, hidden_size):
    """Return in how many directions token states are compared, and kept: more hold a narrow student up, and
    fill the disk.
    """
    return settings.feature_directions or max(1, hidden_size // 4)


def most_frames(tokens):
    """Return the most frames of `tokens` image tokens on which a student is calibrated."""
    return max(16, CALIBRATION_TOKENS // tokens)


def calibration_frames(settings, prompts, tokens):
    """Return the number of frames of `tokens` image tokens on which a student is calibrated."""
    if settings.projection != "calibrated" or settings.student is not None:
        return 0
    return min(len(prompts), most_frames(tokens))


def is_large(files):
    """Whether a teacher is so large that a run fits itself to its machine, and says beforehand what it needs."""
    return files.width >= LARGE_WIDTH


def choose_precision(settings, files):
    """Return the settings with --mixed_precision filled in where it is open."""
    has_bf16 = has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(
        settings,
        mixed_precision=settings.mixed_precision or ("bf16" if is_large(files) and has_bf16 else "no"),
    )


def training_dtype(settings):
    """Return the dtype that matrices are multiplied in."""
    return torch.float32 if settings.mixed_precision == "no" else torch.bfloat16


def place_teacher(settings, files, device):
    """Return where the teacher's experts will be: as --teacher_residency says, or as memory allows."""
    if settings.teacher_residency != "auto":
        return settings.teacher_residency
    return choose_residency(
        files,
        training_dtype(settings),
        settings.teacher_fp8,
        *free_memory(device, local_processes()),
        device.type == "cpu",
        local_processes(),
    )
