"""A run's settings and shapes -> the bytes that each phase needs in memory and on disk.

Only file headers are read, and nothing is computed: phases run on tensors without contents.
"""

import math
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.training_utils import EMAModel

from ..data.autoencoder import DECODED_AT_ONCE, decode_latents, make_autoencoder
from ..data.shards import SHARD_SIZE
from ..files.atomic import SPARE
from ..parts.text_encoder import count_states
from ..phases import choose_validated, count_trajectories, count_validated, split_trajectories
from ..runtime.launch import local_processes
from ..teacher.components import is_converted, num_bytes
from ..teacher.experts import PROBE_ROWS, PROBE_SIZE
from ..teacher.model import RESIDENCIES, TOKENS_AT_ONCE
from ..training.optimizers import make_optimizers
from ..training.run_folder import converted_folder
from ..training.steps import MATCHED
from .defaults import choose_feature_width, count_calibration_frames
from .disk import count_text_bytes, measure_folders
from .hardware import measure_free_memory, training_dtype
from .memory import (
    count_decoding_bytes,
    count_generation_bytes,
    count_initialization_bytes,
    count_pass_bytes,
    count_teacher_bytes,
    count_training_bytes,
    count_trajectory_bytes,
)
from .part_plan import count_decoder_bytes, plan_parts
from .report import MemoryReport
from .resolutions import make_resolutions
from .simulation import extrapolate_depth, simulate_peak


