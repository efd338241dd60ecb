"""What a run saves, resumes from, and inference reads.

    config.json, diffusion_pytorch_model.safetensors     the student
    scheduler/ tokenizer/ text_encoder/ vae/             what inference needs beside it; model_index.json for stock diffusers
    run.json                                             settings, versions, seeds, fingerprints, results
    checkpoints/step-000500/                             resumable state, each with a manifest that is written last
    samples/ logs/ cache/ metrics.jsonl README.md

Saves replace what they replace only once it is on disk, and only files that a run writes are ever deleted. No
torch is imported: a wrong folder is answered at once.
"""

import json
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from ..files.atomic import MANIFEST, find_corruption, new_folder, write_json

COMPONENTS = ("tokenizer", "text_encoder", "vae")
RESULTS = (
    *COMPONENTS,
    "scheduler",
    "checkpoints/step-*",
    "checkpoints/.step-*",
    "samples/step-*.png",
    "logs",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "model_index.json",
    "metrics.jsonl",
    "README.md",
)  # what clear() removes


# ---- a run -------------------------------------------------------------------------------------------------


def read_run(folder):
    """Return run.json as a dict, or an empty one where there is none."""
    path = Path(folder) / "run.json"
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError(f"it holds a {type(run).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        raise OSError(
            f"{path}: cannot be read ({error}). Copy it again; of a run to be made, move the folder away."
        ) from None
    return run


def image_size(resolution):
    """Return (width, height) in pixels of what a run calls its resolution: one number, or [width, height]."""
    return (
        tuple(resolution)
        if isinstance(resolution, list) and len(resolution) == 2
        else (resolution, resolution)
    )


def check_output_folder(folder, settings, overwrite=False, resume=True):
    """Say what a run may do with its output folder: "new", or "resume" a run that was cut short under the
    same settings.

    A start that was projected and saved, with nothing trained of it, is free for a run as an empty folder is.
    Raises ValueError for a finished run without `overwrite`, for a run of other settings, and for a folder
    that holds anything else. `settings` is a dict; only those that decide the result are compared.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder to write to. Name another --output_dir.")
    if not folder.exists() or all(
        path.name == "cache" or path.name.startswith(".run.json.") for path in folder.iterdir()
    ):
        return "new"  # a start projected, nothing trained; killed as it said its settings
    run = read_run(folder)
    if not isinstance(run.get("settings"), dict):
        raise ValueError(
            f"{folder}: holds files that are no run of this script. Name an empty or a new --output_dir."
        )
    if overwrite:
        return "new"
    if run.get("finished"):
        raise ValueError(
            f"{folder}: holds a finished run. To train it further, add --student {shlex.quote(str(folder))} "
            f"and name "
            "another --output_dir; to replace it, add --overwrite."
        )
    if not resume or run.get("projected_only"):
        return "new"
    changed = {
        name: (run["settings"].get(name), value)
        for name, value in settings.items()
        if run["settings"].get(name) != value
    }
    if changed:
        told = ", ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ValueError(
            f"{folder}: holds a run cut short under other settings ({told}). Use the same, or add "
            f"--overwrite."
        )
    return "resume"


def fitted_before(folder):
    """Return what a run that was cut short had chosen for its machine."""
    run = read_run(folder)
    if not isinstance(run.get("fitted"), dict):
        raise ValueError(
            f"{folder}: holds a run cut short by an older version, which took other steps. Add --overwrite "
            f"to start "
            "again."
        )
    return run["fitted"]


def check_resumable(folder, run, say):
    """Refuse to resume where teacher, prompts or the number of processes are others; other versions are told."""
    earlier = read_run(folder)
    for name, meaning in (
        ("teacher", "--teacher holds other weights"),
        ("prompts", "the prompts are others"),
        ("images", "the images are others"),
        ("processes", "the number of processes is another"),
    ):
        if earlier.get(name, run.get(name)) != run.get(name):
            raise ValueError(
                f"{folder}: holds a run cut short, and {meaning} than it had ({earlier[name]}, now "
                f"{run[name]}): it "
                "would not end as it would have. Resume it with the same, or add --overwrite."
            )
    versions = earlier["versions"] if isinstance(earlier.get("versions"), dict) else {}
    if changed := [
        f"{name} {version}, now {run['versions'][name]}"
        for name, version in versions.items()
        if run["versions"].get(name) not in (None, version)
    ]:
        say(f"resumed under other versions ({', '.join(changed)}): the last bits of the weights may differ")


def clear(folder):
    """Remove an earlier run's results, and nothing else; run.json goes after them, so that a clearing cut
    short is still a run.

    What lies in cache/ stays: starts and trajectories are checked by what they were made of.
    """
    for name in (*RESULTS, "run.json"):
        for entry in Path(folder).glob(name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    for name in ("checkpoints", "samples"):
        with suppress(OSError):  # not there, or not empty: what somebody put there stays
            (Path(folder) / name).rmdir()


def save_components(folder, components_folder, scheduler):
    """Copy what inference needs beside the student, and write the scheduler and the index that stock
    diffusers reads.

    `components_folder` holds vae/, text_encoder/ and tokenizer/ in diffusers' layout.
    """
    folder, components_folder = Path(folder), Path(components_folder)
    for component in COMPONENTS:
        with new_folder(folder / component) as partial:
            _copy_files(components_folder / component, partial)
            if component == "vae":
                _write_index(partial / "diffusion_pytorch_model.safetensors")
    scheduler.save_pretrained(folder / "scheduler")
    index = components_folder / "model_index.json"
    tokenizer = json.loads(index.read_text(encoding="utf-8")).get("tokenizer") if index.is_file() else None
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "WanPipeline",
            "boundary_ratio": None,
            "expand_timesteps": False,
            "tokenizer": tokenizer or ["transformers", "T5TokenizerFast"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "transformer_2": [None, None],
        },
    )


def _write_index(weights):
    """Write an index of one file of weights, which diffusers reads first.

    Given `subfolder` and no index there, it takes the file of this name in the parent folder, which is the
    student's.
    """
    index = weights.with_name(f"{weights.name}.index.json")
    if not weights.is_file() or index.exists():
        return
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    write_json(
        index,
        {
            "metadata": {"total_size": weights.stat().st_size},
            "weight_map": dict.fromkeys(sorted(header.keys() - {"__metadata__"}), weights.name),
        },
    )


def _copy_files(source, target):
    """Copy contents without permissions: a teacher may lie in a folder that is read-only."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path != source / MANIFEST:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def check_saved_components(folder):
    """Refuse a saved student's folder whose components are missing or not as they were written; sizes are
    compared.
    """
    folder = Path(folder)
    if missing := [
        component for component in ("scheduler", *COMPONENTS) if not (folder / component).is_dir()
    ]:
        raise OSError(
            f"{folder}: lacks {', '.join(missing)}; expected a folder that train_distillation.py finished. "
            f"Beside a "
            "student that was saved alone, put these of its run."
        )
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise OSError(f"{folder / 'scheduler'}: lacks scheduler_config.json. Copy the folder again.")
    for component in COMPONENTS:
        if (folder / component / MANIFEST).exists() and (
            reason := find_corruption(folder / component, sizes_only=True)
        ):
            raise OSError(f"{folder / component}: {reason}. Copy the folder again.")


