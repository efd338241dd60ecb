"""Draw pictures with a saved student: load it (nothing is projected, no teacher is needed), sample, write PNGs.

    python run_inference.py                                              # ./outputs/wan_t2i, the run's own validation prompts
    python run_inference.py --prompt "a small red circle at the left on a white background" --num_images_per_prompt 4
    python run_inference.py --model DIR --prompts_file prompts.txt --device cuda --dtype bfloat16

Every PNG carries in its text chunks what draws it again: prompt, seed, steps, guidance, size, dtype, and the model's sha256.
"""

import json
import math
import os
import re
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from wanlite.official import num_bytes
from wanlite.prompts import check_text, read_prompts
from wanlite.run_folder import check_saved_parts, picture_size, read_run
from wanlite.settings import make_parser, setting
from wanlite.student_files import open_student, student_folder

TIMESTEPS = 1000     # more steps than these repeat themselves
SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
             "num_train_timesteps": TIMESTEPS}
ENCODER_SHARE = 0.8  # of the device's free memory; a larger text encoder, of a real Wan 11 GB, reads prompts on the CPU


@dataclass(frozen=True)
class Settings:
    model: str = setting("./outputs/wan_t2i", "folder of a saved student; nothing outside it is read", is_path=True)
    prompt: list[str] | None = setting(None, "what to draw, repeatable; None = the run's own validation prompts")
    prompts_file: str | None = setting(None, "text file, one prompt a line, instead of --prompt", is_path=True)
    negative_prompt: str = setting("", "what guidance steers away from; used where --guidance_scale is above 1")
    num_inference_steps: int | None = setting(None, "steps from noise to picture; None = what the student was saved for")
    guidance_scale: float = setting(1.0, "guidance on top of the guidance that is baked into the student; 1 = none")
    height: int | None = setting(None, "pixels, divisible by 16; None = what the student was trained at")
    width: int | None = setting(None, "pixels, divisible by 16; None = what the student was trained at")
    seed: int = setting(0, "seed of the first picture; each further picture takes the next")
    num_images_per_prompt: int = setting(1, "pictures of each prompt")
    batch_size: int = setting(1, "pictures drawn at once; above 1 is faster, and a picture may differ in its last bit")
    output_dir: str = setting("./outputs/pictures", "where the PNGs are written", is_path=True)
    device: str | None = setting(None, "cpu, cuda, cuda:N or mps; None = CUDA where there is one, else the CPU")
    dtype: str = setting("float32", "dtype of the student", choices=("float32", "float16", "bfloat16"))
    sha256: str | None = setting(None, "digest that the student's one weights file must have; every picture's text says it")


