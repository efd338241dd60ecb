"""A saved student as a diffusers pipeline: prompts -> images, in the size and the steps of its training.

    from wanlite import WanLitePipeline
    WanLitePipeline.from_pretrained("outputs/wan_t2i")("a small red ring above a blue cross").images[0]

Legend: B images, C channels, H W latent height and width, L text length, T text width.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.logging import get_logger
from PIL import Image
from torch import Tensor

from train_distillation import WanLiteStudent

from .data.autoencoder import decode_latents, load_video_autoencoder, to_images
from .data.single_frame import SingleFrameAutoencoder
from .data.text_encoder import encode_prompts, load_text_encoder, warn_of_truncation
from .files.atomic import write_json
from .files.file_names import COMPONENTS, RUN, SCHEDULER_CONFIG
from .files.json_files import read_json
from .flow import check_schedule, set_steps
from .network import TextTokens, pack_states, pack_text, unpack_text
from .runtime.devices import is_fast_in_bfloat16
from .schedule import SCHEDULER, TIMESTEPS, read_schedule, recorded_schedule
from .student.adapters import check_lora_fits
from .student.location import student_folder
from .training.run_folder import check_saved_components, read_run
from .training.sampling_defaults import check_steps, sampling_defaults, size_warning, trained_sizes

LOGGER = get_logger("diffusers.pipelines.pipeline_utils")  # of the components that diffusers loads itself
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
FILES = ("scheduler/*.json", "tokenizer/*", RUN) + tuple(  # on the hub, beside the student
    f"{component}/*.{ending}" for component in ("text_encoder", "vae") for ending in ("json", "safetensors")
)
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # arguments of a download
STOCK = ("device_map", "quantization_config", "variant")  # with these, diffusers loads the other components


class WanLitePipeline(WanPipeline):
    """A WanPipeline for single images, whose size and number of steps are by default those of the training.

    Offloading, LoRA, `to()` and dtypes are those of diffusers. A saved pipeline is also one of a stock
    WanPipeline.
    """

    record: dict[str, Any] = {}  # content of run.json

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
        the student's weights; `options` are those of diffusers, such as components. Raises OSError for files
        that are missing or broken, and ValueError for content that is not a student's.
        """
        hub = {name: options.pop(name) for name in HUB if name in options}
        folder = student_folder(pretrained_model_name_or_path, subfolder, FILES, **hub)
        if not options.keys() & {"scheduler", *COMPONENTS}:
            check_saved_components(folder)
        passed = {*options}
        dtypes = component_dtypes(torch_dtype if dtype is None else dtype)
        record = read_run(folder)
        options.setdefault("scheduler", load_scheduler(folder, recorded_schedule(record, folder / RUN)))
        has_variants = find_variants(folder, options.get("variant"))
        if "transformer" not in options:
            options["transformer"] = load_student(folder, dtypes["transformer"], sha256, options)
        if not has_variants:
            options.pop("variant", None)  # that of the student alone
        if any(options.get(name) is not None for name in STOCK):
            options["torch_dtype"] = dtypes
        else:
            load_components(folder, dtypes, options)
        for name in sorted(options.keys() & {"scheduler", "transformer", *COMPONENTS} - passed):
            kind = type(options[name]).__name__
            LOGGER.info(f"Loaded {name} as {kind} from {pretrained_model_name_or_path}.")
        pipeline = super().from_pretrained(str(folder), **options)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        place_student(pipeline)
        pipeline.record = record
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
        """Return model_index.json with the name of the stock class, which loads without this package."""
        config = json.loads(super().to_json_string()) | {"_class_name": WanPipeline.__name__}
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
    ) -> Any:
        """Generate images; unset sizes and steps are those of the training.

        Images of several generators are those that run_inference.py draws with their seeds. `output_type` is
        "pil", "np" (B, height, width, 3), "pt" (B, 3, height, width), both in 0..1, or "latent" (B, C, H, W).
        Returns an ImagePipelineOutput, or a tuple. Raises FloatingPointError for images that are not finite.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        width, height = self._choose_size(width, height, latents)
        num_steps = self._choose_steps(num_inference_steps)
        # The stock check of sizes is for tokens of 16 pixels only.
        inputs = (prompt, negative_prompt, 0, 0, prompt_embeds, negative_prompt_embeds)
        self.check_inputs(*inputs, callback_on_step_end_tensor_inputs)
        _check_options(output_type, num_frames, num_images_per_prompt)
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._current_timestep, self._interrupt = None, False
        embeddings = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_images_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
        )
        channels = self.transformer.config.in_channels
        size = (len(embeddings[0]), channels, height, width, 1)
        noise = self.prepare_latents(*size, torch.float32, self._execution_device, generator, latents)
        with without_cudnn_attention():
            values = dict(zip(("latents", *EMBEDDINGS), (noise.squeeze(2), *embeddings)))
            final = self._denoise(values, num_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
            images = final if output_type == "latent" else self._to_output(final, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options: Any) -> None:
        """Load a LoRA as WanPipeline does; raises ValueError if it does not fit the student."""
        copied = dict(source) if isinstance(source, dict) else source
        check_lora_fits(self.lora_state_dict(copied, **options), self.transformer)
        super().load_lora_weights(source, adapter_name, **options)

    # ---- arguments -----------------------------------------------------------------------------------------

    def _choose_size(self, width, height, latents):
        """Return (width, height) in pixels, by default those of the latents, or of the training."""
        defaults = sampling_defaults(self.record)
        stride = self.vae_scale_factor_spatial
        if latents is not None:
            defaults |= {"height": stride * latents.shape[-2], "width": stride * latents.shape[-1]}
        sizes = {"width": width, "height": height}
        sizes = {name: defaults[name] if size is None else size for name, size in sizes.items()}
        unit = stride * self.transformer.config.patch_size[1]
        for name, size in sizes.items():
            if type(size) is not int or size < 1 or size % unit:
                nearest = max(unit, round(size / unit) * unit) if type(size) is int else unit
                raise ValueError(f"{name} {size!r} is not divisible by {unit}; the nearest is {nearest}.")
            if latents is not None and size != defaults[name]:
                raise ValueError(
                    f"{name} is {size}, but latents {tuple(latents.shape)} are of {defaults[name]} pixels."
                )
        trained = trained_sizes(self.record, unit, RUN)
        if text := size_warning((sizes["width"], sizes["height"]), trained, "width={}, height={}"):
            warnings.warn(text, stacklevel=4)
        return sizes["width"], sizes["height"]

    def _choose_steps(self, num_steps):
        """Return the number of steps, by default that of the run."""
        if num_steps is None:
            num_steps = sampling_defaults(self.record)["num_inference_steps"]
        if type(num_steps) is not int or not 0 < num_steps <= TIMESTEPS:
            raise ValueError(
                f"num_inference_steps is {num_steps!r}, expected a whole number from 1 to {TIMESTEPS}."
            )
        schedule = recorded_schedule(self.record, RUN)
        check_steps(num_steps, schedule, self.name_or_path or "the student", "num_inference_steps")
        check_schedule(self.scheduler, num_steps)
        return num_steps

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
        warn_of_truncation(self.tokenizer, texts, lambda text: warnings.warn(text, stacklevel=6))
        distinct = list(dict.fromkeys(texts))
        device = self._input_device(self.text_encoder)
        embeddings = encode_prompts(self.tokenizer, self.text_encoder, distinct, device=device)
        return dict(zip(distinct, embeddings))

    def _prepare_embeddings(self, embeddings, repeats):
        if embeddings is None:
            return None
        dtype = embeddings.dtype if self.transformer is None else self.transformer.dtype
        embeddings = embeddings.to(self._execution_device, dtype)
        return embeddings.repeat_interleave(repeats, 0)

    def _pack(self, embeddings):
        """Return embeddings (B, L, T) as the transformer takes them: a student needs no padding."""
        if embeddings is None or not _is_student(self.transformer):
            return embeddings
        return pack_embeddings(embeddings).to(embeddings.device, embeddings.dtype)

    # ---- sampling ------------------------------------------------------------------------------------------

    def _denoise(self, values, num_steps, callback, callback_inputs):
        """Return the last latents (B, C, H, W); `values` are {name: tensor}, which the callback may replace."""
        texts = {name: self._pack(values[name]) for name in EMBEDDINGS}
        states = set_steps(self.scheduler, num_steps, values["latents"].device)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(states)
        with self.progress_bar(total=len(states)) as progress:
            for index, (timestep, _) in enumerate(states):
                if self.interrupt:
                    break
                self._current_timestep = timestep
                velocity = self._guided_velocity(values["latents"], timestep, *texts.values())
                values["latents"] = self.scheduler.step(
                    velocity, timestep, values["latents"], return_dict=False
                )[0]
                if callback is not None:
                    changed = callback(
                        self, index, timestep, {name: values[name] for name in callback_inputs}
                    )
                    values |= {name: changed[name] for name in values if name in changed}
                    texts |= {name: self._pack(changed[name]) for name in EMBEDDINGS if name in changed}
                progress.update()
        self._current_timestep = None
        return values["latents"]

    def _guided_velocity(self, latents, timestep, text, negative):
        """Return the velocity (B, C, H, W) in float32, with guidance if there is a negative text."""
        velocity = self._velocity("cond", latents, timestep, text)
        if negative is None or not self.do_classifier_free_guidance:
            return velocity
        negative_velocity = self._velocity("uncond", latents, timestep, negative)
        return negative_velocity + self.guidance_scale * (velocity - negative_velocity)

    def _velocity(self, name, latents, timestep, text):
        with self.transformer.cache_context(name):
            return (
                self.transformer(
                    hidden_states=latents.to(self.transformer.dtype).unsqueeze(2),
                    timestep=timestep.float().expand(len(latents)),
                    encoder_hidden_states=text,
                    attention_kwargs=self.attention_kwargs,
                    return_dict=False,
                )[0]
                .squeeze(2)
                .float()
            )

    # ---- images --------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, H, W) to pixels (B, 3, height, width) in -1..1.

        The autoencoder's layers are those of a single frame, unless it is tiled or of another class. After a
        student in bfloat16 they compute in bfloat16 where that is fast.
        """
        device = self._input_device(self.vae)
        is_stock = type(self.vae) is AutoencoderKLWan
        if not is_stock or self.vae.use_tiling:
            return self._decode_in_stock(latents.to(device))
        return apply_forward_hook(self._decode_single_frames)(self.vae, latents.float().to(device))

    def _decode_in_stock(self, latents):
        config = self.vae.config
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        raw_latents = (latents * std + mean).unsqueeze(2).to(self.vae.dtype)
        return self.vae.decode(raw_latents, return_dict=False)[0].squeeze(2).float().clamp(-1, 1)

    def _decode_single_frames(self, vae, latents):
        return decode_latents(self.single_frame_autoencoder(latents.device), latents)

    def single_frame_autoencoder(self, device: torch.device) -> SingleFrameAutoencoder:
        """Return the single-frame form of the autoencoder, with its own copy of the weights."""
        is_half = self.transformer.dtype == torch.bfloat16 and is_fast_in_bfloat16(device)
        dtype = torch.bfloat16 if is_half and self.vae.dtype == torch.float32 else self.vae.dtype
        return SingleFrameAutoencoder(_with_weights(self.vae)).to(device, dtype)

    def _to_output(self, latents, output_type):
        """Return images of decoded latents; raises FloatingPointError if some are not finite."""
        pixels = self.decode(latents)
        if numbers := [number for number, is_valid in enumerate(are_finite(latents, pixels)) if not is_valid]:
            raise FloatingPointError(
                f"images are not finite in {self.transformer.dtype}: {len(numbers)} of {len(pixels)}, first "
                f"number {numbers[0]}. Load the pipeline with dtype=torch.float32."
            )
        if output_type == "pil":  # as run_inference.py rounds them
            return [Image.fromarray(image) for image in to_images(pixels)]
        return self.video_processor.postprocess(pixels, output_type)


