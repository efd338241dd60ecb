"""The output folder of a run: checkpoints to resume from, and the files that inference reads.

    config.json, diffusion_pytorch_model.safetensors     the student
    scheduler/ tokenizer/ text_encoder/ vae/             the other components of inference; model_index.json for stock diffusers
    base/                                                the same for the student before the few-step phase
    small/                                               the same with a small text encoder or decoder
    run.json                                             settings, versions, seeds, fingerprints, results
    checkpoints/step-000500/                             resumable state, each with a manifest that is written last
    samples/ logs/ cache/ metrics.jsonl README.md
    report.html                                          a page that shows run.json, metrics.jsonl and samples/

Saves are atomic, and only files that a run writes are deleted. This module does not import torch, so that a
wrong folder is refused at once.
"""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..files.atomic import MANIFEST, find_corruption, new_folder, write_bytes, write_json
from ..files.cache import fingerprint, is_writable, user_cache
from ..files.file_names import (
    BASE,
    CACHE,
    CHECKPOINTS,
    COMPONENTS,
    CONFIG,
    METRICS,
    MODEL_CARD,
    MODEL_INDEX,
    REPORT,
    RUN,
    SAMPLES,
    SCHEDULER_CONFIG,
    WEIGHTS,
)
from ..files.inside import check_inside, resolve_inside, walk
from ..files.json_files import DOWNLOADED, OWN, read_json, shorten
from ..files.text_files import MAX_LINE, open_text
from ..runtime.launch import is_on_several_machines
from ..teacher.text_encoder import TOKENIZER_CLASSES

SMALL = "small"  # the same student with small parts
RESULTS = (  # removed by clear()
    *COMPONENTS,
    "scheduler",
    BASE,
    SMALL,
    f"{CHECKPOINTS}/step-*",
    f"{CHECKPOINTS}/.step-*",
    f"{SAMPLES}/step-*.png",
    "logs",
    CONFIG,
    WEIGHTS,
    MODEL_INDEX,
    METRICS,
    MODEL_CARD,
    REPORT,
)
PIPELINE = {  # content of model_index.json
    "_class_name": "WanPipeline",
    "boundary_ratio": None,
    "expand_timesteps": False,
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
}
DRAWING = ("resolution", "num_inference_steps", "schedule", "validation_prompts")  # read from run.json
PROMPT_SETTINGS: dict[str, Any] = {  # from which the prompts of a run follow
    "teacher": str,
    "prompts": (str, type(None)),
    "seed": int,
    "num_trajectories": (int, type(None)),
    "num_held_out": int,
}
MAX_PATH = 4096  # characters, on Linux
SEAL = "drawing_sha256"
_RUN_LIMITS = OWN._replace(remedy="Copy it again; for a new run, move the folder away.")


# ---- a run -------------------------------------------------------------------------------------------------


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return run.json as a dict, {} if it is missing; raises OSError if it cannot be read or is damaged."""
    path = resolve_inside(folder, RUN)
    run = read_json(path, _RUN_LIMITS) if path.exists() else {}
    if SEAL in run and seal(run) != run:
        raise OSError(
            f"{path}: {' or '.join(DRAWING)} differs from its sha256. Copy the file again; if you edited it, remove "
            f"{SEAL}."
        )
    return run


def prompt_settings(run: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Return the settings of a run, {} if it has none; raises ValueError if prompts cannot follow from them.

    `source` names the file in errors.
    """
    found = run.get("settings")
    settings = found if isinstance(found, dict) else {}
    for name, kinds in PROMPT_SETTINGS.items():
        value = settings.get(name)
        if name in settings and not isinstance(value, kinds) or len(str(value)) > MAX_PATH:
            raise ValueError(f"{source}: {name} is {shorten(value)} in its settings. Copy it again.")
    return settings


def seal(run: dict[str, Any]) -> dict[str, Any]:
    """Return the content of run.json with a digest of what drawing reads from it."""
    return run | {SEAL: fingerprint({name: run.get(name) for name in DRAWING})}


def image_size(resolution: Any) -> tuple[Any, Any]:
    """Return (width, height) in pixels of a resolution setting: one number, or [width, height]."""
    if isinstance(resolution, list) and len(resolution) == 2:
        return resolution[0], resolution[1]
    return resolution, resolution