class MemoryEstimator:
    """Predicts the bytes that a run needs, from the shapes of a student, a TeacherFolder and images.

    `sizes` are those of image_sizes(). Memory is that of the last resolution, whose validated images have
    `latent_shape` (C, H, W), `pixels` and `tokens`.
    """

    def __init__(self, settings, teacher, make_student, shape, sizes, device):
        self.files = teacher.files
        self.components = teacher.components
        self.make_student = make_student
        self.make_autoencoder = partial(make_autoencoder, teacher.autoencoder_config)
        self.shape = shape
        self.device = device
        self.peak = partial(simulate_peak, device_type=device.type)
        self.free_bytes = measure_free_memory(settings, device)[0]
        with init_empty_weights():
            self.student = make_student(shape)
            autoencoder = self.make_autoencoder()
        stride = autoencoder.config.scale_factor_spatial
        self.resolutions = make_resolutions(
            sizes, stride, self.files.config["in_channels"], self.student.config
        )
        last = self.resolutions[-1]
        self.latent_shape, self.largest_shape, self.tokens = (
            last.latent_shape,
            last.largest_shape,
            last.tokens,
        )
        self.pixels = math.prod(last.size)
        # On the device throughout a run.
        self.autoencoder_bytes = sum(weight.nbytes for weight in autoencoder.parameters())
        self.parts = plan_parts(settings, teacher)  # None: no part is made small
        self.weight_bytes = 4 * self.student.num_parameters()
        num_copies = 3 if settings.muon_learning_rate else 4  # weights, average, state of the optimizers
        self.idle_bytes = num_copies * self.weight_bytes
        # Training on no states: with gradients, and the autoencoder.
        self.base_bytes = self.idle_bytes + self.weight_bytes + self.autoencoder_bytes

    def training_bytes(self, settings, batch_size):
        """Return the bytes of training on `batch_size` states."""

        def make_student(depth):
            student = self.make_student(self.shape | {"depth": depth})
            if settings.gradient_checkpointing:
                student.enable_gradient_checkpointing()
            return student

        def peak_of(depth):
            return count_training_bytes(
                partial(make_student, depth),
                partial(make_optimizers, settings),
                lambda network: EMAModel(network.parameters()),
                batch_size,
                self.largest_shape[1:],
                training_dtype(settings) != torch.float32,
                self.peak,
            )

        return self.autoencoder_bytes + extrapolate_depth(peak_of, self.shape["depth"])

    def matching_bytes(self, settings, batch_size):
        """Return the bytes of distribution matching: student and critic are trained, and the teacher runs."""
        return self._add_matching(settings, batch_size, self.training_bytes(settings, batch_size))

    def _add_matching(self, settings, batch_size, training_bytes):
        """Return the bytes of distribution matching, from those of training on the same batch."""
        share = max(1, batch_size // MATCHED) / batch_size  # the critic's memory grows with its batch
        critic_bytes = self.base_bytes + share * (training_bytes - self.base_bytes) - self.autoencoder_bytes
        return training_bytes + round(critic_bytes) + self.generation_bytes(settings)

    def matching_base_bytes(self, settings):
        """Return the bytes of distribution matching on no states."""
        return 2 * self.base_bytes - self.autoencoder_bytes + self.generation_bytes(settings)

    def generation_bytes(self, settings, num_trajectories=SHARD_SIZE):
        """Return the bytes of the teacher and of generating `num_trajectories` at a time."""
        dtype = training_dtype(settings)
        batch_size = min(2 * num_trajectories, max(1, TOKENS_AT_ONCE // self.tokens))  # twice, for guidance
        pass_bytes = count_pass_bytes(self.files, batch_size, self.largest_shape[1:], dtype, self.peak)
        result_bytes = self._trajectory_bytes(settings, num_trajectories, -1, is_stored=False)
        num_values = num_trajectories * self.tokens * self.files.width
        teacher_bytes, _ = self._teacher_bytes(settings, settings.teacher_residency)
        return teacher_bytes + count_generation_bytes(pass_bytes, num_values, dtype, result_bytes)

    def _teacher_bytes(self, settings, residency):
        dtype, is_fp8 = training_dtype(settings), settings.teacher_fp8
        return count_teacher_bytes(self.files, residency, dtype, is_fp8, local_processes())

    def _trajectory_bytes(self, settings, num_trajectories, number, is_stored=True):
        """Return the bytes of trajectories at the resolution with this number; only the first has hidden states."""
        resolution = self.resolutions[number]
        width = choose_feature_width(settings, self.shape["hidden_size"])
        return count_trajectory_bytes(
            num_trajectories,
            settings.teacher_steps,
            resolution.largest_shape,
            resolution.tokens,
            width if resolution is self.resolutions[0] else None,
            is_stored,
        )

    def cache_bytes(self, settings, num_generated, num_validated):
        """Return the bytes of the trajectories on disk; `num_generated` are those for training by resolution."""
        num_prompts, num_seeds = count_validated(settings.validation_trajectories, num_validated)
        num_others = num_prompts + min(num_seeds, num_validated) * num_seeds
        return sum(
            self._trajectory_bytes(settings, count + num_others, number)
            for number, count in enumerate(num_generated)
        )

    def make_report(self, settings, training, held_out, num_images):
        """Return the MemoryReport of a run with these prompts and `num_images` images."""
        phases = self._initialization_phases(settings, training)
        disk = self._initialization_disk(settings, [*training, *held_out])
        residencies = {}
        if not settings.project_only:
            num_generated = split_trajectories(settings, count_trajectories(settings, len(training)))
            num_generated[-1] += num_images
            num_validated = len(choose_validated(training, held_out))
            phases |= self._training_phases(settings, num_generated, num_validated)
            disk += self._training_disk(settings, num_generated, num_validated)
            for residency in dict.fromkeys((*RESIDENCIES, settings.teacher_residency)):
                residencies[residency] = self._teacher_bytes(settings, residency)
        return MemoryReport(
            settings=settings,
            device=self.device,
            free_bytes=self.free_bytes,
            base_bytes=self.base_bytes,
            phases=phases,
            residencies=residencies,
            folders=measure_folders(disk),
        )

    def _initialization_phases(self, settings, training):
        """Return {phase: bytes} until the student is initialized."""
        num_frames = count_calibration_frames(settings, training, self.tokens)
        comparing_bytes, calibrating_bytes = count_initialization_bytes(
            self.files, (PROBE_ROWS, PROBE_SIZE), num_frames, self.latent_shape[1:], self.peak
        )
        start_bytes = max(comparing_bytes, calibrating_bytes + self.autoencoder_bytes + self.weight_bytes)
        # A projected student in the cache is reused if it is that of this run.
        is_cached = any(Path(settings.cache_dir).glob("start-*/manifest.json"))
        return {"text": num_bytes(self.components["text_encoder"]), "start": 0 if is_cached else start_bytes}

    def _training_phases(self, settings, num_generated, num_validated):
        """Return {phase: bytes} of generation, training, validation and matching."""
        num_prompts, num_seeds = count_validated(settings.validation_trajectories, num_validated)
        num_sampled = max(num_prompts, num_seeds**2)
        num_together = min(SHARD_SIZE, max(*num_generated, num_sampled))
        phases = {
            "trajectories": self.generation_bytes(settings, num_together)
            + self.autoencoder_bytes
            + self.weight_bytes,
            "training": self.training_bytes(settings, settings.train_batch_size),
            "validation": self.idle_bytes + self.weight_bytes + self._decoding_bytes(num_sampled),
        }
        if settings.matching_steps:
            phases["matching"] = self._add_matching(settings, settings.train_batch_size, phases["training"])
        return phases | self._part_phases(settings)

    def _part_phases(self, settings):
        """Return {phase: bytes} of making small parts."""
        if self.parts is None:
            return {}
        phases = {}
        if "decoder" in self.parts.phases:
            phases["decoder"] = count_decoder_bytes(self.parts, self.peak)
        if "reading" in self.parts.phases:
            num_states = count_states(self.student.config, self.latent_shape, self.parts.options.text_batch)
            text_bytes = num_bytes(self.components["text_encoder"])
            phases["text_velocity"] = text_bytes + self.training_bytes(settings, num_states)
        return phases

    def _decoding_bytes(self, num_images):
        """Return the bytes of decoding images in chunks, extrapolated from one chunk and two."""
        chunk_size = min(num_images, max(1, DECODED_AT_ONCE // self.pixels))

        def peak_of(num_chunks):
            batch_size = num_chunks * chunk_size
            return count_decoding_bytes(
                self.make_autoencoder, decode_latents, batch_size, self.latent_shape, self.peak
            )

        return extrapolate_depth(peak_of, math.ceil(num_images / chunk_size))

    def _initialization_disk(self, settings, prompts):
        """Return {folder: bytes} of converted components, text and the saved student."""
        saved = set(self.components.values())
        converted = {
            path for name, path in self.components.items() if not is_converted(self.components, name)
        }
        text_bytes = count_text_bytes(prompts, self.files.config["text_dim"])
        disk: Counter = Counter()
        disk[settings.cache_dir] += self.weight_bytes + text_bytes + SPARE
        if converted:
            disk[str(converted_folder(settings))] += sum(map(num_bytes, converted)) + SPARE
        disk[settings.output_dir] += self.weight_bytes + sum(map(num_bytes, saved)) + SPARE
        return disk

    def _training_disk(self, settings, num_generated, num_validated):
        """Return {folder: bytes} of the trajectories and the checkpoints."""
        best_factor = 1.5 if settings.matching_steps else 1  # a checkpoint has the best student so far
        checkpoint_bytes = best_factor * (self.idle_bytes + self.weight_bytes)
        disk: Counter = Counter()
        disk[settings.cache_dir] += self.cache_bytes(settings, num_generated, num_validated)
        disk[settings.output_dir] += (settings.checkpoints_total_limit + 1) * checkpoint_bytes
        if self.parts is not None:
            disk[settings.output_dir] += self.parts.count_disk_bytes(self.student, self.latent_shape)
        return disk