def read_settings(arguments=None):
    """Read the command line and check all that needs no torch: returns settings without None, and the prompts."""
    parser = make_parser(Settings, __doc__, repeatable=("prompt",))
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        return complete(settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def complete(settings):
    """Fill in what the saved run says and refuse what no picture can be drawn with."""
    folder = student_folder(settings.model)
    with open_student(folder) as (config, _):
        run = read_run(folder)
    check_saved_parts(folder)
    prompts = choose_prompts(settings, run, folder)
    width, height = picture_size(run.get("resolution", 512))
    defaults = {"height": height, "width": width, "num_inference_steps": run.get("num_inference_steps", 20)}
    filled = {name: default if getattr(settings, name) is None else getattr(settings, name)
              for name, default in defaults.items()}
    settings = replace(settings, model=str(folder), **filled)
    check_numbers(settings, len(prompts))
    check_steps(settings.num_inference_steps, run, folder)
    check_scheduler(folder, run)
    check_picture_size(settings, folder, config)
    check_output_dir(Path(settings.output_dir))
    if settings.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", settings.device):
        raise ValueError(f"--device {settings.device} is unknown, expected cpu, cuda, cuda:N or mps.")
    if settings.negative_prompt and settings.guidance_scale <= 1:
        raise ValueError("--negative_prompt is used by guidance only; add --guidance_scale above 1 or leave it out.")
    return settings, prompts


def check_numbers(settings, num_prompts):
    """Refuse counts, seeds and guidance out of range; what the flags leave open came from run.json."""
    for name in ("num_inference_steps", "num_images_per_prompt", "batch_size"):
        if type(getattr(settings, name)) is not int or getattr(settings, name) < 1:
            raise ValueError(f"--{name} is {getattr(settings, name)!r}, expected a whole number, at least 1.")
    if settings.num_inference_steps > TIMESTEPS:
        raise ValueError(f"--num_inference_steps is {settings.num_inference_steps}, expected at most {TIMESTEPS}.")
    last = settings.seed + num_prompts * settings.num_images_per_prompt - 1
    if settings.seed < 0 or last >= 2**63:
        raise ValueError(f"--seed {settings.seed}: the pictures' seeds must lie in 0..2**63 - 1; choose another.")
    if not math.isfinite(settings.guidance_scale) or settings.guidance_scale < 1:
        raise ValueError(f"--guidance_scale is {settings.guidance_scale}, expected 1 (none) or more.")


def _schedule_of(run):
    schedule = run.get("schedule") or {}
    return schedule if isinstance(schedule, dict) else {}


def check_steps(num_steps, run, folder):
    """Refuse a number of steps that the student was not trained for; a student of stage 1 takes any."""
    few_steps = _schedule_of(run).get("few_steps") or []
    if not isinstance(few_steps, list) or any(type(count) is not int for count in few_steps):
        raise ValueError(f"{folder / 'run.json'}: says few_steps {few_steps!r}, expected whole numbers. Copy the folder again.")
    if few_steps and num_steps not in few_steps:
        raise ValueError(f"--num_inference_steps {num_steps}: {folder} was trained to draw in {', '.join(map(str, few_steps))} "
                         "steps. Choose one of these, or train with --few_steps.")


def check_scheduler(folder, run):
    """Refuse a scheduler that would lead the student through other noise levels than it was trained at."""
    path, wanted = folder / "scheduler" / "scheduler_config.json", dict(SCHEDULER)
    if "flow_shift" in _schedule_of(run):
        wanted["flow_shift"] = run["schedule"]["flow_shift"]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        odd = [f"{name} {config.get(name)!r}, expected {value!r}" for name, value in wanted.items() if config.get(name) != value]
    except (ValueError, AttributeError, RecursionError):
        odd = ["nothing that can be read, expected a schedule"]
    if odd:
        raise ValueError(f"{path}: says {odd[0]}, as the student was trained. Copy the folder again.")


def check_picture_size(settings, folder, config):
    """Refuse sizes that do not divide into tokens or lie beyond the student's rotary tables."""
    try:
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        token = int(vae.get("scale_factor_spatial") or 8) * int(config.get("patch_size", (1, 2, 2))[1])      # pixels
        largest = token * int(config.get("rope_max_seq_len", 1024))
    except (ValueError, TypeError, AttributeError, LookupError):
        raise ValueError(f"{folder}: config.json or vae/config.json does not say the patch and picture size. Copy the folder "
                         "again.") from None
    if token < 1:
        raise ValueError(f"{folder}: config.json says a patch of {token} pixels. Copy the folder again.")
    for name in ("height", "width"):
        pixels = getattr(settings, name)
        if type(pixels) is not int or pixels <= 0 or pixels % token:
            nearest = max(token, round(pixels / token) * token) if type(pixels) is int else token
            raise ValueError(f"--{name} {pixels!r} is not divisible by {token}; the nearest is {nearest}.")
        if pixels > largest:
            raise ValueError(f"--{name} {pixels} is more than this student can place; the most is {largest}.")


def check_output_dir(output):
    """Refuse a place where no folder can be made."""
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not place.is_dir():
        raise OSError(f"--output_dir {output}: {place} is a file, expected a folder. Name another --output_dir.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"--output_dir {output}: {place} cannot be written to. Name another --output_dir.")


def choose_prompts(settings, run, folder):
    if settings.prompt is not None and settings.prompts_file is not None:
        raise ValueError("--prompt and --prompts_file were both given; choose one.")
    if settings.prompts_file is not None:
        return read_prompts(settings.prompts_file, print)
    prompts = settings.prompt if settings.prompt is not None else run.get("validation_prompts", [])
    if not prompts or not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"no prompt to draw: {folder}/run.json names no validation prompts, or --prompt is empty. "
                         'Add --prompt "...".')
    for prompt in prompts:
        check_text(prompt, f"{folder / 'run.json'}: a validation prompt")
    return prompts


if __name__ == "__main__":  # arguments and paths are answered before torch is imported, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # ends it at once and silently: what was drawn is whole, and stays
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in train_distillation.py, and so is the next
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    SETTINGS, PROMPTS = read_settings()

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from tqdm import tqdm

from train_distillation import WanLiteStudent
from wanlite.autoencoder import decode_latents, load_autoencoder, to_pictures
from wanlite.devices import free_memory
from wanlite.flow import check_schedule, sample, seeded_noise
from wanlite.network import pack_text
from wanlite.text import encode_prompts, load_text_encoder, tell_cut


class Painter:
    """A saved student with all that turns its velocity into pictures."""

    def __init__(self, folder, device="cpu", dtype="float32", sha256=None):
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.student = WanLiteStudent.from_pretrained(folder, dtype=dtype, device=device, sha256=sha256)
        self.scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
        self.autoencoder = load_autoencoder(folder, device=device)
        size, free = num_bytes(Path(folder) / "text_encoder"), free_memory(self.device)[0]
        self.tokenizer, self.encoder = load_text_encoder(folder, self.device if size < ENCODER_SHARE * free else "cpu")

    def embed(self, prompts):
        return encode_prompts(self.tokenizer, self.encoder, prompts)

    @torch.no_grad()
    def draw(self, prompts, seeds, num_steps, height, width, guidance_scale=1.0, negative_prompt=""):
        """Return one picture for each prompt and seed: (B, height, width, 3) uint8.

        Raises ValueError for a schedule that does not end at 0, FloatingPointError where the result is not finite or is one flat
        colour.
        """
        check_schedule(self.scheduler, num_steps)
        text = pack_text(self.embed(prompts)).to(self.device, self.dtype)
        unwanted = None
        if guidance_scale > 1:
            unwanted = pack_text(self.embed([negative_prompt]) * len(prompts)).to(self.device, self.dtype)
        stride = self.autoencoder.config.scale_factor_spatial
        noise = seeded_noise((self.student.config.num_channels, height // stride, width // stride), seeds).to(self.device)

        def velocity_of(latents, timestep):
            latents = latents.to(self.dtype)
            wanted = self._velocity(latents, timestep, text)
            if unwanted is None:
                return wanted
            plain = self._velocity(latents, timestep, unwanted)
            return plain + guidance_scale * (wanted - plain)

        latents = sample(velocity_of, noise, self.scheduler, num_steps)
        if not torch.isfinite(latents).all():
            raise FloatingPointError(f"the latents are not finite in {self.dtype}: try --dtype float32, or train again.")
        pictures = to_pictures(decode_latents(self.autoencoder, latents))
        for prompt, picture in zip(prompts, pictures):
            if picture.std(axis=(0, 1)).max() < 1:
                raise FloatingPointError(f"the picture for {prompt!r} is one flat colour: the student is not trained, or "
                                         "the steps or size are not those it was trained for.")
        return pictures

    def _velocity(self, latents, timestep, text):
        return self.student(latents, timestep, text.tokens, text_logit_bias=text.logit_bias, return_dict=False)[0].float()


def text_chunks(settings, prompt, seed, weights_sha256):
    """Return the PNG text chunks from which the picture can be drawn again."""
    info = PngInfo()
    facts = {"prompt": prompt, "seed": seed, "num_inference_steps": settings.num_inference_steps,
             "guidance_scale": settings.guidance_scale, "negative_prompt": settings.negative_prompt,
             "height": settings.height, "width": settings.width, "dtype": settings.dtype, "model": settings.model,
             "weights_sha256": weights_sha256}
    for name, value in facts.items():
        info.add_itxt(name, str(value))
    return info


def save_picture(picture, path, info=None):
    """Write a picture (height, width, 3) as a PNG that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(picture).save(partial, "PNG", pnginfo=info)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error}). Free some space, or name another --output_dir; "
                      "what was drawn before is there.") from None
    finally:
        partial.unlink(missing_ok=True)


def grid(pictures, columns):
    """Lay pictures (B, height, width, 3) out in rows of `columns`, the rest black."""
    rows = -(-len(pictures) // columns)
    canvas = np.zeros((rows * columns, *pictures.shape[1:]), np.uint8)
    canvas[:len(pictures)] = pictures
    return canvas.reshape(rows, columns, *pictures.shape[1:]).swapaxes(1, 2).reshape(
        rows * pictures.shape[1], columns * pictures.shape[2], 3)


def choose_device(wanted):
    """Return the device asked for, or CUDA where there is one; raises ValueError for one that is not there."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    number = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and number >= torch.cuda.device_count():
        raise ValueError(f"--device {wanted}: {torch.cuda.device_count()} CUDA devices are here. Leave the flag out, or name "
                         "cpu.")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: not available here. Leave the flag out, or name cpu.")
    return wanted


def main(settings, prompts):
    device, output = choose_device(settings.device), Path(settings.output_dir)
    jobs = [prompt for prompt in prompts for _ in range(settings.num_images_per_prompt)]
    seeds = range(settings.seed, settings.seed + len(jobs))
    reason = "" if settings.device or device != "cpu" else " (no CUDA device was found)"
    print(f"drawing {len(jobs)} pictures of {settings.width}x{settings.height} in {settings.num_inference_steps} steps with "
          f"{settings.model} on {device}{reason}; writing to {output.absolute()}", flush=True)
    if not read_run(settings.model):
        print("no run.json says how it was trained: size and steps are those of the flags, or a guess", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    painter = Painter(settings.model, device, settings.dtype, settings.sha256)
    if painter.encoder.device.type != painter.device.type:
        print(f"the text encoder does not fit on {device} and reads prompts on the CPU", flush=True)
    tell_cut(painter.tokenizer, [*prompts, settings.negative_prompt], partial(print, flush=True))
    with open_student(Path(settings.model)) as (_, files):
        weights = settings.sha256 or " ".join(file.sha256() for file in files)
    pictures = []
    for start in tqdm(range(0, len(jobs), settings.batch_size), desc="drawing", unit="batch", disable=len(jobs) == 1):
        stop = min(start + settings.batch_size, len(jobs))
        drawn = painter.draw(jobs[start:stop], seeds[start:stop], settings.num_inference_steps, settings.height,
                             settings.width, settings.guidance_scale, settings.negative_prompt)
        for number, picture in enumerate(drawn, start):
            save_picture(picture, output / f"{number:04d}-seed{seeds[number]}.png",
                         text_chunks(settings, jobs[number], seeds[number], weights))
        pictures.append(drawn)
    pictures = np.concatenate(pictures)
    columns = settings.num_images_per_prompt if settings.num_images_per_prompt > 1 else math.ceil(math.sqrt(len(jobs)))
    save_picture(grid(pictures, columns), output / "grid.png")
    for prompt in prompts[:12]:
        print(f"  {prompt}")
    print(f"wrote {len(jobs)} pictures and grid.png to {output.absolute()}")


if __name__ == "__main__":
    try:
        main(SETTINGS, PROMPTS)
    except (OSError, ValueError, FloatingPointError, SafetensorError) as error:
        print(f"run_inference.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"run_inference.py: {str(error).splitlines()[0]} Lower --batch_size, --height or --width, add --dtype bfloat16, or "
              "--device cpu.", file=sys.stderr)
        sys.exit(2)