def converted_folder(settings: Any) -> Path:
    """Return the folder of a teacher's converted parts: --cache_dir or, if that is unset, one for all runs of a user.

    Several machines share --cache_dir only.
    """
    is_default = Path(settings.cache_dir) == Path(settings.output_dir) / CACHE
    if is_default and not is_on_several_machines() and is_writable(user_cache()):
        return user_cache()
    return Path(settings.cache_dir)


def check_output_folder(
    folder: str | Path, settings: dict[str, Any], overwrite: bool = False, resume: bool = True
) -> str:
    """Return "new", or "resume" for a folder with an unfinished run under the same settings.

    A folder with a projected student that was never trained counts as new. Raises ValueError for a finished
    run without `overwrite`, for a run of other settings, and for a folder with other content. `settings` are
    those that affect the result.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder to write to. Choose another --output_dir.")
    if not folder.exists() or all(
        path.name == CACHE or path.name.startswith(f".{RUN}.") for path in folder.iterdir()
    ):
        return "new"  # a run that was killed before its settings were complete on disk
    run = read_run(folder)
    if not isinstance(run.get("settings"), dict):
        raise ValueError(
            f"{folder}: holds files that do not belong to a run. Choose an empty or a new --output_dir."
        )
    if overwrite:
        return "new"
    if run.get("finished"):
        raise ValueError(
            f"{folder}: holds a finished run. To train it further, add --student {shlex.quote(str(folder))} "
            "and choose another --output_dir; to replace it, add --overwrite."
        )
    if not resume or run.get("projected_only"):
        return "new"
    if changed := _list_changes(run, settings):
        raise ValueError(
            f"{folder}: holds an unfinished run under other settings ({', '.join(changed)}). Use the same settings, or add "
            "--overwrite."
        )
    return "resume"


def _list_changes(run, settings):
    """Return a clause for each of `settings` that a run does not share."""
    earlier = run["settings"]
    return [
        f"{name} was {shorten(earlier.get(name))}, is {shorten(value)}"
        for name, value in settings.items()
        if earlier.get(name) != value
    ]


def lacks_parts(folder: str | Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds a finished run under the same settings, without small parts."""
    run = read_run(folder) if Path(folder).is_dir() else {}
    is_run = bool(run.get("finished")) and isinstance(run.get("settings"), dict)
    return is_run and SMALL not in run and not _list_changes(run, settings)


