"""WanLitePipeline: prompts -> images, by the steps of a student's training.

Legend: B images, C channels, H W latent height and width, L text length, T text width.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.utils.logging import get_logger
from PIL import Image
from torch import Tensor

from ..data.autoencoder import to_images
from ..data.single_frame import SingleFrameAutoencoder
from ..files.atomic import write_json
from ..files.file_names import COMPONENTS, RUN
from ..flow import check_schedule
from ..runtime.devices import without_cudnn_attention
from ..schedule import first_step
from ..student.adapters import check_lora_fits
from ..student.location import student_folder
from .arguments import check_options, choose_size, choose_steps, recorded_defaults
from .decoding import decode_pixels, encode_pixels, fold_autoencoder, refuse_not_finite
from .denoising import EMBEDDINGS, denoise
from .editing import encode_source, read_source
from .loading import FILES, HUB, add_components, component_dtypes, pipeline_folder, place_student
from .lora_files import lora_errors, read_lora
from .text import encode_distinct, pad_embeddings

LOGGER = get_logger("diffusers.pipelines.pipeline_utils")  # of the components that diffusers loads itself


class WanLitePipeline(WanPipeline):
    """A WanPipeline for single images, whose size and number of steps are by default those of the training.

    Offloading, LoRA, `to()` and dtypes are those of diffusers. A saved pipeline is also one of a stock
    WanPipeline.
    """

    record: dict[str, Any] = {}  # content of run.json, without paths of a machine

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        sha256: str | Mapping[str, str] | None = None,
        **options: Any,
    ) -> Any:
        """Load the folder of a run, one that save_pretrained wrote, or a name on the hub.

        A single `dtype` (or `torch_dtype`) is that of the student; the text encoder keeps its own, and the
        autoencoder is in float32. {component: dtype} is as in diffusers. `sha256` is the expected digest of
        all files that decide an image, or of the student's weights; `options` are those of diffusers, such as
        components. Raises OSError for files that are missing or broken, and ValueError for content that is not a
        student's.
        """
        hub = {name: options.pop(name) for name in HUB if name in options}
        folder = student_folder(pretrained_model_name_or_path, subfolder, FILES, **hub)
        passed = {*options}
        dtypes = component_dtypes(torch_dtype if dtype is None else dtype)
        record = add_components(folder, dtypes, sha256, options)
        for name in sorted(options.keys() & {"scheduler", "transformer", *COMPONENTS} - passed):
            kind = type(options[name]).__name__
            LOGGER.info(f"Loaded {name} as {kind} from {pretrained_model_name_or_path}.")
        with pipeline_folder(folder, options) as place:
            pipeline = super().from_pretrained(str(place), **options)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        place_student(pipeline)
        pipeline.record = recorded_defaults(record)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Return a pipeline of the components of another; the defaults of a WanLitePipeline are kept."""
        made = super().from_pipe(pipeline, **kwargs)
        made.record = getattr(pipeline, "record", {})
        return made

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save a folder that stock diffusers loads, and run.json for the defaults of this class."""
        if self.record:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_json(Path(save_directory) / RUN, self.record)  # before an upload to the hub
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_json_string(self) -> str:
        """Return model_index.json with the name of the stock class, which loads without this package, and no path."""
        config = json.loads(super().to_json_string()) | {"_class_name": WanPipeline.__name__}
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,  # in addition to the distilled guidance; 1 = none
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,  # noise (B, C, H, W) or (B, C, 1, H, W)
        prompt_embeds: Tensor | None = None,  # (prompts, L, T), padded with zeros
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_frames: int = 1,
        image: Any = None,  # PIL, array (height, width, 3), tensor (3, height, width), or several; see editing.py
        mask_image: Any = None,  # white is repainted
        strength: float = 0.6,
    ) -> Any:
        """Generate images, or change `image`; unset sizes and steps are those of the training.

        Images of several generators are those that run_inference.py draws with their seeds. `output_type` is
        "pil", "np" (B, height, width, 3), "pt" (B, 3, height, width), both in 0..1, or "latent" (B, C, H, W).
        `strength`, above 0 and at most 1, is the share of the steps that change `image`; at 1, only a mask keeps it.
        Returns an ImagePipelineOutput, or a tuple. Raises FloatingPointError for images that are not finite.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        size, num_steps = self._choose(width, height, latents, num_inference_steps)
        texts = (prompt, negative_prompt), (prompt_embeds, negative_prompt_embeds)
        # The stock check of sizes is for tokens of 16 pixels only.
        self.check_inputs(*texts[0], 0, 0, *texts[1], callback_on_step_end_tensor_inputs)
        check_options(output_type, num_frames, num_images_per_prompt)
        source = read_source(image, mask_image, size)
        begin = first_step(num_steps, strength) if source else 0
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._current_timestep, self._interrupt = None, False
        embeddings = self.encode_prompt(
            *texts[0], self.do_classifier_free_guidance, num_images_per_prompt, *texts[1]
        )
        noise = self._draw_noise(len(embeddings[0]), size, generator, latents)
        edit = encode_source(source, self.encode, noise, num_images_per_prompt, begin) if source else None
        with without_cudnn_attention():
            values = dict(zip(("latents", *EMBEDDINGS), (noise, *embeddings)))
            inputs = callback_on_step_end_tensor_inputs
            final = denoise(self, values, num_steps, callback_on_step_end, inputs, edit)
            images = final if output_type == "latent" else self._to_output(final, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options: Any) -> None:
        """Load a LoRA as WanPipeline does; raises OSError or ValueError if it is broken or does not fit the student."""
        tensors = read_lora(self, source, options)
        check_lora_fits(tensors, self.transformer)
        with lora_errors("the LoRA" if isinstance(source, dict) else source):
            super().load_lora_weights(tensors, adapter_name, **options)

    # ---- arguments -----------------------------------------------------------------------------------------

    def _choose(self, width, height, latents, num_steps):
        """Return the size (width, height) in pixels and the number of steps; unset ones are those of the run."""
        stride = self.vae_scale_factor_spatial
        unit = stride * self.transformer.config.patch_size[1]
        size = choose_size(self.record, {"width": width, "height": height}, latents, stride, unit)
        num_steps = choose_steps(self.record, num_steps, self.name_or_path or "the student")
        check_schedule(self.scheduler, num_steps)
        return size, num_steps

    def _draw_noise(self, count, size, generator, latents):
        """Return noise (B, C, H, W) of the generators for images of a size, or the given latents."""
        width, height = size
        shape = (count, self.transformer.config.in_channels, height, width, 1)
        noise = self.prepare_latents(*shape, torch.float32, self._execution_device, generator, latents)
        return noise.squeeze(2)

    def prepare_latents(self, batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """Return noise (B, C, 1, H, W) of the generators, or the given latents; see WanPipeline."""
        noise = super().prepare_latents(batch_size, *args, **kwargs)
        noise = noise.unsqueeze(2) if noise.ndim == 4 else noise
        channels = self.transformer.config.in_channels
        if noise.ndim != 5 or noise.shape[:3] != (batch_size, channels, 1):
            raise ValueError(
                f"latents are {tuple(noise.shape)}, expected ({batch_size}, {channels}, height, width): one for "
                "each image."
            )
        return noise

    def _input_device(self, component):
        """Return the device of a component's input; the weights of an offloaded one are elsewhere."""
        device = self._execution_device
        return component.device if device == self.device else device

    # ---- text ----------------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings (B, L, T) of prompts and negative prompts, padded with zeros as in WanPipeline.

        Each distinct text is encoded once. Given embeddings are used unchanged.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = len(prompts) if prompt_embeds is None else len(prompt_embeds)  # type: ignore[arg-type]
        if count == 0:
            raise ValueError("prompt is an empty list, expected at least one prompt.")
        texts: list[list[str] | None] = [prompts if prompt_embeds is None else None, None]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative = negative_prompt or ""
            texts[1] = [negative] * count if isinstance(negative, str) else negative
        encoded = self._encode([text for group in texts for text in group or ()])
        found = []
        for given, group in zip((prompt_embeds, negative_prompt_embeds), texts):
            if group is not None:
                given = pad_embeddings([encoded[text] for text in group])
            if given is not None and len(given) != count:
                raise ValueError(f"there are {len(given)} negative prompts for {count} prompts.")
            found.append(self._prepare_embeddings(given, num_images_per_prompt))
        prompt_embeds, negative_prompt_embeds = found
        return prompt_embeds, negative_prompt_embeds

    def _encode(self, texts):
        """Return {text: embedding (L, T)}."""
        if not texts:
            return {}
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("the pipeline has no text encoder: pass prompt_embeds in place of prompts.")
        device = self._input_device(self.text_encoder)
        return encode_distinct(self.tokenizer, self.text_encoder, texts, device)

    def _prepare_embeddings(self, embeddings, repeats):
        if embeddings is None:
            return None
        dtype = embeddings.dtype if self.transformer is None else self.transformer.dtype
        embeddings = embeddings.to(self._execution_device, dtype)
        return embeddings.repeat_interleave(repeats, 0)

    # ---- images --------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, H, W) to pixels (B, 3, height, width) in -1..1; see decoding.py."""
        return decode_pixels(self.vae, latents.to(self._input_device(self.vae)), self.transformer.dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, height, width) in -1..1 to latents (B, C, H, W); see decoding.py."""
        return encode_pixels(self.vae, pixels.to(self._input_device(self.vae)), self.transformer.dtype)

    def single_frame_autoencoder(self, device: torch.device) -> SingleFrameAutoencoder:
        """Return the single-frame form of the autoencoder, with its own copy of the weights."""
        return fold_autoencoder(self.vae, device, self.transformer.dtype)

    def _to_output(self, latents, output_type):
        """Return images of decoded latents; raises FloatingPointError if some are not finite."""
        pixels = self.decode(latents)
        refuse_not_finite(latents, pixels, self.transformer.dtype)
        if output_type == "pil":  # as run_inference.py rounds them
            return [Image.fromarray(image) for image in to_images(pixels)]
        return self.video_processor.postprocess(pixels, output_type)
