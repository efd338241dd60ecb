"""Generate images with a saved student: load it, without a teacher, sample, and write PNG files.

    python run_inference.py                                              # ./outputs/wan_t2i, the run's own validation prompts
    python run_inference.py --prompt "a small red circle at the left on a white background" --num_images_per_prompt 4
    python run_inference.py --model DIR --prompts_file prompts.txt --device cuda --dtype bfloat16
    python run_inference.py --model DIR --web      # a page to draw with, in a browser; --serve is an HTTP server

The text chunks of each PNG file store the settings of the image: prompt, seed, steps, guidance, size, dtype, and the
model's sha256.
"""

import gc
import hashlib
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from wanlite.data.images import read_image_file
from wanlite.data.prompts import read_prompts
from wanlite.data.tables import check_text
from wanlite.files.file_names import CONFIG, RUN
from wanlite.files.json_files import DOWNLOADED, read_json
from wanlite.planning.settings import make_parser, setting
from wanlite.runtime.terminal import keep_output_open, one_line
from wanlite.schedule import TIMESTEPS, first_step, read_schedule, recorded_schedule
from wanlite.student.digest import model_digest
from wanlite.student.loading import open_student
from wanlite.student.location import student_folder
from wanlite.teacher.components import num_bytes
from wanlite.training.run_folder import check_saved_components, read_run
from wanlite.training.sampling_defaults import check_steps, sampling_defaults, size_warning, trained_sizes

MAX_COLUMNS = 16  # of a grid with a row per prompt
MAX_NAMED = 6  # files in a warning
MAX_PROMPT = 80  # characters of a prompt in the list of files
MAX_FLAT = 1  # largest standard deviation of a channel, of 255, in an image of one flat colour
# Of the device's free memory; a larger text encoder (11 GB for a real Wan) runs on the CPU.
MAX_ENCODER_SHARE = 0.8
# Pixels of a batch, by type of device: more would not be faster.
MAX_BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**22}
MAX_BATCH_SHARE = 0.5  # of the device's free memory
SERVING_FLAGS = ("host", "port", "token", "queue_size")  # with --web or --serve
STRENGTH = 0.6  # of an image to change
QUEUE_SIZE = 32  # images; MAX_QUEUE as well
MAX_QUEUE = 10_000
BYTES_PER_PIXEL = 2000  # of a batch, with a margin: a student of 1024 x 16 in float32, and its images