def read_fitted_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings that an unfinished run adapted to its machine; raises ValueError if it has none."""
    run = read_run(folder)
    if not isinstance(fitted := run.get("fitted"), dict) or "fitted_sha256" not in run:
        raise ValueError(
            f"{folder}: holds an unfinished run of an older version, whose steps differ. Add --overwrite to "
            "start again."
        )
    if run["fitted_sha256"] != fingerprint(fitted):
        raise ValueError(
            f"{Path(folder) / RUN}: fitted differs from its sha256, and other steps would follow. Copy the file "
            "again, or add --overwrite to start again."
        )
    return fitted


def check_resumable(folder: str | Path, run: dict[str, Any], log: Callable[[str], object]) -> None:
    """Raise ValueError if teacher, prompts, images or the number of processes changed; log changed versions."""
    earlier = read_run(folder)
    for name, meaning in (
        ("teacher", "--teacher holds other weights"),
        ("prompts", "the prompts differ"),
        ("images", "the images differ"),
        ("processes", "the number of processes differs"),
    ):
        if earlier.get(name, run.get(name)) != run.get(name):
            raise ValueError(
                f"{folder}: holds an unfinished run, and {meaning} (was {shorten(earlier[name])}, is "
                f"{shorten(run[name])}): its result "
                "would change. Resume it with the same, or add --overwrite."
            )
    versions = earlier["versions"] if isinstance(earlier.get("versions"), dict) else {}
    if changed := [
        f"{name} {version!s:.20}, now {run['versions'][name]}"
        for name, version in versions.items()
        if run["versions"].get(name) not in (None, version)
    ]:
        log(f"resumed under other versions ({', '.join(changed)}): the last bits of the weights may differ")


def clear(folder: str | Path) -> None:
    """Remove an earlier run's results, and nothing else.

    run.json is removed last, so that the folder is still that of a run after an interruption. cache/ stays:
    its content is checked against its inputs.
    """
    for name in (*RESULTS, RUN):
        for entry in Path(folder).glob(name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    for name in (CHECKPOINTS, SAMPLES):
        with suppress(OSError):  # missing, or not empty: other files stay
            (Path(folder) / name).rmdir()


def save_components(
    folder: str | Path,
    components_folder: str | Path,
    scheduler: Any,
    copy: Callable[[Path, Path], object] = shutil.copyfile,
) -> None:
    """Copy the components of inference beside the student; write the scheduler and the index for stock diffusers.

    `components_folder` holds vae/, text_encoder/ and tokenizer/ in diffusers' layout. `copy(source, target)`
    copies a file.
    """
    folder, components_folder = Path(folder), Path(components_folder)
    for component in COMPONENTS:
        with new_folder(folder / component) as partial:
            copy_files(components_folder / component, partial, copy)
            if component == "vae":
                _write_index(partial / WEIGHTS)
    scheduler.save_pretrained(folder / "scheduler")
    index = components_folder / MODEL_INDEX
    tokenizer = read_json(index, DOWNLOADED).get("tokenizer") if index.is_file() else None
    known: list[Any] = [["transformers", name] for name in TOKENIZER_CLASSES]  # others may be code
    own = {"tokenizer": tokenizer} if tokenizer in known else {}
    write_json(folder / MODEL_INDEX, PIPELINE | own)


def _write_index(weights: Path) -> None:
    """Write an index for one file of weights.

    diffusers reads the index first: without one in `subfolder`, it would read the file of this name in the
    parent folder, which is the student's.
    """
    index = weights.with_name(f"{weights.name}.index.json")
    if not weights.is_file() or index.exists():
        return
    with safe_open(weights, "np") as file:
        names = sorted(file.keys())
    write_json(
        index,
        {
            "metadata": {"total_size": weights.stat().st_size},
            "weight_map": dict.fromkeys(names, weights.name),
        },
    )


def link_file(source: Path, target: Path) -> None:
    """Make a hard link, which takes no space, or a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_files(source: Path, target: Path, copy: Callable[[Path, Path], object]) -> None:
    """Copy files without their permissions: a teacher's folder may be read-only."""
    for path in sorted(walk(source)):
        if path.is_file() and path != source / MANIFEST:
            own = target / path.relative_to(source)
            own.parent.mkdir(parents=True, exist_ok=True)
            copy(path, own)


def check_saved_components(folder: str | Path) -> None:
    """Raise OSError if components of a saved student are missing or lead out of its folder, or for other sizes."""
    folder = Path(folder)
    if missing := [
        component for component in ("scheduler", *COMPONENTS) if not (folder / component).is_dir()
    ]:
        raise OSError(
            f"{folder}: lacks {', '.join(missing)}; expected the folder of a finished train_distillation.py run. "
            "If the student was saved alone, put those of its run beside it."
        )
    for component in ("scheduler", *COMPONENTS):
        check_inside(folder, component)
    if not (folder / "scheduler" / SCHEDULER_CONFIG).is_file():
        raise OSError(f"{folder / 'scheduler'}: lacks {SCHEDULER_CONFIG}. Copy the folder again.")
    for component in COMPONENTS:
        if (folder / component / MANIFEST).exists() and (
            reason := find_corruption(folder / component, sizes_only=True)
        ):
            raise OSError(f"{folder / component}: {reason}. Copy the folder again.")


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of metrics.jsonl and their records; broken lines are skipped."""
    path = Path(path)
    if not path.exists():
        return
    with open_text(path, errors="replace") as file:
        while line := file.readline(MAX_LINE):
            with suppress(ValueError, RecursionError):  # the last line of a run that was killed
                record = json.loads(line)
                if isinstance(record, dict):
                    yield line.rstrip("\n"), record


class MetricsLog:
    """metrics.jsonl, one record per line; a resumed run drops the records after its checkpoint at `step`.

    `seconds` is the duration of the run up to that step.
    """

    def __init__(self, path: str | Path, step: int):
        self.path = Path(path)
        self.seconds = 0.0
        kept = []
        for line, record in read_records(self.path) if step else ():
            reached, seconds = record.get("step", 0), record.get("seconds", self.seconds)
            if all(type(number) in (int, float) for number in (reached, seconds)) and reached <= step:
                kept.append(line)
                self.seconds = seconds
        write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, **record: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
