"""Distillation of a small text encoder, for one student: first the text that the student reads, then the student's velocity.

The student reads text through one linear layer alone, so the small encoder learns that layer's outputs, and the layer
gets the small encoder's width. Source of the second phase: DistillT5 (Wang et al. 2025), through a much larger network.

Legend: B prompts or states, L text length, D d widths of the large and of the small encoder.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.text_encoder import tokenize
from ..flow import add_noise
from ..network import TextTokens, pack_states
from ..training.losses import velocity_loss
from ..training.steps import velocity_from
from .text_projection import Tokens

COSINE_WEIGHT = 1.0
VELOCITY_WEIGHT = 10.0  # the student's velocity differs by a few percent at first
IMAGE_TOKENS = 2**14  # of the states of a step, at most: 16 images of 512 pixels


class SmallText(nn.Module):
    """A small encoder, and the student's layer that reads it."""

    def __init__(self, encoder: Any, weight: Tensor, bias: Tensor):
        super().__init__()
        self.encoder = encoder
        self.reader = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.reader.weight.copy_(weight)
            self.reader.bias.copy_(bias)
        self.reader.bias.requires_grad_(False)  # what the student reads where a prompt has ended

    def states(self, tokens: Tokens) -> Tensor:
        """Return the hidden states (B, L, d)."""
        return encode(self.encoder, tokens)


def encode(encoder: Any, tokens: Tokens) -> Tensor:
    """Return an encoder's hidden states (B, L, D) of tokens."""
    return encoder(tokens.ids, tokens.mask).last_hidden_state


def tokenize_all(tokenizer: Any, prompts: Sequence[str], max_length: int) -> Tokens:
    """Return the tokens of prompts, padded to the longest."""
    tokens = tokenize(
        tokenizer, prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return Tokens(tokens.input_ids, tokens.attention_mask)


def reading_loss(
    large: Any, reader: Any, small: SmallText, tokens: Tokens, batch_size: int
) -> Callable[[torch.Generator], Tensor]:
    """Return the loss of the student's inputs for random prompts: squared error and angle of each token."""

    def loss(generator):
        rows = torch.randint(len(tokens.ids), (batch_size,), generator=generator)
        batch = tokens.take(rows)
        with torch.no_grad():
            target = batch.rows(reader(encode(large, batch).float()))
        read = batch.rows(small.reader(small.states(batch)))
        error = F.mse_loss(read, target) / target.square().mean()
        return error + COSINE_WEIGHT * (1 - F.cosine_similarity(read, target, dim=-1).mean())

    return loss


def velocity_difference(
    large: Any,
    small: SmallText,
    students: tuple[Any, Any],
    states: tuple[Tokens, Tensor],
    levels: Sequence[tuple[float, float]],
    batch_size: int,
) -> Callable[[torch.Generator], Tensor]:
    """Return the loss of the student's velocity with the small text, to its velocity with the large text.

    The loss of what the student reads is added. `states` are prompts and latents (B, C, H, W) of the same rows, at a
    random one of `levels` (timestep, noise level). The second of `students` reads the small text; its weights are
    those of the first.
    """
    student, own_student = students
    tokens, latents = states
    reader = student.condition_embedder.text_embedder.linear_1
    reading = reading_loss(large, reader, small, tokens, batch_size)
    num_states = count_states(student.config, latents.shape, batch_size)
    device = tokens.ids.device

    def loss(generator):
        rows = torch.randint(len(latents), (num_states,), generator=generator)
        chosen = torch.randint(len(levels), (num_states,), generator=generator)
        timestep, noise_level = torch.tensor(levels)[chosen].to(device).unbind(1)
        clean = latents[rows].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        noisy = add_noise(clean, noise, noise_level)
        batch = tokens.take(rows)
        with torch.no_grad():
            text = pack(encode(large, batch), batch)
        own_text = pack(small.states(batch), batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                target = velocity_from(student, text)(noisy, timestep).float()
            velocity = velocity_from(own_student, own_text)(noisy, timestep).float()
        difference = velocity_loss(velocity, target).mean() / target.square().mean()
        return VELOCITY_WEIGHT * difference + reading(generator)

    return loss


def count_states(config: Any, latent_shape: Sequence[int], batch_size: int) -> int:
    """Return the states of a step: fewer of large images than prompts. `latent_shape` is (..., H, W)."""
    height, width = latent_shape[-2:]
    tokens = height * width // (config.patch_size[1] * config.patch_size[2])
    return max(1, min(batch_size, IMAGE_TOKENS // tokens))


def pack(states: Tensor, tokens: Tokens) -> TextTokens:
    """Return hidden states (B, L, D) as the student takes them."""
    return pack_states(states, tokens.mask.sum(1))


@torch.no_grad()
def compare_reading(large: Any, reader: Any, small: SmallText, tokens: Tokens) -> Tensor:
    """Return the mean cosine (B,) between the student's inputs from both encoders, for each prompt."""
    target, read = reader(encode(large, tokens).float()), small.reader(small.states(tokens))
    cosine = F.cosine_similarity(read, target, dim=-1).masked_fill(~tokens.mask.bool(), 0.0)
    return cosine.sum(1) / tokens.mask.sum(1)