# ---- loading -----------------------------------------------------------------------------------------------


def component_dtypes(dtype: Any) -> dict[str, Any]:
    """Return {component: dtype or None for the saved one} of a `dtype` argument."""
    if isinstance(dtype, Mapping):
        default = dtype.get("default", torch.float32)
        return {"transformer": default, "text_encoder": default, "vae": default} | dict(dtype)
    return {"transformer": dtype, "text_encoder": None, "vae": torch.float32}


def load_scheduler(folder: Path, schedule: dict[str, Any]) -> Any:
    """Return the scheduler of a student, checked against the `schedule` of its training.

    Another class of scheduler for flow matching, which a pipeline was saved with, loads unchecked.
    """
    import diffusers

    config = read_json(folder / "scheduler" / SCHEDULER_CONFIG)
    name = str(config.get("_class_name"))
    is_flow = "FlowMatch" in name or config.get("use_flow_sigmas") is True
    if name != SCHEDULER and is_flow and hasattr(getattr(diffusers, name, None), "set_timesteps"):
        return getattr(diffusers, name).from_pretrained(folder / "scheduler", local_files_only=True)
    return UniPCMultistepScheduler(**read_schedule(folder, schedule))


def find_variants(folder: Path, variant: str | None) -> bool:
    """Whether components beside the student have weights of a variant; raises ValueError if no weights are of it."""
    if variant is None:
        return False
    files = [path for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}.safetensors")]
    names = [path.parent.name for path in files if f".{variant}" in path.name]
    if not names:
        raise ValueError(
            f"You are trying to load the model files of the `variant={variant}`, but no such modeling files are "
            f"available in {folder}."
        )
    return bool({*names} & {*COMPONENTS})


