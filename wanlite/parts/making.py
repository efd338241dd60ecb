"""A saved student with large parts -> a folder of the same student with a small text encoder and a small decoder.

Everything is learned from the large parts and from the student's own images of prompts; no other data is needed. The
folder is one of stock diffusers' classes only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.autoencoder import decode_latents, to_images
from ..data.shards import (
    SCALE,
    SHARD_SIZE,
    dequantize,
    find_fault,
    quantize,
    read_shard,
    shard_path,
    write_shard,
)
from ..data.single_frame import SingleFrameAutoencoder
from ..data.text_encoder import check_embedded
from ..files.cache import cache_folder, fingerprint
from ..flow import sample, seeded_noise, set_steps
from ..network import TEXT_LENGTH, TextTokens
from ..phases import list_part_phases
from ..runtime.progress import track
from ..runtime.signals import Stopped
from ..training.phase_table import hash_weights
from ..training.steps import velocity_in_chunks
from .decoder import clipped_error, convolutions_as_matrices, decoder_loss, peak_signal_to_noise
from .decoder_projection import project_decoder
from .loop import Schedule, make_generator, train_part
from .options import PartOptions
from .text_encoder import (
    SmallText,
    compare_reading,
    encode,
    pack,
    reading_loss,
    tokenize_all,
    velocity_difference,
)
from .text_projection import EncoderFiles, TextShape, Tokens, project_text_encoder

PROJECTED_IMAGES = 16  # images from which the decoder's convolutions are fitted
PROJECTED_PROMPTS = 256  # prompts from which the text encoder's matrices are fitted
VALIDATED_IMAGES = 64
VELOCITY_RATE_SHARE = 0.25  # of the peak, in the last phase of the text encoder
TOGETHER = 64  # images or prompts in a batch without gradients
HELD_OUT_BATCHES = 4  # of a held-out loss


@dataclass
class Pipeline:
    """A student with its parts, as this package computes with them."""

    folder: str | Path
    student: Any
    scheduler: Any
    num_steps: int
    tokenizer: Any
    encoder: Any
    autoencoder: Any
    latent_shape: tuple[int, int, int]

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @cached_property
    def decoder(self) -> SingleFrameAutoencoder:
        """The single-frame form of the autoencoder."""
        return SingleFrameAutoencoder(self.autoencoder).to(self.device)

    def tokens(self, prompts: Sequence[str]) -> Tokens:
        tokens = tokenize_all(self.tokenizer, prompts, TEXT_LENGTH)
        check_embedded(self.tokenizer, self.encoder, prompts, tokens.ids)
        return Tokens(tokens.ids.to(self.device), tokens.mask.to(self.device))

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> TextTokens:
        tokens = self.tokens(prompts)
        return pack(encode(self.encoder, tokens), tokens)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], num_steps: int | None = None) -> Tensor:
        """Return the latents (B, C, H, W) of prompts."""
        noise = seeded_noise(self.latent_shape, seeds).to(self.device)
        velocity_of = velocity_in_chunks(self.student, self.text(prompts))
        return sample(velocity_of, noise, self.scheduler, num_steps or self.num_steps)

    def images(self, prompts: Sequence[str], num_steps: int | None = None) -> Any:
        """Return the images (B, height, width, 3) uint8 of prompts, with the seeds 0, 1, ..."""
        found = []
        for start in range(0, len(prompts), TOGETHER):
            batch = prompts[start : start + TOGETHER]
            latents = self.draw(batch, range(start, start + len(batch)), num_steps)
            found.append(to_images(decode_latents(self.decoder, latents)))
        return torch.cat([torch.from_numpy(each) for each in found]).numpy()


class SmallParts:
    """Makes the small parts of `large`, with checkpoints and drawn latents in `folder`.

    `num_before` is the number of phases of the run before its part phases.
    """

    def __init__(
        self,
        large: Pipeline,
        options: PartOptions,
        prompts: Sequence[str],
        held_out: Sequence[str],
        folder: Path,
        stop: Any = None,
        num_before: int = 0,
    ):
        self.large, self.options, self.folder, self.stop = large, options, folder, stop
        self.num_before, self.log = num_before, partial(print, flush=True)
        self.prompts = [prompts[number % len(prompts)] for number in range(options.num_images)]
        self.held_out = list(held_out)[:VALIDATED_IMAGES]
        self.facts = {
            "options": options.facts(),
            "prompts": fingerprint([self.prompts, self.held_out]),
            "parts": [hash_weights(each) for each in (large.student, large.encoder, large.autoencoder)],
        }

    def make(self) -> tuple[Pipeline, dict[str, Any]]:
        """Return the pipeline with small parts, and figures of their quality."""
        large, figures = self.large, {}
        if self.stop is not None:
            self.stop.is_immediate = False  # a stop waits for a checkpoint
        autoencoder, encoder, student = large.autoencoder, large.encoder, large.student
        if self.options.decoder_base_dim is not None:
            autoencoder, figures["decoder"] = self.make_decoder(self.options.decoder_base_dim)
        if self.options.text_shape is not None:
            encoder, student, figures["text_encoder"] = self.make_text_encoder(self.options.text_shape)
        self._check_stop()
        if self.stop is not None:
            self.stop.is_immediate = True
        small = Pipeline(
            large.folder,
            student,
            large.scheduler,
            large.num_steps,
            large.tokenizer,
            encoder,
            autoencoder,
            large.latent_shape,
        )
        return small, figures

    # ---- data ----------------------------------------------------------------------------------------------

    @cached_property
    def latents(self) -> Tensor:
        """The student's latents (n, C, H, W) of the training prompts, drawn once and kept on disk."""
        return self._draw(self.prompts, 0)

    @cached_property
    def held_out_latents(self) -> Tensor:
        return self._draw(self.held_out, len(self.prompts))

    def _draw(self, prompts, first_seed):
        jobs = [(prompt, self.options.seed + first_seed + number) for number, prompt in enumerate(prompts)]
        parts = {
            "parts": self.facts["parts"],
            "steps": self.large.num_steps,
            "shape": self.large.latent_shape,
        }
        folder = cache_folder(self.folder / "cache", "latents", **parts)
        batches = [jobs[start : start + SHARD_SIZE] for start in range(0, len(jobs), SHARD_SIZE)]
        paths = [shard_path(folder, index, batch) for index, batch in enumerate(batches)]
        with track(len(jobs), "images of the student") as progress:
            for path, batch in zip(paths, batches):
                if find_fault(path, batch):
                    self._check_stop()
                    drawn = self.large.draw([job[0] for job in batch], [job[1] for job in batch])
                    values, scale = quantize(drawn.unsqueeze(1).cpu())
                    write_shard(path, {"latents": values, f"latents{SCALE}": scale}, batch)
                progress.update(len(batch))
        shards = [dequantize(read_shard(path), "latents") for path in paths]
        return torch.cat(shards).squeeze(1)

    def _check_stop(self):
        if self.stop is not None and self.stop.is_set:
            raise Stopped

    # ---- training ------------------------------------------------------------------------------------------

    def _train(self, name, network, losses, share=1.0):
        """Train a phase; the weights before it are kept if its steps do not lower the held-out loss.

        `losses` are the functions of a training batch and of a held-out batch.
        """
        options, steps = self.options, getattr(self.options, f"{name}_steps")
        schedule = Schedule(steps, share * options.learning_rate, options.seed, options.checkpointing_steps)
        loss, held_out_loss = losses
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        earlier, before = [weight.detach().clone() for weight in weights], self._mean(held_out_loss)
        train_part(self._describe(name), self.folder / name, network, loss, schedule, self.facts, self.stop)
        after = self._mean(held_out_loss)
        if after < before:
            return
        with torch.no_grad():
            for weight, own in zip(weights, earlier):
                weight.copy_(own)
        self.log(
            f"{name}: {steps:,} steps do not lower the held-out loss ({before:.4g} to {after:.4g}); the weights "
            "before them are kept"
        )

    @torch.no_grad()
    def _mean(self, loss):
        """Return the mean of a loss over HELD_OUT_BATCHES batches, the same ones each time."""
        values = [loss(make_generator(self.options.seed, number)) for number in range(HELD_OUT_BATCHES)]
        return float(torch.stack(values).mean())

    def _describe(self, name):
        names = list_part_phases(
            self.options.text_shape is not None, self.options.decoder_base_dim is not None
        )
        number = self.num_before + names.index(name) + 1
        return f"phase {number} of {self.num_before + len(names)}, {name}"

    # ---- decoder -------------------------------------------------------------------------------------------

    def make_decoder(self, base_dim: int) -> tuple[Any, dict[str, Any]]:
        """Return an autoencoder with a small decoder, and its figures."""
        large, options = self.large, self.options
        narrow = project_decoder(
            large.autoencoder, base_dim, self.latents[:PROJECTED_IMAGES].to(large.device)
        )
        projected = self._psnr(narrow)
        self.log(f"decoder  projected to {base_dim} channels: {projected:.1f} dB to the large one")
        narrow.requires_grad_(False)
        narrow.decoder.requires_grad_(True)
        batch = options.decoder_batch
        losses = [
            decoder_loss(large.decoder, narrow, self.latents, batch),
            decoder_loss(large.decoder, narrow, self.held_out_latents, batch, clipped_error),
        ]
        with convolutions_as_matrices(narrow.decoder):
            self._train("decoder", narrow, losses)
        narrow = round_weights(narrow)
        figures = {
            "psnr": self._psnr(narrow),
            "projected_psnr": projected,
            "parameters": count_parameters(narrow.decoder),
            "large_parameters": count_parameters(large.autoencoder.decoder),
        }
        self.log(f"decoder  distilled: {figures['psnr']:.1f} dB")
        return narrow, figures

    def _psnr(self, narrow):
        own = SingleFrameAutoencoder(narrow).to(self.large.device)
        return round(peak_signal_to_noise(self.large.decoder, own, self.held_out_latents), 2)

    # ---- text encoder --------------------------------------------------------------------------------------

    def make_text_encoder(self, shape: TextShape) -> tuple[Any, Any, dict[str, Any]]:
        """Return a small text encoder, a student that reads it, and figures."""
        large, options = self.large, self.options
        reader = large.student.condition_embedder.text_embedder.linear_1
        tokens = large.tokens(self.prompts)
        held_out = large.tokens(self.held_out)
        first = tokens.take(torch.arange(min(PROJECTED_PROMPTS, len(self.prompts))))
        encoder, weight = project_text_encoder(EncoderFiles(large.folder), shape, first, reader.weight)
        small = SmallText(encoder, weight, reader.bias).to(large.device)
        compare = partial(compare_reading, large.encoder, reader, small, held_out)
        projected = float(compare().mean())
        self.log(f"text     projected to width {shape.width}: cosine {projected:.3f} to the large one")
        small.encoder.requires_grad_(True)
        own_student = with_reader(large.student, small.reader)
        losses = [
            reading_loss(large.encoder, reader, small, each, options.text_batch)
            for each in (tokens, held_out)
        ]
        self._train("reading", small, losses)
        read = float(compare().mean())
        self.log(f"text     distilled: cosine {read:.3f}")
        students = (large.student, own_student)
        losses = [
            velocity_difference(large.encoder, small, students, states, self.levels(), options.text_batch)
            for states in ((tokens, self.latents), (held_out, self.held_out_latents))
        ]
        self._train("text_velocity", small, losses, VELOCITY_RATE_SHARE)
        small.requires_grad_(False)
        small.encoder = round_weights(small.encoder)
        cosines = compare()
        worst = cosines.argsort()[:10].tolist()
        figures = {
            "cosine": round(float(cosines.mean()), 4),
            "projected_cosine": round(projected, 4),
            "read_cosine": round(read, 4),
            "worst_prompts": {self.held_out[number]: round(float(cosines[number]), 3) for number in worst},
            "parameters": count_parameters(small.encoder),
            "large_parameters": count_parameters(large.encoder),
        }
        self.log(f"text     with the student's velocity: cosine {figures['cosine']:.3f}")
        return small.encoder, own_student, figures

    def levels(self) -> list[tuple[float, float]]:
        """Return the (timestep, noise level) of the student's steps."""
        large = self.large
        states = set_steps(large.scheduler, large.num_steps, "cpu")
        return [(float(timestep), float(noise_level)) for timestep, noise_level in states]


def with_reader(student: Any, reader: Any) -> Any:
    """Return a student with the weights of another that reads text of another width through `reader`."""
    config = {name: value for name, value in student.config.items() if not name.startswith("_")}
    own = type(student).from_config(config | {"text_dim": reader.in_features})
    weights = student.state_dict() | {
        f"condition_embedder.text_embedder.linear_1.{name}": tensor
        for name, tensor in reader.state_dict().items()
    }
    own.load_state_dict(weights)
    own.requires_grad_(False).to(reader.weight.device)
    own.condition_embedder.text_embedder.linear_1 = reader
    return own.eval()


def round_weights(network: Any) -> Any:
    """Return a network with the values that its weights have in bfloat16, as it is saved."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.bfloat16())
    return network


def count_parameters(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters())
