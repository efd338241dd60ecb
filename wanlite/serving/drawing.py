"""Jobs -> images of one student that stays in memory, with its text encoder.

Legend: L text length, T text width.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data.text_encoder import encode_prompts, load_text_encoder, warn_of_truncation
from ..files.image_files import COMPRESS_LEVEL
from ..generation.images import FLAT_ADVICE, is_flat
from .requests import Job

MAX_EMBEDDINGS = 64  # kept; one of 512 tokens of a real UMT5 has 8 MB


class Drawn(NamedTuple):
    """An image (height, width, 3) uint8, or None if it was not finite, and its PNG text chunks."""

    job: Job
    image: np.ndarray | None
    info: PngInfo
    warnings: tuple[str, ...]


class PromptEncoder:
    """The text encoder of a saved student; a prompt's embedding does not depend on prompts beside it."""

    def __init__(self, folder: str | Path, device: str):
        self.tokenizer, self.encoder = load_text_encoder(folder, device)
        self._found: OrderedDict[str, tuple[Any, list[str]]] = OrderedDict()

    def encode(self, prompt: str) -> tuple[Any, list[str]]:
        """Return the embedding (L, T) of a prompt on the CPU, and the warnings for it."""
        if prompt not in self._found:
            warnings: list[str] = []
            warn_of_truncation(self.tokenizer, [prompt], warnings.append)
            (embedding,) = encode_prompts(self.tokenizer, self.encoder, [prompt])
            texts = [text.removeprefix("WARNING: ") for text in warnings]
            self._found[prompt] = embedding.cpu(), texts
            if len(self._found) > MAX_EMBEDDINGS:
                self._found.popitem(last=False)
        self._found.move_to_end(prompt)
        return self._found[prompt]


class ServedStudent:
    """Draws batches with a StudentPipeline.

    `describe` returns the PNG text chunks of (job, images in its batch).
    """

    def __init__(
        self,
        pipeline: Any,
        encoder: PromptEncoder,
        describe: Callable[[Job, int], PngInfo],
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
    ):
        self.pipeline, self.encoder, self.describe = pipeline, encoder, describe
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt

    def draw(self, jobs: Sequence[Job]) -> list[Drawn]:
        """Return the image of each job; all are of one shape."""
        prompts = [job.prompt for job in jobs]
        encoded = {prompt: self.encoder.encode(prompt) for prompt in {*prompts, self.negative_prompt}}
        self.pipeline.embeddings = {prompt: embedding for prompt, (embedding, _) in encoded.items()}
        num_steps, width, height = jobs[0].shape
        images = self.pipeline.generate(
            prompts,
            [job.seed for job in jobs],
            num_steps,
            height,
            width,
            self.guidance_scale,
            self.negative_prompt,
        )
        return [
            Drawn(job, image, self.describe(job, len(jobs)), (*encoded[job.prompt][1], *flaws(image)))
            for job, image in zip(jobs, images)
        ]


def flaws(image: np.ndarray | None) -> tuple[str, ...]:
    """Return warnings about an image; None is one that was not finite."""
    if image is None:
        return ("the image is not finite and was left out; another --dtype may help.",)
    if is_flat(image):
        return (f"the image is one flat colour. {FLAT_ADVICE}",)
    return ()


def to_png(image: np.ndarray, info: PngInfo) -> bytes:
    """Return the PNG file of an image (height, width, 3) uint8 with its text chunks."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", pnginfo=info, compress_level=COMPRESS_LEVEL)
    return file.getvalue()