def load_student(folder: Path, dtype: Any, sha256: Any, options: Mapping[str, Any]) -> WanLiteStudent:
    """Load the student of a folder; `options` are those of the pipeline that apply to it."""
    config = options.get("quantization_config")
    named = {*(getattr(config, "components_to_quantize", None) or ())} | {
        *(getattr(config, "quant_mapping", None) or ())
    }
    if config is not None and (not named or "transformer" in named):
        raise ValueError(
            "quantization_config includes the transformer: quantise the student after loading it, and name the "
            'text encoder alone in components_to_quantize=["text_encoder"].'
        )
    device = options.get("device_map")
    passed = {
        name: options[name] for name in ("variant", "use_safetensors", "disable_mmap") if name in options
    }
    return WanLiteStudent.from_pretrained(
        folder, dtype=dtype, device=None if device == "balanced" else device, sha256=sha256, **passed
    )


def load_components(folder: Path, dtypes: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Add text encoder, tokenizer and autoencoder to `options`, checked, unless they were passed."""
    if not options.keys() & {"text_encoder", "tokenizer"}:
        options["tokenizer"], options["text_encoder"] = load_text_encoder(
            folder, "cpu", dtypes["text_encoder"]
        )
    if "vae" not in options:
        # The method of diffusers would warn of its list of layers in float32, which is empty here.
        options["vae"] = torch.nn.Module.to(load_video_autoencoder(folder).eval(), dtypes["vae"])


def place_student(pipeline: WanLitePipeline) -> None:
    """Move the student to its device of a device map; diffusers places the components that it loads only."""
    places = getattr(pipeline, "hf_device_map", None)
    if isinstance(places, dict) and "transformer" in places:
        pipeline.transformer.to(places["transformer"])


# ---- functions of tensors ----------------------------------------------------------------------------------


def pad_embeddings(embeddings: Sequence[Tensor]) -> Tensor:
    """Return embeddings, a list of (length, T), padded with zeros as in diffusers: (B, L, T)."""
    return unpack_text(pack_text(embeddings))


def pack_embeddings(embeddings: Tensor) -> TextTokens:
    """Return embeddings (B, L, T), padded with zeros, as TextTokens of their true lengths, on the CPU."""
    positions = torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device)
    lengths = (embeddings.ne(0).any(-1) * positions).amax(1).cpu()
    return pack_states(embeddings[:, : max(1, int(lengths.max()))].cpu(), lengths, embeddings.shape[1])


def are_finite(latents: Tensor, pixels: Tensor) -> list[bool]:
    """Return for each image whether its latents and pixels are finite."""
    return [
        bool(torch.isfinite(each).all() and torch.isfinite(image).all())
        for each, image in zip(latents, pixels)
    ]


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Use the attention kernels of run_inference.py; see runtime.devices.disable_cudnn_attention()."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def _check_options(output_type, num_frames, num_images):
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}.")
    if num_frames != 1:
        raise ValueError(f"num_frames is {num_frames}; the student generates single frames. Leave it out.")
    if type(num_images) is not int or num_images < 1:
        raise ValueError(f"num_images_per_prompt is {num_images!r}, expected a whole number, at least 1.")


def _is_student(transformer):
    return isinstance(getattr(transformer, "_orig_mod", transformer), WanLiteStudent)


def _with_weights(vae):
    """Return the autoencoder itself, or a copy of one whose weights are offloaded layer by layer."""
    if not any(tensor.is_meta for tensor in vae.parameters()):
        return vae
    with init_empty_weights():
        copy = AutoencoderKLWan.from_config(vae.config)
    copy.load_state_dict(get_state_dict_offloaded_model(vae), assign=True)
    return copy
