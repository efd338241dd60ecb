"""A saved student on its device, and the embeddings of its prompts.

Legend: L text length, T text width.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from train_distillation import WanLiteStudent

from ..data.autoencoder import decode_latents, load_video_autoencoder, to_images
from ..data.single_frame import SingleFrameAutoencoder
from ..data.text_encoder import encode_prompts, load_text_encoder, warn_of_truncation
from ..files.file_names import RUN
from ..flow import seeded_noise
from ..pipeline import WanLitePipeline, are_finite, pad_embeddings
from ..runtime.devices import disable_cudnn_attention, drawing_dtype, free_memory, has_bfloat16
from ..schedule import read_schedule, recorded_schedule
from ..student.digest import check_digest, model_digest
from ..teacher.components import num_bytes
from ..training.run_folder import read_run

# Of the device's free memory; a larger text encoder (11 GB for a real Wan) runs on the CPU.
MAX_ENCODER_SHARE = 0.8


class StudentPipeline:
    """A saved student as a WanLitePipeline without a text encoder, and prompt embeddings.

    `weights_sha256` is the digest of the loaded weights, or the digests of all shards, sorted by name, and
    `model_sha256` that of all files that decide an image. `sha256` is the expected value of either. Prompts that are
    not in `embeddings` are encoded when they are used. `editing` are the arguments of the pipeline for an image to
    change, {} to start from noise.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "cpu",
        dtype: str | None = None,
        sha256: str | None = None,
        embeddings: dict[str, torch.Tensor] | None = None,
    ):
        disable_cudnn_attention()
        self.folder = folder
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype or drawing_dtype(self.device.type, has_bfloat16(device)))
        self.embeddings = dict(embeddings or {})
        self.editing: dict[str, Any] = {}
        self.student, loaded = WanLiteStudent.from_pretrained(
            folder, dtype=self.dtype, device=device, output_loading_info=True
        )
        self.weights_sha256 = " ".join(loaded["sha256"].values())
        self.model_sha256 = model_digest(folder, loaded["sha256"])
        check_digest(sha256, self.weights_sha256, self.model_sha256, folder)
        schedule = recorded_schedule(read_run(folder), Path(folder) / RUN)
        self.pipeline = WanLitePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=load_video_autoencoder(folder).to(device),
            scheduler=UniPCMultistepScheduler(**read_schedule(folder, schedule)),
            transformer=self.student,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pixels_per_token = self.pipeline.vae_scale_factor_spatial * self.student.config.patch_size[1]

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @cached_property
    def autoencoder(self) -> SingleFrameAutoencoder:
        """The single-frame form of the autoencoder."""
        return self.pipeline.single_frame_autoencoder(self.device)

    def embed(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Return the embedding (L, T) of each prompt; each distinct prompt is encoded once."""
        if missing := [prompt for prompt in prompts if prompt not in self.embeddings]:
            self.embeddings |= encode_once(self.folder, str(self.device), missing)
        return [self.embeddings[prompt] for prompt in prompts]

    @torch.no_grad()
    def generate(self, prompts, seeds, num_steps, height, width, guidance_scale=1.0, negative_prompt=""):
        """Return an image (height, width, 3) uint8 for each prompt and seed, None for one that is not finite."""
        negative = None
        if guidance_scale > 1:
            negative = pad_embeddings(self.embed([negative_prompt]) * len(prompts))
        stride = self.pipeline.vae_scale_factor_spatial
        latents = self.pipeline(
            prompt_embeds=pad_embeddings(self.embed(prompts)),
            negative_prompt_embeds=negative,
            height=height,
            width=width,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            latents=seeded_noise(
                (self.student.config.num_channels, height // stride, width // stride), seeds
            ),
            output_type="latent",
            **self.editing,
        ).images
        pixels = decode_latents(self.autoencoder, latents)
        images = zip(to_images(pixels), are_finite(latents, pixels))
        return [image if is_valid else None for image, is_valid in images]


def encode_once(folder: str | Path, device: str, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return {prompt: embedding (L, T) on the CPU}; the text encoder is freed afterwards.

    An encoder that does not fit on the device runs on the CPU.
    """
    tokenizer, encoder = load_text_encoder(folder, encoder_device(folder, device))
    prompts = list(prompts)
    warn_of_truncation(tokenizer, prompts, partial(print, flush=True))
    distinct = list(dict.fromkeys(prompts))
    embeddings = encode_prompts(tokenizer, encoder, distinct)
    return {prompt: embedding.cpu() for prompt, embedding in zip(distinct, embeddings)}


def encoder_device(folder: str | Path, device: str) -> str:
    """Return the device of the text encoder: the CPU if it does not fit on `device`."""
    if num_bytes(Path(folder) / "text_encoder") < MAX_ENCODER_SHARE * free_memory(device)[0]:
        return device
    print(f"the text encoder does not fit on {device} and runs on the CPU", flush=True)
    return "cpu"
