"""LoRA matrices trained on latents of captioned images, beside images of the student's own that must stay.

    noisy = (1 - noise_level) * clean + noise_level * noise

    captioned images: loss = |student(noisy) - (noise - clean)|^2                  flow matching
    the student's own images: loss = |student(noisy) - student without LoRA(noisy)|^2

Guidance is distilled into a student, so that its velocity is not the average velocity of its own images. Flow
matching alone therefore moves the images of all prompts; the second loss keeps those of other prompts.

Legend: B batch, C channels, H W latent height and width, L text length, T text width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.autoencoder import encode_images, load_autoencoder, to_pixels
from ..data.images import CaptionedImage, read_image
from ..data.text_encoder import encode_prompts, load_text_encoder
from ..flow import Velocity, add_noise, sample, seeded_noise, shift_noise_level
from ..network import TextTokens, pack_text
from ..schedule import TIMESTEPS
from ..student.saving import write_weights
from ..teacher.keys import official_name
from ..training.losses import velocity_loss

ADAPTER = "default"
DIFFUSERS_FILE, COMFYUI_FILE = "pytorch_lora_weights.safetensors", "comfyui.safetensors"
DIFFUSERS_PREFIX, COMFYUI_PREFIX = "transformer.", "diffusion_model."
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")  # of every block

DRAWN_TOGETHER = 16  # own images
OWN_SHARE = 2  # own images of a batch, per captioned image

Groups = list[tuple[Tensor, list[Tensor]]]  # latents (B, C, H, W) and texts (L, T) of the images of one size
Levels = Sequence[tuple[float, float]]  # (timestep, noise level)


@torch.no_grad()
def encode(folder: Path, images: Sequence[CaptionedImage], device: str) -> Groups:
    """Return latents and text of images, a group for each size; the encoders are freed afterwards."""
    tokenizer, encoder = load_text_encoder(folder, device)
    embeddings = encode_prompts(tokenizer, encoder, [image.caption for image in images])
    del encoder
    autoencoder = load_autoencoder(folder, device)
    groups = defaultdict(list)
    for image, embedding in zip(images, embeddings):
        pixels = to_pixels(np.array(read_image(image))[None]).to(device)
        groups[image.size].append((encode_images(autoencoder, pixels)[0].float(), embedding.float()))
    return [
        (torch.stack([latents for latents, _ in rows]), [text for _, text in rows])
        for rows in groups.values()
    ]


@torch.no_grad()
def draw_own(
    student: Any, folder: Path, groups: Groups, prompts: Sequence[str], scheduler: Any, num_steps: int
) -> Groups:
    """Return the latents of a student's own images of prompts, which are divided among the sizes of `groups`."""
    device = student.device
    tokenizer, encoder = load_text_encoder(folder, device)
    embeddings = [text.float() for text in encode_prompts(tokenizer, encoder, prompts)]
    own = []
    for index, (latents, _) in enumerate(groups):
        texts = embeddings[index :: len(groups)] or embeddings
        drawn: list[Tensor] = []
        for start in range(0, len(texts), DRAWN_TOGETHER):
            part = texts[start : start + DRAWN_TOGETHER]
            noise = seeded_noise(latents.shape[1:], range(len(drawn), len(drawn) + len(part))).to(device)
            drawn += sample(velocity_of(student, pack_text(part)), noise, scheduler, num_steps)
        own.append((torch.stack(drawn), texts))
    return own


def velocity_of(student: Any, text: TextTokens) -> Velocity:
    """Return a student's velocity for texts, as a function of latents and timestep."""
    return lambda latents, timestep: student(latents, timestep, text).sample


def batches(
    groups: Groups, own: Groups, batch_size: int, seed: int
) -> Iterator[tuple[int, Tensor, TextTokens]]:
    """Yield batches without end: the number of captioned images, then the latents and texts of them and of own images.

    A batch has one size; sizes are drawn by their number of captioned images.
    """
    random = np.random.default_rng(seed)
    counts = np.array([len(latents) for latents, _ in groups])
    while True:
        index = random.choice(len(groups), p=counts / counts.sum())
        chosen, texts = [], []
        for (latents, embeddings), size in (
            (groups[index], batch_size),
            (own[index], OWN_SHARE * batch_size),
        ):
            rows = random.choice(len(latents), min(size, len(latents)), replace=False).tolist()
            chosen.append(latents[rows])
            texts += [embeddings[row] for row in rows]
        yield len(chosen[0]), torch.cat(chosen), pack_text(texts)


def draw_levels(
    levels: Levels, shift: float, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return timesteps and noise levels, both (count,): of a few-step student's `levels`, or any level if empty."""
    if levels:
        rows = torch.randint(len(levels), (count,), generator=generator)
        timestep, level = torch.tensor(levels)[rows].unbind(1)
        return timestep, level
    level = shift_noise_level(torch.rand(count, generator=generator), shift)
    return TIMESTEPS * level, level


def add_lora(student: Any, rank: int) -> list[Tensor]:
    """Add LoRA matrices to a frozen student; returns the trainable tensors.

    alpha equals the rank, so that every program scales the product of the matrices by 1.
    """
    from peft import LoraConfig

    student.requires_grad_(False)
    student.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS), init_lora_weights="gaussian"),
        ADAPTER,
    )
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def train(
    student: Any,
    rows: Iterator[tuple[int, Tensor, TextTokens]],
    levels: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    num_steps: int,
    learning_rate: float,
    seed: int,
) -> Iterator[tuple[float, float]]:
    """Train the LoRA matrices of a student in place; yields both losses of every step.

    The learning rate falls to 0 along a cosine.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    for _, (num_new, clean, text) in zip(range(num_steps), rows):
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        timestep, level = (values.to(clean.device) for values in levels(len(clean), generator))
        noisy = add_noise(clean, noise, level)
        target = noise - clean
        target[num_new:] = velocity_without_lora(
            student, noisy[num_new:], timestep[num_new:], text.rows(slice(num_new, None))
        )
        losses = velocity_loss(student(noisy, timestep, text).sample, target)
        new, kept = losses[:num_new].mean(), losses[num_new:].mean()
        optimizer.zero_grad(set_to_none=True)
        (new + kept).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield new.item(), kept.item()


@torch.no_grad()
def velocity_without_lora(student: Any, noisy: Tensor, timestep: Tensor, text: TextTokens) -> Tensor:
    """Return the velocity (B, C, H, W) of a student before its LoRA."""
    student.disable_adapters()
    try:
        return student(noisy, timestep, text).sample.float()
    finally:
        student.enable_adapters()


def save_lora(student: Any, folder: Path, metadata: dict[str, str]) -> None:
    """Write the LoRA of a student twice: under diffusers' names and under ComfyUI's."""
    from peft import get_peft_model_state_dict

    tensors = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(student, adapter_name=ADAPTER).items()
    }
    renamed = {comfyui_name(name): tensor for name, tensor in tensors.items()}
    prefixed = {f"{DIFFUSERS_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    for name, written in ((DIFFUSERS_FILE, prefixed), (COMFYUI_FILE, renamed)):
        write_weights(folder / name, written, {"format": "pt"} | metadata)


def comfyui_name(name: str) -> str:
    """Return ComfyUI's name of a LoRA matrix: Wan's own name of its layer, behind a prefix."""
    layer, _, side = name.rpartition(".lora_")
    return f"{COMFYUI_PREFIX}{official_name(f'{layer}.weight').removesuffix('.weight')}.lora_{side}"