def write_model_card(folder, settings, few_steps, results, drawing):
    """Write the run's README.md: what the model is, how good it measured, and `drawing`, the command that
    draws with it.
    """
    measured = "".join(
        f"- {name}: {value}\n" for name, value in results.items() if not isinstance(value, dict)
    )
    measured += "".join(
        f"- accuracy of the {name}: {value}, on {results['captions']} captions\n"
        for name, value in results.get("prompt_accuracy", {}).items()
    )
    measured = f"Measured on held-out prompts:\n\n{measured}" if results else ""
    made = "projected, and not yet trained," if settings.project_only else "distilled"
    width, height = image_size(settings.resolution)
    said = f" It was trained for {' or '.join(map(str, few_steps))} steps." if few_steps else ""
    (Path(folder) / "README.md").write_text(
        f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# A WanLiteStudent

A text-to-image model {made} from `{Path(settings.teacher).name}`; it draws {width} x {height} pixels
in {settings.num_inference_steps} steps, without guidance.{said}

    {drawing} --prompt "..."

With stock diffusers, no code of this project:

    from diffusers import WanPipeline, WanTransformer3DModel
    student = WanTransformer3DModel.from_pretrained({settings.output_dir!r})
    pipeline = WanPipeline.from_pretrained({settings.output_dir!r}, transformer=student)
    frames = pipeline("...", height={height}, width={width}, num_frames=1, guidance_scale=1.0,
                      num_inference_steps={settings.num_inference_steps}, output_type="pil").frames

{measured}""",
        encoding="utf-8",
    )


class MetricsLog:
    """metrics.jsonl: one line a record; what was written after the step that a run resumes from is dropped.

    `seconds` is how long the run had taken at that step.
    """

    def __init__(self, path, step):
        self.path, self.seconds = Path(path), 0.0
        kept = []
        for line in (
            self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            if step and self.path.exists()
            else ()
        ):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            if isinstance(record, dict) and record.get("step", 0) <= step:
                kept.append(line)
                self.seconds = record.get("seconds", self.seconds)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, **record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
