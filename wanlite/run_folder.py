"""What a run saves, resumes from, and inference reads.

    config.json, diffusion_pytorch_model.safetensors     the student
    scheduler/ tokenizer/ text_encoder/ vae/             what inference needs beside it; model_index.json for stock diffusers
    run.json                                             settings, versions, seeds, fingerprints, results
    checkpoints/step-000500/                             resumable state, each with a manifest that is written last
    samples/ logs/ cache/ metrics.jsonl README.md

Saves replace what they replace only once it is on disk, and only files that a run writes are ever deleted. No torch is
imported: a wrong folder is answered at once.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
PARTS = ("tokenizer", "text_encoder", "vae")
RESULTS = (*PARTS, "scheduler", "checkpoints", "samples", "logs", "config.json", "diffusion_pytorch_model.safetensors",
           "model_index.json", "metrics.jsonl", "README.md")   # what clear() removes, run.json after them


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
    partial, aside = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if aside.exists() and not target.exists():
        os.replace(aside, target)                             # an earlier save was killed between its two renames
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in (*files, *(path for path in partial.rglob("*") if path.is_dir())):
            _flush(path)
        write_json(partial / MANIFEST, {str(path.relative_to(partial)): _describe(path) for path in files})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def why_broken(folder, sizes_only=False):
    """Return why a folder does not verify against its manifest, or None where it does; sizes alone take no time."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or not manifest or not all(isinstance(entry, dict) for entry in manifest.values()):
        return "has no readable manifest"
    for name, described in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != described.get("size"):
            return f"{name} differs from its manifest: {path.stat().st_size} bytes, {described.get('size')} were written"
        if not sizes_only and _describe(path) != described:
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
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {"cache"}:      # a start projected, nothing trained
        return "new"
    run = read_run(folder)
    if not isinstance(run.get("settings"), dict):
        raise ValueError(f"{folder}: holds files that are no run of this script. Name an empty or a new --output_dir.")
    if overwrite:
        return "new"
    if run.get("finished"):
        raise ValueError(f"{folder}: holds a finished run. Add --overwrite to replace it, or name another --output_dir.")
    if not resume:
        return "new"
    changed = {name: (run["settings"].get(name), value) for name, value in settings.items()
               if run["settings"].get(name) != value}
    if changed:
        told = ", ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ValueError(f"{folder}: holds a run cut short under other settings ({told}). Use the same, or add --overwrite.")
    return "resume"


def clear(folder):
    """Remove an earlier run's results, and nothing else; run.json goes last, so that a clearing cut short is still a run.

    What lies in cache/ stays: starts and trajectories are checked by what they were made of.
    """
    for name in (*RESULTS, "run.json"):
        entry = Path(folder) / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


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
            _copy_files(teacher_folder / part, partial)
    scheduler.save_pretrained(folder / "scheduler")
    index = teacher_folder / "model_index.json"
    tokenizer = json.loads(index.read_text(encoding="utf-8")).get("tokenizer") if index.is_file() else None
    write_json(folder / "model_index.json", {
        "_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": False,
        "tokenizer": tokenizer or ["transformers", "T5TokenizerFast"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]})


def _copy_files(source, target):
    """Copy contents without permissions: a teacher may lie in a folder that is read-only."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path != source / MANIFEST:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def check_saved_parts(folder):
    """Refuse a saved student's folder whose parts are missing or not as they were written; sizes are compared."""
    folder = Path(folder)
    if missing := [part for part in ("scheduler", *PARTS) if not (folder / part).is_dir()]:
        raise OSError(f"{folder}: lacks {', '.join(missing)}; expected a folder that train_distillation.py finished.")
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise OSError(f"{folder / 'scheduler'}: lacks scheduler_config.json. Copy the folder again.")
    for part in PARTS:
        if (folder / part / MANIFEST).exists() and (reason := why_broken(folder / part, sizes_only=True)):
            raise OSError(f"{folder / part}: {reason}. Copy the folder again.")


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
    for path in reversed(_checkpoints(folder)):
        reason = why_broken(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path}: skipped, {reason}")
    return None, skipped


def prune_checkpoints(folder, keep):
    """Delete all but the newest `keep` checkpoints (two at least) and what killed saves left, once the newest verifies."""
    paths = _checkpoints(folder)
    if paths and why_broken(paths[-1]) is None:
        left = [path for kind in ("partial", "old") for path in paths[-1].parent.glob(f".step-*.{kind}")]
        for path in (*paths[:-max(2, keep)], *left):
            shutil.rmtree(path)


def _checkpoints(folder):
    """Return the run's checkpoints by rising step; folders of other names, as a user's backup, are none."""
    paths = (Path(folder) / "checkpoints").glob("step-*")
    return sorted((path for path in paths if re.fullmatch(r"step-\d+", path.name)), key=lambda path: int(path.name[5:]))


class MetricsLog:
    """metrics.jsonl: one line a record; what was written after the step that a run resumes from is dropped.

    `seconds` is how long the run had taken at that step.
    """

    def __init__(self, path, step):
        self.path, self.seconds = Path(path), 0.0
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if step and self.path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue                                      # the last line of a run that was killed
            if isinstance(record, dict) and record.get("step", 0) <= step:
                kept.append(line)
                self.seconds = record.get("seconds", self.seconds)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, **record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