@dataclass(frozen=True)
class Settings:
    model: str = setting(
        "./outputs/wan_t2i",
        "folder of a saved student",
        group="student and prompts",
        is_path=True,
        brief=True,
    )
    prompt: list[str] | None = setting(
        None, "prompt, can be repeated (default: the validation prompts of the run)", brief=True
    )
    prompts_file: str | None = setting(
        None,
        "text file with one prompt per line, instead of --prompt (default: none)",
        is_path=True,
        brief=True,
    )
    negative_prompt: str = setting(
        "", "prompt that guidance steers away from, with --guidance_scale above 1 (default: empty)"
    )
    num_inference_steps: int | None = setting(
        None, "sampling steps (default: from the student's run)", group="sampling", brief=True
    )
    guidance_scale: float = setting(
        1.0, "guidance in addition to the guidance distilled into the student; 1 = none"
    )
    height: int | None = setting(None, "pixels, divisible by 16 (default: as in training)", brief=True)
    width: int | None = setting(None, "pixels, divisible by 16 (default: as in training)", brief=True)
    seed: int = setting(0, "seed of the first image; each further image takes the next", brief=True)
    num_images_per_prompt: int = setting(1, "images for each prompt", brief=True)
    batch_size: int | None = setting(
        None, "images per batch; it may change the last bit of an image (default: as many as fit)"
    )
    image: str | None = setting(
        None,
        "JPEG, PNG or WebP file to change, of the size that is drawn (default: start from noise)",
        group="image to change",
        is_path=True,
    )
    strength: float | None = setting(
        None,
        "share of the steps that change --image, above 0 and at most 1; a larger one keeps less (default: 0.6)",
    )
    mask: str | None = setting(
        None,
        "image file of the size of --image: white is repainted, black is kept (default: change all)",
        aliases=("--mask_image",),
        is_path=True,
    )
    output_dir: str = setting(
        "./outputs/pictures", "folder for the PNG files", group="output and device", is_path=True, brief=True
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:N or mps (default: cuda if available, else cpu)", brief=True
    )
    dtype: str | None = setting(
        None,
        "dtype of the student (default: bfloat16 on GPUs that support it, else float32)",
        choices=("float32", "float16", "bfloat16"),
    )
    keep_embeddings: bool = setting(
        True, "keep the embeddings of prompts in ~/.cache/wanlite, if the text encoder has more than 1 GB"
    )
    sha256: str | None = setting(
        None,
        "refuse a model with another digest, of its weights or of all files that decide an image; every PNG records "
        "both (default: accept all)",
    )
    web: bool = setting(
        False, "serve a page to draw with; needs the extra wanlite[web]", group="page and server"
    )
    serve: bool = setting(
        False, "serve images over HTTP, as the OpenAI API has it; needs the extra wanlite[web]"
    )
    host: str | None = setting(
        None, "address to serve at; one that other machines reach needs a token (default: 127.0.0.1)"
    )
    port: int | None = setting(None, "port to serve at; 0 = any free one (default: 8000)")
    token: str | None = setting(
        None,
        "secret that requests must send; others see flags (default: the variable WANLITE_TOKEN, or none)",
    )
    queue_size: int | None = setting(
        None, "images that wait at most; requests beyond are refused (default: 32)"
    )


def read_settings(arguments: list[str] | None = None) -> tuple[Settings, list[str]]:
    """Read and check the command line without importing torch; returns the completed settings and the prompts."""
    parser = make_parser(Settings, __doc__, repeatable=("prompt",))
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        settings, prompts = complete(settings)
    except (OSError, ValueError) as error:
        parser.refuse(one_line(str(error)))
    return settings, prompts


def complete(settings: Settings) -> tuple[Settings, list[str]]:
    """Complete settings from the saved run; raises OSError or ValueError if they cannot generate an image."""
    check_serving(settings)
    folder = student_folder(settings.model, accepts_hub=False)
    with open_student(folder) as (config, _):
        run = read_run(folder)
    schedule = recorded_schedule(run, folder / RUN)
    check_saved_components(folder)
    prompts = choose_prompts(settings, run, folder)
    filled: dict[str, Any] = {
        name: default if getattr(settings, name) is None else getattr(settings, name)
        for name, default in sampling_defaults(run).items()
    }
    settings = replace(settings, model=str(folder), **filled)
    check_numbers(settings, len(prompts))
    check_steps(filled["num_inference_steps"], schedule, folder, "--num_inference_steps")
    read_schedule(folder, schedule)
    trained_sizes(run, check_image_size(settings, folder, config), folder / RUN)
    settings = complete_editing(settings)
    check_output_dir(Path(settings.output_dir))
    check_device_and_guidance(settings)
    return settings, prompts


def check_serving(settings: Settings) -> None:
    """Raise ValueError for flags of --web and --serve without them, a missing library or a wrong address."""
    flags = [flag for flag in ("web", "serve") if getattr(settings, flag)]
    if not flags:
        for name in SERVING_FLAGS:
            if getattr(settings, name) is not None:
                raise ValueError(f"--{name} is used with --web or --serve only; add one, or leave it out.")
        return
    from wanlite.serving.launch import check_libraries, choose_address  # imported where they are used only

    for flag in flags:
        check_libraries(flag)
    choose_address(settings.host, settings.port, settings.token)
    if settings.queue_size is not None and not 0 < settings.queue_size <= MAX_QUEUE:
        raise ValueError(f"--queue_size is {settings.queue_size}, expected 1 to {MAX_QUEUE}.")


