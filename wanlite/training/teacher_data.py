"""A teacher, prompts and images -> all that they say to a run, asked once and kept in the cache under what it
was made of.

Training trajectories start from seeds that count up from a number that is above all that users draw with, held-out
trajectories and the noise on images from seeds that count down from it: a student is never examined, and not used
either, at noise that it learned from.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.autoencoder import encode_images, to_pixels
from ..data.images import read_image
from ..data.shards import compute_once
from ..data.text_encoder import encode_once, lazy_encoder, load_tokenizer, warn_of_truncation
from ..data.trajectories import TrajectoryGenerator, deal_out
from ..files.cache import cache_folder
from ..files.locks import in_turn
from ..flow import make_scheduler
from ..network import TEXT_LENGTH, pack_text
from ..phases import choose_validated, count_validated
from ..teacher.components import convert_components, is_converted
from ..teacher.expert_files import sampled_digest
from .steps import velocity_in_chunks

FIRST_SEED, SEEDS_A_RUN = 10**12, 10**7  # of training trajectories, and how far those of two runs are apart


def open_components(run):
    """Return the folder of vae/, text_encoder/ and tokenizer/ in diffusers' layout: the teacher's, or the
    cache that they are converted into."""
    settings, accelerator, found = run.settings, run.accelerator, run.components
    if all(is_converted(found, component) for component in found):
        return Path(settings.teacher)
    files = [
        path
        for place in found.values()
        for path in ([place] if place.is_file() else sorted(place.rglob("*")))
        if path.is_file()
    ]
    with accelerator.main_process_first():
        folder = cache_folder(
            settings.cache_dir, "components", files=sampled_digest(("component", path) for path in files)
        )
    if accelerator.is_main_process:
        with in_turn(folder, accelerator.print):
            convert_components(found, folder, accelerator.print)
    accelerator.wait_for_everyone()
    return folder


class PromptEmbeddings:
    """Prompts' embeddings (L, T), each made once by the text encoder in `components_folder`; `said_by` is that
    encoder's digest.
    """

    def __init__(self, accelerator, components_folder, cache_dir, prompts):
        self.said_by = sampled_digest(
            ("component", path)
            for component in ("text_encoder", "tokenizer")
            for path in sorted((components_folder / component).iterdir())
            if path.is_file()
        )
        with accelerator.main_process_first():
            folder = cache_folder(
                cache_dir, "text", encoder=self.said_by, length=TEXT_LENGTH, prompts=prompts
            )
        self.embeddings = encode_once(
            accelerator, lazy_encoder(components_folder, accelerator.device), prompts, folder
        )
        full = [prompt for prompt, embedding in self.embeddings.items() if len(embedding) == TEXT_LENGTH]
        if full and accelerator.is_main_process:  # the cache holds what was cut as well
            warn_of_truncation(load_tokenizer(Path(components_folder) / "tokenizer"), full, print)

    def __getitem__(self, prompt):
        return self.embeddings[prompt]

    def pack(self, prompts):
        """Return prompts as TextTokens, on the CPU."""
        return pack_text([self.embeddings[prompt] for prompt in prompts])


class TeacherData:
    """What the teacher predicts for training prompts, and for the held-out ones of validations.

    `run` is a planning.Run: the first of its `latent_shapes` (C, H, W) is that of validations, the others are
    trained on, one a bucket. `guided` and `unguided` make velocity functions of text. generate() sets
    `training_states` and `image_states`, a list with an entry a bucket, and `validation_states`.
    """

    def __init__(self, run, teacher, words, pace):
        self.accelerator, self.settings, self.words, self.pace = run.accelerator, run.settings, words, pace
        self.training, self.held_out = run.training, run.held_out
        self.validated = choose_validated(run.training, run.held_out)
        self.latent_shape, *self.buckets = run.latent_shapes
        self.teacher, self.scheduler = teacher, make_scheduler(run.settings.flow_shift)
        self.first_seed = FIRST_SEED + run.settings.seed * SEEDS_A_RUN
        negative = words[run.settings.negative_prompt]
        unguided = replace(run.settings, guidance_scale=1.0, guidance_scale_2=1.0)
        self.guided, self.unguided = (
            pace.timed(teacher_velocity(teacher, each, negative)) for each in (run.settings, unguided)
        )
        self.trajectory_generator = TrajectoryGenerator(
            run.accelerator,
            self._guided_for,
            self.scheduler,
            run.settings.teacher_steps,
            in_step=teacher.residency == "sharded",
        )
        self.made_of = self._describe(run.settings)

    def _describe(self, settings):
        """Return what everything in the cache is made of."""
        return {
            "teacher": self.teacher.files.fingerprint,
            "negative_prompt": settings.negative_prompt,
            "shift": settings.flow_shift,
            "guidance": (settings.guidance_scale, settings.guidance_scale_2),
            "steps": settings.teacher_steps,
            "text": (self.words.said_by, TEXT_LENGTH),
            "features": settings.feature_directions,
        }

    def generate(self, run, autoencoder):
        """Generate all that does not depend on the student, or read it from the cache; returns how fast it was."""
        self.find_basis()
        self.pace.restart()
        self.training_states = self.generate_training(run.settings.num_trajectories)
        images = run.images if run.phases[0].name == "velocity" else []
        self.image_states = self.ask_at_images(images, run.sizes[1:], autoencoder)
        self.validation_states = self.generate_validation()
        return self.pace.generation_figures(run.settings.teacher_steps)

    def _guided_for(self, prompts, has_features):
        return self.guided(self.words.pack(prompts).to(self.accelerator.device), has_features)

    def _kept_in(self, kind, parent=None, **what):
        with self.accelerator.main_process_first():
            return cache_folder(parent or self.settings.cache_dir, kind, **what, **self.made_of)

    def keep(self, kind, make, **what):
        """Return the tensors of `make()`, which the cache keeps as a `kind` of what they were made of."""
        return compute_once(self.accelerator, self._kept_in(kind, **what), make)

    def find_basis(self):
        """Find the directions that token states are kept in, on trajectories of a few training prompts."""
        prompts = self.training[: self.settings.validation_trajectories]
        folder = self._kept_in("basis", prompts=prompts, latents=self.latent_shape)
        self.trajectory_generator.find_basis(
            folder, prompts, self.latent_shape, self.settings.feature_directions
        )

    def generate_training(self, num_trajectories):
        """Walk from noise to picture `num_trajectories` times, as often in each bucket; returns the Trajectories by
        bucket.
        """
        self.trajectories = [
            (number, self.training[number], self.first_seed + n)
            for n, number in enumerate(n % len(self.training) for n in range(num_trajectories))
        ]
        return [
            self._generate(*bucket)
            for bucket in zip(
                deal_out(self.trajectories, len(self.buckets), self.settings.seed), self.buckets
            )
        ]

    def generate_validation(self):
        """Walk the prompts of validations; returns Trajectories of one seed each, and of a few prompts from
        several seeds each.
        """
        validated, several = count_validated(self.settings.validation_trajectories, len(self.validated))
        prompts = self.validated[: self.settings.validation_trajectories]
        once = [
            (n % len(prompts), prompts[n % len(prompts)], self.first_seed - 1 - n) for n in range(validated)
        ]
        by_seed = [
            (n, prompt, self.first_seed - 1000 - seed)
            for n, prompt in enumerate(prompts[:several])
            for seed in range(several)
        ]
        return self._generate(once, self.latent_shape), self._generate(by_seed, self.latent_shape)

    def _generate(self, trajectories, latents):
        return self.trajectory_generator.generate(
            self._kept_in("trajectories", trajectories=trajectories, latents=latents), trajectories, latents
        )

    def ask_at_images(self, images, sizes, autoencoder):
        """Ask what the teacher says at captioned images, noised; returns Trajectories by bucket, None where
        there are no images of its size (width, height)."""
        return [
            self._ask_at_images(images, *bucket, autoencoder)
            if bucket[0] in {image.size for image in images}
            else None
            for bucket in zip(sizes, self.buckets)
        ]

    def _ask_at_images(self, images, size, latents, autoencoder):
        number_of = {prompt: number for number, prompt in enumerate(self.training)}
        found = {image.sha256: image for image in images if image.size == size}
        asked = [
            (number_of[image.caption], image.caption, self.first_seed - 10**6 - n, image.sha256)
            for n, image in enumerate(images)
            if image.size == size
        ]

        def latents_of(digests):
            pictures = np.stack([read_image(found[sha256]) for sha256 in digests])
            return encode_images(autoencoder, to_pixels(pictures).to(self.accelerator.device))

        return self.trajectory_generator.ask_at_images(
            self._kept_in("images", asked=asked, latents=latents), asked, latents_of
        )

    def roll_out(self, student, digest, few, first, is_past):
        """Go with `student`, whose weights have this digest, to where its few steps stop, and on with the
        teacher; returns the states where they met by bucket, None where there are none.

        Which prompts follows from `first`, the step at which a component begins. Raises OSError where training
        `is_past` it and the states are gone: that student is no more.
        """
        if not self.settings.rollout_states or not few.stops:
            return [None] * len(self.buckets)
        paths = [
            (*self.trajectories[n % len(self.trajectories)], *few.stops[n % len(few.stops)])
            for n in range(first, first + self.settings.rollout_states)
        ]
        found = []
        for its_paths, latents in zip(deal_out(paths, len(self.buckets), self.settings.seed), self.buckets):
            folder = self._kept_in(
                "own-path",
                Path(self.settings.output_dir) / "cache",
                paths=its_paths,
                latents=latents,
                student=digest,
            )
            if is_past and not any(folder.glob("shard-*")):
                raise OSError(
                    f"{folder}: the states that the student met at step {first} are gone, and it is past "
                    f"that step. Put "
                    "them back, or add --overwrite to start again."
                )
            found.append(
                self.trajectory_generator.roll_out(
                    folder,
                    its_paths,
                    latents,
                    lambda prompts: velocity_in_chunks(
                        student, self.words.pack(prompts).to(self.accelerator.device)
                    ),
                    few.scheduler,
                )
            )
        return found


def teacher_velocity(teacher, settings, negative):
    """Return `velocity_for(text, has_features=False)`, which makes velocity functions of (latents, timestep).

    With `has_features` these return (velocity, hidden states (B, N, D) after the feature block).
    """

    def velocity_for(text, has_features=False):
        unwanted = pack_text([negative] * len(text.tokens)).to(text.tokens.device)
        blocks = (feature_block(teacher.config["num_layers"]),) if has_features else ()

        def velocity_of(latents, timestep):
            velocity, states = teacher.velocity(
                latents,
                timestep,
                text,
                unwanted,
                settings.guidance_scale,
                settings.guidance_scale_2,
                feature_blocks=blocks,
            )
            return (velocity, states[0]) if has_features else velocity

        return velocity_of

    return velocity_for


def feature_block(depth):
    """Return the block whose token states are compared: three quarters deep, where text has become layout."""
    return max(0, round(0.75 * depth) - 1)
