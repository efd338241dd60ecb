"""Flow matching of LoRA matrices on latents of captioned images.

    noisy = (1 - noise_level) * clean + noise_level * noise      loss = |student(noisy) - (noise - clean)|^2

Noise levels are uniform, then shifted as in the student's schedule. Legend: B batch, C channels, H W latent height
and width, L text length, T text width.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.autoencoder import encode_images, load_autoencoder, to_pixels
from ..data.images import CaptionedImage, read_image
from ..data.text_encoder import encode_prompts, load_text_encoder
from ..flow import add_noise, shift_noise_level
from ..network import TextTokens, pack_text
from ..schedule import TIMESTEPS
from ..student.saving import write_weights
from ..teacher.keys import official_name
from ..training.losses import velocity_loss

ADAPTER = "default"
DIFFUSERS_FILE, COMFYUI_FILE = "pytorch_lora_weights.safetensors", "comfyui.safetensors"
DIFFUSERS_PREFIX, COMFYUI_PREFIX = "transformer.", "diffusion_model."
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")  # of every block

Groups = list[tuple[Tensor, list[Tensor]]]  # latents (B, C, H, W) and texts (L, T) of the images of one size


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


def batches(groups: Groups, batch_size: int, seed: int) -> Iterator[tuple[Tensor, TextTokens]]:
    """Yield batches without end, each of one size; sizes are drawn by their number of images."""
    random = np.random.default_rng(seed)
    counts = np.array([len(latents) for latents, _ in groups])
    while True:
        latents, texts = groups[random.choice(len(groups), p=counts / counts.sum())]
        rows = random.choice(len(latents), min(batch_size, len(latents)), replace=False).tolist()
        yield latents[rows], pack_text([texts[row] for row in rows])


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
    groups: Groups,
    shift: float,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """Train the LoRA matrices of a student in place; yields the loss of every step."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    for _, (clean, text) in zip(range(num_steps), batches(groups, batch_size, seed)):
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        level = shift_noise_level(torch.rand(len(clean), generator=generator), shift).to(clean.device)
        noisy = add_noise(clean, noise, level)
        velocity = student(noisy, TIMESTEPS * level, text).sample
        loss = velocity_loss(velocity.float(), noise - clean).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield loss.item()


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