def complete_editing(settings: Settings) -> Settings:
    """Complete --strength; raises OSError or ValueError for an image or a mask that cannot be used."""
    if settings.image is None:
        for name in ("strength", "mask"):
            if getattr(settings, name) is not None:
                raise ValueError(f"--{name} is used with --image only; add one, or leave it out.")
        return settings
    if settings.web or settings.serve:
        raise ValueError("--image is not used with --web or --serve; leave it out.")
    strength = STRENGTH if settings.strength is None else settings.strength
    first_step(settings.num_inference_steps or 0, strength, "--strength")
    read_editing(settings)
    return replace(settings, strength=strength)


def read_editing(settings: Settings) -> dict[str, Any]:
    """Return the arguments of a WanLitePipeline for --image, {} without; raises OSError or ValueError."""
    if settings.image is None:
        return {}
    found = {"image": read_image_file(settings.image, "--image")}
    if settings.mask is not None:
        found["mask_image"] = read_image_file(settings.mask, "--mask")
    for name, image in found.items():
        if image.size != (settings.width, settings.height):
            flag, path = ("--image", settings.image) if name == "image" else ("--mask", settings.mask)
            raise ValueError(
                f"{flag} {path} is {image.width} x {image.height}, expected {settings.width} x {settings.height}. "
                "Resize it, or add its --width and --height."
            )
    return found | {"strength": settings.strength}


def check_device_and_guidance(settings: Settings) -> None:
    """Raise ValueError for an unknown device, or for a negative prompt without guidance."""
    if settings.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", settings.device):
        raise ValueError(f"--device {settings.device} is unknown, expected cpu, cuda, cuda:N or mps.")
    if settings.negative_prompt and settings.guidance_scale <= 1:
        raise ValueError(
            "--negative_prompt is used by guidance only; add --guidance_scale above 1 or leave it out."
        )


def check_numbers(settings: Settings, num_prompts: int) -> None:
    """Raise ValueError for counts, seeds or guidance out of range, from flags or from run.json."""
    names = ["num_inference_steps", "num_images_per_prompt"]
    names += ["batch_size"] if settings.batch_size is not None else []
    for name in names:
        if type(getattr(settings, name)) is not int or getattr(settings, name) < 1:
            raise ValueError(f"--{name} is {getattr(settings, name)!r}, expected a whole number, at least 1.")
    if (settings.num_inference_steps or 0) > TIMESTEPS:
        raise ValueError(
            f"--num_inference_steps is {settings.num_inference_steps}, expected at most {TIMESTEPS}."
        )
    last = settings.seed + num_prompts * settings.num_images_per_prompt - 1
    if settings.seed < 0 or last >= 2**63:
        raise ValueError(
            f"--seed {settings.seed}: the seeds of all images must lie in 0..2**63 - 1; choose another."
        )
    if not math.isfinite(settings.guidance_scale) or settings.guidance_scale < 1:
        raise ValueError(f"--guidance_scale is {settings.guidance_scale}, expected 1 (none) or more.")


def check_image_size(settings: Settings, folder: Path, config: dict) -> int:
    """Return the side of a token in pixels; raises ValueError for sizes that are not multiples of it or too large."""
    try:
        vae = read_json(folder / "vae" / CONFIG, DOWNLOADED)
        stride = int(vae.get("scale_factor_spatial") or 8)
        token = stride * int(config.get("patch_size", (1, 2, 2))[1])
        largest = token * int(config.get("rope_max_seq_len", 1024))
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        raise ValueError(
            f"{folder}: {CONFIG} or vae/{CONFIG} lacks the patch size, the stride or the largest size. Copy the "
            "folder again."
        ) from None
    if token < 1:
        raise ValueError(
            f"{folder}: {CONFIG} has a patch of {token} pixels, expected at least 1. Copy the folder again."
        )
    for name in ("height", "width"):
        pixels = getattr(settings, name)
        if type(pixels) is not int or pixels <= 0 or pixels % token:
            nearest = max(token, round(pixels / token) * token) if type(pixels) is int else token
            raise ValueError(f"--{name} {pixels!r} is not divisible by {token}; the nearest is {nearest}.")
        if pixels > largest:
            raise ValueError(
                f"--{name} {pixels} is more than this student's rotary tables allow, at most {largest}."
            )
    return token


