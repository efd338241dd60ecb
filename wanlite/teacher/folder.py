"""--teacher as it was typed -> the folder of a teacher, or an error that describes what was found instead.

A name on the hub is looked up in the hub's cache on this machine; nothing is downloaded. No torch.
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

from ..files.file_names import CONFIG
from ..files.json_files import read_first_bytes
from .headers import read_header
from .names import EXPERT_FOLDERS, EXPERT_PLACES, FIRST, NOT_AN_EXPERT
from .search import (
    MAX_DEPTH,
    describe_unsupported,
    find_unsupported_format,
    levels_below,
    list_names,
    visible,
    weights_by_depth,
)

MAX_ABOVE, MAX_BELOW = 3, 64  # folders that are tried in place of one that holds no teacher
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # organisation/model
_HUBS = r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/|hf:/+"
_URL = re.compile(rf"(?:{_HUBS})(?:models/)?(?!datasets/|spaces/)({_NAME})")
PATH_LIKE = (
    "outputs",
    "output",
    "models",
    "checkpoints",
    "runs",
    "data",
)  # first folders that no hub name has
_GIGABYTES = {  # two experts, text encoder, autoencoder
    "Wan-AI/Wan2.2-T2V-A14B": 126,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 126,
}


def find_teacher(typed: str | Path) -> Path:
    """Return the absolute folder that --teacher names, by its path or by its name in the hub's cache.

    Raises OSError for anything else, and ValueError if the cache has several snapshots and no main one.
    """
    folder = Path(typed).absolute()
    if folder.is_dir():
        return _newest_snapshot(folder) if folder.name.startswith("models--") else folder
    if name := hub_name(str(typed)):
        return _cached(str(typed), name)
    if re.match(r"\w+:/", str(typed)):
        raise OSError(f"--teacher {typed}: is a URL, expected a folder. Download it, and name the folder.")
    if folder.exists():
        fault, remedy = find_unsupported_format(folder) or (
            "expected the folder of a Wan checkpoint",
            "Name that.",
        )
        raise OSError(f"--teacher {typed}: is a file; {fault}. {remedy}")
    raise OSError(
        f"--teacher {typed}: no such folder. Expected a Wan checkpoint in the official, diffusers or ComfyUI "
        "layout; leave the flag out for the tiny teacher."
    )


def check_holds_experts(folder: Path) -> None:
    """Refuse a folder without experts in any layout, naming its files in formats that are not read."""
    names = (*EXPERT_FOLDERS["official"], *EXPERT_FOLDERS["diffusers"])
    places = [folder / name for name in names if (folder / name).is_dir()]
    for place in places:
        weights = visible(place.glob("*.safetensors*"))
        if not any(map(_may_be_expert, weights)) and (found := describe_unsupported(place.iterdir())):
            raise OSError(f"{place}: no expert; {found}")
    if places or (folder / CONFIG).is_file():
        return
    if any(map(_may_be_expert, chain(*weights_by_depth(folder, EXPERT_PLACES)))):
        return
    levels = chain(*(levels_below(folder / place) if place else [[folder]] for place in EXPERT_PLACES))
    paths = [path for level in levels for entry in level if entry.is_dir() for path in entry.iterdir()]
    found = describe_unsupported(path for path in paths if not NOT_AN_EXPERT.search(path.name))
    raise OSError(
        f"{folder}: no Wan transformer. Expected transformer/, high_noise_model/ or diffusion_models/; "
        f"{found or f'found {_list_found(folder)}.'}"
    )


def _list_found(folder: Path) -> str:
    """Return the names in a folder without a Wan, and those in its folders of experts."""
    inner = (
        f", and in {place}/ no Wan up to {MAX_DEPTH} folders deep: {list_names(folder / place)}"
        for place in EXPERT_PLACES
        if place and (folder / place).is_dir()
    )
    return list_names(folder) + "".join(inner)


def _may_be_expert(path: Path) -> bool:
    """Whether a file holds a Wan of any kind, or is not safetensors, which has an error of its own."""
    if path.suffix == ".json":  # an index
        return True
    try:
        return any(name.endswith(FIRST) for name in read_header(path))
    except OSError:
        return True


def neighbours(path: Path) -> Iterator[Path]:
    """Yield the folders above a path and the visible ones below it, which may be meant."""
    if not path.exists():
        return
    yield from islice(path.parents, MAX_ABOVE)
    with suppress(OSError):
        yield from islice(chain(*islice(levels_below(path), 1, None)), MAX_BELOW)


# ---- the hub -----------------------------------------------------------------------------------------------


def hub_name(typed: str) -> str | None:
    """Return organisation/model, typed as such or as a URL; None for others.

    A path has a first folder that exists, or one that is usual for files of a user.
    """
    if url := _URL.match(typed):
        return url[1]
    name = typed.rstrip("/")
    is_name = re.fullmatch(_NAME, name) and name.partition("/")[0] not in PATH_LIKE
    return name if is_name and not Path(name).parent.exists() else None


def _cached(typed: str, name: str) -> Path:
    """Return the snapshot of a name in the hub's cache; raises OSError with the command that downloads it."""
    from huggingface_hub.constants import HF_HUB_CACHE  # here: only a name needs it

    cache = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if cache.is_dir():
        return _newest_snapshot(cache)
    size = f", {_GIGABYTES[name]} GB," if name in _GIGABYTES else ""
    folder = f"./{name.rpartition('/')[2]}"
    raise OSError(
        f"--teacher {typed}: no such folder here, and not in the hub's cache ({HF_HUB_CACHE}). Download the "
        f"model{size} with `hf download {name} --local-dir {folder}`, then use --teacher {folder}."
    )


def _newest_snapshot(cache: Path) -> Path:
    """Return the snapshot of a folder of the hub's cache that its main branch names, or its only one."""
    snapshots = [path for path in visible((cache / "snapshots").glob("*")) if path.is_dir()]
    refs = {
        path.name: read_first_bytes(path).decode(errors="replace").strip()
        for path in visible((cache / "refs").glob("*"))
        if path.is_file()
    }
    chosen = [path for path in snapshots if path.name == refs.get("main")] or snapshots
    if len(chosen) == 1:
        return chosen[0]
    name = shlex.quote(cache.name.removeprefix("models--").replace("--", "/", 1))
    if not chosen:
        raise OSError(
            f"{cache}: no snapshot in this folder of the hub's cache. Download the model with `hf download {name}`."
        )
    branches = {path: [ref for ref, commit in refs.items() if commit == path.name] for path in chosen[:4]}
    known = ", ".join(f"{path.name} ({', '.join(names) or 'no branch'})" for path, names in branches.items())
    raise ValueError(
        f"{cache}: {len(chosen)} snapshots and no main one: {known}. Choose one, as --teacher {chosen[0]}."
    )
