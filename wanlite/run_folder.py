"""What a run saves, resumes from, and inference reads.

    config.json, diffusion_pytorch_model.safetensors     the student
    scheduler/ tokenizer/ text_encoder/ vae/             what inference needs beside it; model_index.json for stock diffusers
    run.json                                             settings, versions, seeds, fingerprints, results
    checkpoints/step-000500/                             resumable state, each with a manifest that is written last
    samples/ logs/ cache/ metrics.jsonl README.md

Nothing is deleted before its replacement is on disk, and no torch is imported: a wrong folder is answered at once.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
PARTS = ("tokenizer", "text_encoder", "vae")


# ---- small files and folders, whole or not at all ---------------------------------------------------------------------

def write_json(path, content):
    """Write JSON so that a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


@contextmanager
def new_folder(target):
    """Yield a hidden folder beside `target` to write into; on success it becomes `target`, with a manifest of its files."""
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        write_json(partial / MANIFEST, {str(path.relative_to(partial)): _describe(path) for path in files})
        for path in files:
            _flush(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def why_broken(folder):
    """Return why a folder does not verify against its manifest, or None where it does."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "has no readable manifest"
    for name, described in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if _describe(path) != described:
            return f"{name} differs from its manifest"
    return None


def _describe(path):
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- a run --------------------------------------------------------------------------------------------------------------

def read_run(folder):
    """Return run.json as a dict, or an empty one where there is none."""
    path = Path(folder) / "run.json"
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path}: not JSON ({error}). Move the folder away or name another --output_dir.") from None
    if not isinstance(run, dict):
        raise OSError(f"{path}: holds a {type(run).__name__}, expected an object. Name another --output_dir.")
    return run


def check_output_folder(folder, settings, overwrite=False, resume=True):
    """Say what a run may do with its output folder: "new", or "resume" a run that was cut short under the same settings.

    Raises ValueError for a finished run without `overwrite`, for a run of other settings, and for a folder that holds
    anything else. `settings` is a dict; only those that decide the result are compared.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder to write to. Name another --output_dir.")
    if not folder.exists() or not any(folder.iterdir()):
        return "new"
    run = read_run(folder)
    if not run:
        raise ValueError(f"{folder}: holds files that are no run of this script. Name an empty or a new --output_dir.")
    if overwrite:
        return "new"
    if run.get("finished"):
        raise ValueError(f"{folder}: holds a finished run. Add --overwrite to replace it, or name another --output_dir.")
    if not resume:
        return "new"
    changed = {name: (run.get("settings", {}).get(name), value) for name, value in settings.items()
               if run.get("settings", {}).get(name) != value}
    if changed:
        told = ", ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ValueError(f"{folder}: holds a run cut short under other settings ({told}). Use the same, or add --overwrite.")
    return "resume"


def clear(folder):
    """Remove an earlier run's results; trajectories in cache/ stay, they are checked by what they were made of."""
    for entry in Path(folder).iterdir():
        if entry.name != "cache":
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def check_parts(teacher_folder):
    """Refuse a teacher's folder without the parts that encode, decode and go into every saved run."""
    if missing := [part for part in PARTS if not (Path(teacher_folder) / part).is_dir()]:
        raise OSError(f"{teacher_folder}: lacks {', '.join(missing)}, which training and inference need. Put them there from "
                      "the diffusers layout of the same model.")


def save_parts(folder, teacher_folder, scheduler):
    """Copy what inference needs beside the student, and write the scheduler and the index that stock diffusers reads."""
    folder, teacher_folder = Path(folder), Path(teacher_folder)
    for part in PARTS:
        with new_folder(folder / part) as partial:
            shutil.copytree(teacher_folder / part, partial, dirs_exist_ok=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = teacher_folder / "model_index.json"
    tokenizer = json.loads(index.read_text(encoding="utf-8")).get("tokenizer") if index.is_file() else None
    write_json(folder / "model_index.json", {
        "_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": False,
        "tokenizer": tokenizer or ["transformers", "T5TokenizerFast"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]})


def write_model_card(folder, settings, results):
    """Write the run's README.md: what the model is, how good it measured, how to draw with it."""
    measured = "".join(f"- {name}: {value}\n" for name, value in results.items() if not isinstance(value, dict))
    measured += "".join(f"- accuracy of the {name}: {value}\n" for name, value in results.get("prompt_accuracy", {}).items())
    (Path(folder) / "README.md").write_text(f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# A WanLiteStudent

A text-to-image model distilled from `{Path(settings.teacher).name}`; it draws {settings.resolution} x {settings.resolution} pixels
in {settings.num_inference_steps} steps, without guidance.

    python run_inference.py --model {settings.output_dir} --prompt "..."

With stock diffusers, no code of this project:

    from diffusers import WanPipeline, WanTransformer3DModel
    student = WanTransformer3DModel.from_pretrained("{settings.output_dir}")
    pipeline = WanPipeline.from_pretrained("{settings.output_dir}", transformer=student)
    frames = pipeline("...", height={settings.resolution}, width={settings.resolution}, num_frames=1, guidance_scale=1.0,
                      num_inference_steps={settings.num_inference_steps}, output_type="pil").frames

Measured on held-out prompts:

{measured}""", encoding="utf-8")


# ---- checkpoints --------------------------------------------------------------------------------------------------------

def checkpoint_path(folder, step):
    return Path(folder) / "checkpoints" / f"step-{step:06d}"


def latest_checkpoint(folder):
    """Return (newest checkpoint that verifies or None, a line for each newer one that was skipped)."""
    skipped = []
    for path in sorted((Path(folder) / "checkpoints").glob("step-*"), reverse=True):
        reason = why_broken(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path}: skipped, {reason}")
    return None, skipped


def prune_checkpoints(folder, keep):
    """Delete all but the newest `keep` checkpoints (two at least), after the newest is known to verify."""
    paths = sorted((Path(folder) / "checkpoints").glob("step-*"))
    if paths and why_broken(paths[-1]) is None:
        for path in paths[:-max(2, keep)]:
            shutil.rmtree(path)


class MetricsLog:
    """metrics.jsonl: one line a record; what was written after the step that a run resumes from is dropped.

    `seconds` is how long the run had taken at that step.
    """

    def __init__(self, path, step):
        self.path, self.seconds = Path(path), 0.0
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue                                      # the last line of a run that was killed
            if record.get("step", 0) <= step:
                kept.append(line)
                self.seconds = record.get("seconds", self.seconds)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, **record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