def check_output_dir(output: Path) -> None:
    """Raise OSError for a path where a folder cannot be created."""
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not place.is_dir():
        raise OSError(
            f"--output_dir {output}: {place} is a file, expected a folder. Name another --output_dir."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"--output_dir {output}: {place} cannot be written to. Name another --output_dir.")


def choose_prompts(settings: Settings, run: dict, folder: Path) -> list[str]:
    """Return the prompts of the command line, by default the validation prompts of the run."""
    if settings.prompt is not None and settings.prompts_file is not None:
        raise ValueError("--prompt and --prompts_file were both given; choose one.")
    if settings.prompts_file is not None:
        return read_prompts(settings.prompts_file, print)
    prompts = settings.prompt if settings.prompt is not None else run.get("validation_prompts", [])
    if (settings.web or settings.serve) and not prompts:
        return []
    if (
        not prompts
        or not isinstance(prompts, list)
        or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    ):
        raise ValueError(
            f'no prompt: {folder / RUN} has no validation prompts, or --prompt is empty. Add --prompt "...".'
        )
    for prompt in prompts:
        check_text(prompt, f"{folder / RUN}: a validation prompt")
    return prompts


if __name__ == "__main__":  # arguments and paths are checked before torch is imported, which takes seconds
    keep_output_open()
    gc.disable()  # imports create a million objects that are never freed
    # Ctrl-C ends the program at once, without a traceback; images on disk are complete.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # For both variables, see train_distillation.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    SETTINGS, PROMPTS = read_settings()

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from tqdm import tqdm

from train_distillation import WanLiteStudent
from wanlite.data.autoencoder import load_video_autoencoder, to_images
from wanlite.data.grids import MAX_CELLS, Grid, draw_grid
from wanlite.data.kept_embeddings import encode_or_read
from wanlite.data.text_encoder import encode_prompts, load_text_encoder, warn_of_truncation
from wanlite.files.image_files import grid_names, image_names, save_image
from wanlite.flow import seeded_noise, set_steps
from wanlite.pipeline import WanLitePipeline, are_finite, pad_embeddings
from wanlite.runtime.devices import disable_cudnn_attention, drawing_dtype, free_memory, has_bfloat16
from wanlite.serving.requests import MAX_IMAGES, Limits


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

    @property
    def autoencoder(self) -> Any:
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
        pixels = self.pipeline.decode(latents)
        images = zip(to_images(pixels), are_finite(latents, pixels))
        return [image if is_valid else None for image, is_valid in images]


def check_digest(expected: str | None, weights: str, model: str, folder: str | Path) -> None:
    """Raise ValueError for a model that was not expected."""
    if expected is not None and expected.lower() not in (weights, model):
        raise ValueError(
            f"{folder}: sha256 is {weights} (weights) and {model} (all files that decide an image), expected "
            f"{expected!r:.70}. This is not the pinned model."
        )


class Generated(NamedTuple):
    """A generated image; `path` is None if it was not finite and therefore not written."""

    prompt: str
    seed: int
    path: Path | None
    is_flat: bool = False


