"""The teacher's data of a run: prompt embeddings, trajectories and states at real images, each computed once.

The cache stores them under a digest of their inputs, and each shard under one of its prompts and seeds: a run with
more trajectories generates only those that it adds. Seeds of training trajectories count up from a number above
the usual seeds of users; seeds of held-out trajectories and of the noise on images count down from it. A student
is therefore never validated or used at noise that it was trained on.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.autoencoder import encode_images, to_pixels
from ..data.images import read_image
from ..data.shards import compute_once
from ..data.text_encoder import encode_once, lazy_encoder, load_tokenizer, warn_of_truncation
from ..data.trajectories import TrajectoryGenerator, split_jobs
from ..files.cache import cache_folder
from ..files.file_names import CACHE
from ..files.inside import walk
from ..files.locks import in_turn
from ..flow import make_scheduler
from ..network import TEXT_LENGTH, pack_text
from ..phases import choose_validated, count_validated
from ..teacher.components import convert_components, is_converted
from ..teacher.expert_files import sampled_digest
from .run_folder import converted_folder
from .steps import velocity_in_chunks

FIRST_SEED = 10**12  # of training trajectories
SEEDS_PER_RUN = 10**7  # distance between the first seeds of two runs


def open_components(run):
    """Return a folder of vae/, text_encoder/ and tokenizer/ in diffusers' layout: the teacher's or a converted copy."""
    settings, accelerator, components = run.settings, run.accelerator, run.components
    if all(is_converted(components, component) for component in components):
        return Path(settings.teacher)
    files = [
        path
        for source in components.values()
        for path in ([source] if source.is_file() else sorted(walk(source)))
        if path.is_file()
    ]
    with accelerator.main_process_first():
        folder = cache_folder(
            converted_folder(settings),
            "components",
            files=sampled_digest(("component", path) for path in files),
        )
    if accelerator.is_main_process:
        with in_turn(folder, accelerator.print):
            convert_components(components, folder, accelerator.print)
    accelerator.wait_for_everyone()
    return folder


class PromptEmbeddings:
    """Embeddings (L, T) of prompts, computed once by the text encoder in `components_folder`.

    `encoder_digest` identifies the text encoder and the tokenizer.
    """

    def __init__(self, accelerator, components_folder, cache_dir, prompts):
        self.encoder_digest = sampled_digest(
            ("component", path)
            for component in ("text_encoder", "tokenizer")
            for path in sorted((components_folder / component).iterdir())
            if path.is_file()
        )
        with accelerator.main_process_first():
            folder = cache_folder(cache_dir, "text", encoder=self.encoder_digest, length=TEXT_LENGTH)
        self.embeddings = encode_once(
            accelerator, lazy_encoder(components_folder, accelerator.device), prompts, folder
        )
        # Cached embeddings may be of truncated prompts, which have the full length.
        longest = [prompt for prompt, embedding in self.embeddings.items() if len(embedding) == TEXT_LENGTH]
        if longest and accelerator.is_main_process:
            warn_of_truncation(load_tokenizer(Path(components_folder) / "tokenizer"), longest, print)

    def __getitem__(self, prompt):
        return self.embeddings[prompt]

    def pack(self, prompts):
        """Return the embeddings of prompts as TextTokens on the CPU."""
        return pack_text([self.embeddings[prompt] for prompt in prompts])


class TeacherData:
    """The teacher's states for the prompts of training and validation.

    `run` is a planning.Run. `guided` and `unguided` return the teacher's velocity functions for a text. generate()
    sets `training_states`, `image_states` and `validation_states`, lists with one entry per resolution; the first
    two have lists with one entry per bucket. Only the first resolution has hidden states.
    """

    def __init__(self, run, teacher, prompt_embeddings, pace):
        self.accelerator = run.accelerator
        self.settings = run.settings
        self.pace = pace
        self.teacher = teacher
        self.prompt_embeddings = prompt_embeddings
        self.training = run.training
        self.held_out = run.held_out
        self.validated = choose_validated(run.training, run.held_out)
        self.resolutions = run.resolutions
        self.scheduler = make_scheduler(run.settings.flow_shift)
        self.first_seed = FIRST_SEED + run.settings.seed * SEEDS_PER_RUN
        negative = prompt_embeddings[run.settings.negative_prompt]
        unguided = replace(run.settings, guidance_scale=1.0, guidance_scale_2=1.0)
        self.guided, self.unguided = (
            pace.time_teacher(teacher_velocity(teacher, each, negative)) for each in (run.settings, unguided)
        )
        self.trajectory_generator = TrajectoryGenerator(
            run.accelerator,
            self._guided_for,
            self.scheduler,
            run.settings.teacher_steps,
            in_step=teacher.residency == "sharded",
        )
        self.provenance = self._describe(run.settings)

    def _describe(self, settings):
        """Return the inputs that are common to all teacher data in the cache."""
        return {
            "teacher": self.teacher.files.fingerprint,
            "negative_prompt": settings.negative_prompt,
            "shift": settings.flow_shift,
            "guidance": (settings.guidance_scale, settings.guidance_scale_2),
            "steps": settings.teacher_steps,
            "text": (self.prompt_embeddings.encoder_digest, TEXT_LENGTH),
            "features": settings.feature_directions,
        }

    def generate(self, run, autoencoder):
        """Generate the data that does not depend on the student, or read it from the cache; returns its speed."""
        self.find_basis()
        self.pace.restart()
        numbers = range(len(self.resolutions))
        self.training_states = [self.generate_training(*each) for each in zip(numbers, run.num_trajectories)]
        images = run.images if run.phases[0].name == "velocity" else []
        no_images = [[None] * len(resolution.buckets) for resolution in self.resolutions[:-1]]
        self.image_states = [*no_images, self.compute_at_images(images, autoencoder)]
        self.validation_states = [self.generate_validation(number) for number in numbers]
        return self.pace.generation_figures(run.settings.teacher_steps)

    def _guided_for(self, prompts, has_features):
        return self.guided(self.prompt_embeddings.pack(prompts).to(self.accelerator.device), has_features)

    def _cache_folder(self, kind, parent=None, **inputs):
        with self.accelerator.main_process_first():
            return cache_folder(parent or self.settings.cache_dir, kind, **inputs, **self.provenance)

    def compute_once(self, kind, make, **inputs):
        """Return the tensors of `make()`; the cache keeps them under this `kind` and its `inputs`."""
        return compute_once(self.accelerator, self._cache_folder(kind, **inputs), make)

    def find_basis(self):
        """Compute the basis of the stored hidden states from trajectories of a few training prompts."""
        prompts = self.training[: self.settings.validation_trajectories]
        latent_shape = self.resolutions[0].latent_shape
        folder = self._cache_folder("basis", prompts=prompts, latents=latent_shape)
        self.trajectory_generator.find_basis(folder, prompts, latent_shape, self.settings.feature_directions)

    def generate_training(self, resolution, num_trajectories):
        """Generate the training trajectories of a resolution, divided evenly over its buckets.

        Returns Trajectories by bucket. The `trajectories` of the last resolution are those of rollouts.
        """
        bucket_shapes = self.resolutions[resolution].bucket_shapes
        self.trajectories = [
            (number, self.training[number], self.first_seed + n)
            for n, number in enumerate(n % len(self.training) for n in range(num_trajectories))
        ]
        trajectories_by_bucket = split_jobs(self.trajectories, len(bucket_shapes), self.settings.seed)
        return [
            self._generate(trajectories, latent_shape, resolution)
            for trajectories, latent_shape in zip(trajectories_by_bucket, bucket_shapes)
        ]

    def generate_validation(self, resolution):
        """Generate the validation trajectories: one seed per prompt, and several seeds of a few prompts."""
        validated, several = count_validated(self.settings.validation_trajectories, len(self.validated))
        prompts = self.validated[: self.settings.validation_trajectories]
        one_seed = [
            (n % len(prompts), prompts[n % len(prompts)], self.first_seed - 1 - n) for n in range(validated)
        ]
        by_seed = [
            (n, prompt, self.first_seed - 1000 - seed)
            for n, prompt in enumerate(prompts[:several])
            for seed in range(several)
        ]
        latent_shape = self.resolutions[resolution].latent_shape
        return tuple(self._generate(jobs, latent_shape, resolution) for jobs in (one_seed, by_seed))

    def _generate(self, trajectories, latent_shape, resolution):
        folder = self._cache_folder("trajectories", latents=latent_shape, **self._feature_inputs(resolution))
        return self.trajectory_generator.generate(folder, trajectories, latent_shape, resolution == 0)

    def _feature_inputs(self, resolution):
        """Return the inputs by which states without hidden states differ in the cache from those with them."""
        return {} if resolution == 0 else {"has_features": False}

    def compute_at_images(self, images, autoencoder):
        """Compute the teacher's states at captioned images with noise, at the last resolution.

        Returns Trajectories by bucket, None for a bucket without images of its size (width, height).
        """
        last, found_sizes = self.resolutions[-1], {image.size for image in images}
        return [
            self._compute_at_images(images, size, latent_shape, autoencoder) if size in found_sizes else None
            for size, latent_shape in zip(last.buckets, last.bucket_shapes)
        ]

    def _compute_at_images(self, images, size, latent_shape, autoencoder):
        prompt_numbers = {prompt: number for number, prompt in enumerate(self.training)}
        images_by_digest = {image.sha256: image for image in images if image.size == size}
        jobs = [
            (prompt_numbers[image.caption], image.caption, self.first_seed - 10**6 - n, image.sha256)
            for n, image in enumerate(images)
            if image.size == size
        ]

        def encode(digests):
            arrays = np.stack([read_image(images_by_digest[sha256]) for sha256 in digests])
            return encode_images(autoencoder, to_pixels(arrays).to(self.accelerator.device))

        resolution = len(self.resolutions) - 1
        folder = self._cache_folder("images", latents=latent_shape, **self._feature_inputs(resolution))
        return self.trajectory_generator.compute_at_images(folder, jobs, encode, resolution == 0)

    def roll_out(self, student, digest, few, first, is_past):
        """Solve with `student` to the stops of its few steps, and from there with the teacher.

        Returns the on-policy states at the stops by bucket, or None for each bucket without rollouts. `digest`
        identifies the student's weights; `first`, the first step of the phase, determines the prompts. Raises
        OSError if training `is_past` that step and the states are missing or damaged, because that student no
        longer exists.
        """
        bucket_shapes = self.resolutions[-1].bucket_shapes
        if not self.settings.rollout_states or not few.stops:
            return [None] * len(bucket_shapes)
        jobs = [
            (*self.trajectories[n % len(self.trajectories)], *few.stops[n % len(few.stops)])
            for n in range(first, first + self.settings.rollout_states)
        ]

        def student_for(prompts):
            return velocity_in_chunks(
                student, self.prompt_embeddings.pack(prompts).to(self.accelerator.device)
            )

        rollouts = []
        jobs_by_bucket = split_jobs(jobs, len(bucket_shapes), self.settings.seed)
        for bucket_jobs, latent_shape in zip(jobs_by_bucket, bucket_shapes):
            folder = self._rollout_folder(latent_shape, digest)
            irreplaceable = f"the rollout of step {first}" if is_past else ""
            rollouts.append(
                self.trajectory_generator.roll_out(
                    folder, bucket_jobs, latent_shape, student_for, few.scheduler, irreplaceable
                )
            )
        return rollouts

    def _rollout_folder(self, latent_shape, digest):
        """Return the folder of a rollout, in the run's own cache: no other run has the same student."""
        parent = Path(self.settings.output_dir) / CACHE
        return self._cache_folder("rollouts", parent, latents=latent_shape, student=digest)


def teacher_velocity(teacher, settings, negative):
    """Return `velocity_for(text, has_features=False)`, which returns velocity functions of (latents, timestep).

    With `has_features`, these functions return (velocity, hidden states (B, N, D) after the feature block).
    """

    def velocity_for(text, has_features=False):
        negative_text = pack_text([negative] * len(text.tokens)).to(text.tokens.device)
        blocks = (feature_block(teacher.config["num_layers"]),) if has_features else ()

        def velocity_of(latents, timestep):
            velocity, hidden_states = teacher.velocity(
                latents,
                timestep,
                text,
                negative_text,
                settings.guidance_scale,
                settings.guidance_scale_2,
                feature_blocks=blocks,
            )
            return (velocity, hidden_states[0]) if has_features else velocity

        return velocity_of

    return velocity_for


def feature_block(depth: int) -> int:
    """Return the block whose hidden states are compared: at three quarters of the depth, where layout is encoded."""
    return max(0, round(0.75 * depth) - 1)