def generate_all(
    pipeline: StudentPipeline, settings: Settings, prompts: list[str]
) -> tuple[list[Generated], list]:
    """Generate and write an image for each of `prompts`; returns them and the first MAX_CELLS arrays."""
    seeds = range(settings.seed, settings.seed + len(prompts))
    batch_size = settings.batch_size or choose_batch_size(settings, pipeline.device)
    generated: list[Generated] = []
    cells: list = []
    # The thread writes a batch while the next one is drawn.
    progress = tqdm(total=len(prompts), desc="generating", unit="image", disable=len(prompts) == 1)
    with ThreadPoolExecutor(1) as writer, progress:
        written: Future | None = None
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, min(start + batch_size, len(prompts)))
            images = pipeline.generate(
                prompts[batch],
                seeds[batch],
                settings.num_inference_steps,
                settings.height,
                settings.width,
                settings.guidance_scale,
                settings.negative_prompt,
            )
            generated += written.result() if written else []
            jobs = list(zip(prompts[batch], seeds[batch], images))
            written = writer.submit(write_images, settings, jobs, digests_of(pipeline))
            cells += [image for image in images if image is not None][: MAX_CELLS - len(cells)]
            progress.update(len(images))
        generated += written.result() if written else []
    return generated, cells


def choose_batch_size(settings: Settings, device: torch.device) -> int:
    """Return the number of images that are drawn together: small ones are faster so, and memory is the limit."""
    pixels = (settings.height or 1) * (settings.width or 1)
    most = MAX_BATCH_PIXELS.get(device.type, MAX_BATCH_PIXELS["cpu"])
    return max(1, min(most, fitting_pixels(device)) // pixels)


def fitting_pixels(device: torch.device) -> int:
    """Return the pixels of the images that fit in the device's free memory together."""
    return int(MAX_BATCH_SHARE * free_memory(device)[0]) // BYTES_PER_PIXEL


def digests_of(pipeline: StudentPipeline) -> dict[str, str]:
    """Return the digests of the loaded model, and those of an image to change, as an image records them."""
    names = ("weights_sha256", "model_sha256")
    return {name: getattr(pipeline, name) for name in names} | {
        f"{name}_sha256": hashlib.sha256(image.tobytes()).hexdigest()
        for name, image in pipeline.editing.items()
        if name != "strength"
    }


def write_images(settings: Settings, jobs: list[tuple], digests: dict[str, str]) -> list[Generated]:
    """Write the images of a batch of (prompt, seed, image or None), in this order."""
    written = []
    for prompt, seed, image in jobs:
        if image is None:
            written.append(Generated(prompt, seed, None))
            continue
        path = save_image(
            image,
            settings.output_dir,
            image_names(settings.output_dir, prompt, seed),
            text_chunks(replace(settings, batch_size=len(jobs)), prompt, seed, digests),
        )
        written.append(Generated(prompt, seed, path, bool(image.std(axis=(0, 1)).max() < MAX_FLAT)))
    return written


def text_chunks(settings: Settings, prompt: str | None, seed: int | None, digests: dict[str, str]) -> PngInfo:
    """Return the PNG text chunks with the settings of an image, or of several with neither prompt nor seed.

    They contain no path of this machine: images are published.
    """
    info = PngInfo()
    values = {
        "prompt": prompt,
        "seed": seed,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "strength": settings.strength,
        "height": settings.height,
        "width": settings.width,
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "model": Path(settings.model).name,
        **digests,
    }
    for name, value in values.items():
        if value is not None:
            info.add_itxt(name, str(value))
    return info


def flat_warning(written: list[Generated]) -> str | None:
    """Return a warning if images are one flat colour, else None."""
    flat = [each.path.name for each in written if each.path and each.is_flat]
    if not flat:
        return None
    named = ", ".join(flat[:MAX_NAMED])
    if len(flat) > MAX_NAMED:
        named += f" and {len(flat) - MAX_NAMED} more"
    advice = ""
    if len(flat) == len(written):
        advice = ". The student is likely untrained, or its steps or size differ from the trained ones"
    verb = "is" if len(flat) == 1 else "are"
    return f"{len(flat)} of {len(written)} images {verb} one flat colour: {named}{advice}."


def refuse_not_finite(generated: list[Generated], dtype: str) -> None:
    """Raise FloatingPointError if an image was not finite; all others are written before."""
    if seeds := [each.seed for each in generated if each.path is None]:
        named = ", ".join(map(str, seeds[:MAX_NAMED])) + (", ..." if len(seeds) > MAX_NAMED else "")
        advice = "Train again." if dtype == "float32" else "Add --dtype float32, or train again."
        raise FloatingPointError(
            f"{len(seeds)} of {len(generated)} images are not finite in {dtype} and were not written (seed "
            f"{named}). {advice}"
        )


def choose_device(wanted: str | None) -> str:
    """Return the device of --device, by default CUDA if available; raises ValueError if it is missing."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    number = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and number >= torch.cuda.device_count():
        raise ValueError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices. Leave the flag out, or name "
            f"cpu."
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: not available on this machine. Leave the flag out, or name cpu.")
    return wanted


def main(settings: Settings, prompts: list[str]) -> None:
    """Generate and write all images."""
    device = choose_device(settings.device)
    output = Path(settings.output_dir)
    run = read_run(settings.model)
    jobs = [prompt for prompt in prompts for _ in range(settings.num_images_per_prompt)]
    reason = "" if settings.device or device != "cpu" else " (no CUDA device was found)"
    count = f"{len(jobs)} image{'s' * (len(jobs) != 1)}"
    print(
        f"generating {count} of {settings.width}x{settings.height} in {settings.num_inference_steps} steps with "
        f"{settings.model} on {device}{reason}; writing to {output.absolute()}",
        flush=True,
    )
    if not run:
        print(
            f"no {RUN} found: size and steps come from the flags, or from defaults that may not fit",
            flush=True,
        )
    output.mkdir(parents=True, exist_ok=True)
    guided = [settings.negative_prompt] if settings.guidance_scale > 1 else []
    # Before the student is loaded, so that the device has room for the text encoder.
    encode = partial(encode_once, settings.model, device)
    texts = [*prompts, *guided]
    embeddings = (
        encode_or_read(settings.model, device, texts, encode) if settings.keep_embeddings else encode(texts)
    )
    pipeline = StudentPipeline(settings.model, device, settings.dtype, settings.sha256, embeddings)
    pipeline.editing = read_editing(settings)
    if settings.image is not None:
        begin = first_step(num_steps := settings.num_inference_steps or 0, settings.strength)
        _, noise_level = set_steps(pipeline.scheduler, num_steps, "cpu")[begin]
        print(
            f"changing {settings.image} in the last {num_steps - begin} of {num_steps} steps, from a noise level of "
            f"{noise_level:.2f}",
            flush=True,
        )
    size = size_warning(
        (settings.width or 0, settings.height or 0), trained_sizes(run, pipeline.pixels_per_token, RUN)
    )
    warn(size)
    settings = replace(settings, dtype=str(pipeline.dtype).removeprefix("torch."))
    generated, cells = generate_all(pipeline, settings, jobs)
    written = [each for each in generated if each.path]
    grid = ""
    if len(cells) > 1:
        grid = f" and {save_grid(settings, written, cells, digests_of(pipeline)).name}"
    for each in written:
        print(f"{Path(each.path or '').name}  {one_line(each.prompt, MAX_PROMPT)}")
    print(f"wrote {len(written)} image{'s' * (len(written) != 1)}{grid} to {output.absolute()}", flush=True)
    warn(size, flat_warning(written))
    refuse_not_finite(generated, str(settings.dtype))


def serve(settings: Settings, prompts: list[str]) -> None:
    """Load the student and its text encoder once, and draw for a page or for requests until the process is stopped."""
    from wanlite.serving.drawing import PromptEncoder, ServedStudent
    from wanlite.serving.launch import choose_address, open_socket, private_folder, run_server, url_of
    from wanlite.serving.queue import DrawingQueue
    from wanlite.serving.server import make_app

    address = choose_address(settings.host, settings.port, settings.token)
    with (
        open_socket(address) as listener,
        private_folder(),
    ):  # before the student is loaded, which takes longer
        device = choose_device(settings.device)
        pipeline = StudentPipeline(settings.model, device, settings.dtype, settings.sha256)
        settings = replace(settings, dtype=str(pipeline.dtype).removeprefix("torch."))
        encoder = PromptEncoder(settings.model, encoder_device(settings.model, device))

        def adapt(job, batch_size):
            """Return the settings of an image in a batch."""
            size = {"width": job.width, "height": job.height, "num_inference_steps": job.num_steps}
            return replace(settings, batch_size=batch_size, **size)

        student = ServedStudent(
            pipeline,
            encoder,
            lambda job, count: text_chunks(adapt(job, count), job.prompt, job.seed, digests_of(pipeline)),
            settings.guidance_scale,
            settings.negative_prompt,
        )
        queue = DrawingQueue(
            student.draw,
            lambda job: settings.batch_size or choose_batch_size(adapt(job, None), pipeline.device),
            settings.queue_size or QUEUE_SIZE,
        )
        limits = served_limits(settings, pipeline)
        app = make_app(queue, limits, address.token, has_api=settings.serve)
        url = url_of(listener, address.host)
        if settings.web:
            from wanlite.serving.page import Page, mount_page

            page = Page(queue, limits, settings.output_dir, pipeline.weights_sha256)
            app = mount_page(app, page, prompts, settings.seed)
            print(
                f"page      {url}   (images are saved in {Path(settings.output_dir).absolute()})", flush=True
            )
        if settings.serve:
            print(f"server    {url}/v1/images/generations   model {limits.model}", flush=True)
        print(f"drawing with {settings.model} on {device}; Ctrl-C stops", flush=True)
        run_server(app, queue, listener)


def served_limits(settings: Settings, pipeline: StudentPipeline) -> Limits:
    """Return the images that a served student draws; the defaults are those of the settings."""
    run = read_run(settings.model)
    unit = pipeline.pixels_per_token
    return Limits(
        model=Path(settings.model).absolute().name,
        width=settings.width or 0,
        height=settings.height or 0,
        num_steps=settings.num_inference_steps or 0,
        few_steps=tuple(recorded_schedule(run, Path(settings.model) / RUN).get("few_steps") or ()),
        sizes=tuple(trained_sizes(run, unit, RUN)),
        unit=unit,
        max_side=unit * pipeline.student.config.rope_max_seq_len,
        max_pixels=fitting_pixels(pipeline.device),
        max_images=min(MAX_IMAGES, settings.queue_size or QUEUE_SIZE),
    )


def save_grid(settings: Settings, written: list[Generated], cells: list, digests: dict[str, str]) -> Path:
    """Write the grid of the first images with their prompts; returns its path.

    Prompts with several images have a row each.
    """
    each = settings.num_images_per_prompt
    columns = each if 1 < each <= MAX_COLUMNS else math.ceil(math.sqrt(len(cells)))
    shown = written[: len(cells)]
    paths = [image.path for image in shown if image.path]
    grid = Grid({"": np.stack(cells)}, [image.prompt for image in shown], [image.seed for image in shown])
    info = text_chunks(settings, None, None, digests)
    lists = {"prompts": grid.prompts, "seeds": grid.seeds, "files": [path.name for path in paths]}
    for name, values in lists.items():
        info.add_text(name, json.dumps(values))
    names = grid_names(paths[0], paths[-1])
    return save_image(np.asarray(draw_grid(grid, columns)), settings.output_dir, names, info)


def warn(*warnings: str | None) -> None:
    """Print the warnings that are not None."""
    for warning in filter(None, warnings):
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    gc.freeze()  # the garbage collector skips the objects of imports
    gc.enable()
    try:
        (serve if SETTINGS.web or SETTINGS.serve else main)(SETTINGS, PROMPTS)
    except (OSError, ValueError, FloatingPointError, SafetensorError) as error:
        print(f"run_inference.py: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(
            f"run_inference.py: {str(error).splitlines()[0]} Lower --batch_size, --height or --width, add "
            f"--dtype bfloat16, or --device cpu.",
            file=sys.stderr,
        )
        sys.exit(2)
