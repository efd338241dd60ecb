"""--teacher as it was typed -> the folder of a teacher; anything else is named for what it is, with what to
do.

A name on the hub is looked for in the hub's cache on this machine; nothing is downloaded. No torch.
"""

import re
import shlex
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

from ..files.atomic import levels_below, name_not_read, open_regular, visible, weights_by_depth, why_not_read

EXPERTS = ("high_noise_model", "low_noise_model", "transformer", "transformer_2")  # folders, one an expert
SINGLE_FILES = ("", "diffusion_models", "unet")  # where ComfyUI's files of experts lie, and deeper there
MAX_ABOVE, MAX_BELOW = 3, 64  # folders that are tried in place of one that holds no teacher
_PART = re.compile("(?i)vae|t5|clip")  # in the names of files that are not an expert's
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # organisation/model
_HUBS = r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/|hf:/+"
_URL = re.compile(rf"(?:{_HUBS})(?:models/)?(?!datasets/|spaces/)({_NAME})")
_GIGABYTES = {
    "Wan-AI/Wan2.2-T2V-A14B": 126,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 126,
}  # two experts, text encoder, autoencoder


def find_teacher(typed):
    """Return the absolute folder that --teacher names, by its path or by its name on the hub, which the hub's
    cache may have.

    Raises OSError for anything else, and ValueError where the cache leaves open which snapshot is meant.
    """
    folder = Path(typed).absolute()
    if folder.is_dir():
        return _newest_snapshot(folder) if folder.name.startswith("models--") else folder
    if name := _hub_name(str(typed)):
        return _cached(str(typed), name)
    if re.match(r"\w+:/", str(typed)):
        raise OSError(f"--teacher {typed}: is a URL, expected a folder. Download it, and name the folder.")
    if folder.exists():
        reason = why_not_read(folder) or ("expected the folder of a Wan checkpoint", "Name that.")
        raise OSError(f"--teacher {typed}: is a file; {reason[0]}. {reason[1]}")
    raise OSError(
        f"--teacher {typed}: no such folder. Expected a Wan checkpoint in the official, diffusers or ComfyUI "
        f"layout; "
        "leave the flag out for the tiny teacher."
    )


def check_holds_experts(folder):
    """Refuse a folder where no layout has an expert, naming files that lie there in formats that are not
    read.
    """
    places = [folder / name for name in EXPERTS if (folder / name).is_dir()]
    for place in places:
        weights = visible(place.glob("*.safetensors*"))
        if (not weights or not any(map(_may_be_expert, weights))) and (
            found := name_not_read(place.iterdir())
        ):
            raise OSError(f"{place}: no expert; {found}")
    if (
        places
        or (folder / "config.json").is_file()
        or any(map(_may_be_expert, chain(*weights_by_depth(folder, SINGLE_FILES))))
    ):
        return
    levels = chain(*(levels_below(folder / place) if place else [[folder]] for place in SINGLE_FILES))
    paths = [path for level in levels for entry in level if entry.is_dir() for path in entry.iterdir()]
    found = name_not_read(path for path in paths if not _PART.search(path.name))
    names = ", ".join(path.name for path in visible(folder.iterdir())[:8]) or "nothing"
    raise OSError(
        f"{folder}: no Wan transformer. Expected transformer/, high_noise_model/ or diffusion_models/; "
        f"{found or f'found {names}.'}"
    )


def _may_be_expert(path):
    """Whether a file holds a Wan of any kind, or is not even safetensors, for which there are other words."""
    if path.suffix == ".json":  # an index
        return True
    with open_regular(path) as file:
        beginning = file.read(2**20)
    return beginning[8:9] != b"{" or b'patch_embedding.weight"' in beginning


def neighbours(path):
    """Yield the folders above a path, and the visible ones below it, which may be meant."""
    if not path.exists():
        return
    yield from islice(path.parents, MAX_ABOVE)
    with suppress(OSError):
        yield from islice(chain(*islice(levels_below(path), 1, None)), MAX_BELOW)


# ---- the hub -----------------------------------------------------------------------------------------------


def _hub_name(typed):
    """Return the organisation/model that was typed, or its URL names; None for a path, whose first folder is
    here, and the rest.
    """
    if url := _URL.match(typed):
        return url[1]
    name = typed.rstrip("/")
    return name if re.fullmatch(_NAME, name) and not Path(name).parent.exists() else None


def _cached(typed, name):
    """Return the snapshot of a name in the hub's cache; raises OSError with the command that downloads it."""
    from huggingface_hub.constants import HF_HUB_CACHE  # here: only a name needs it

    cache = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if cache.is_dir():
        return _newest_snapshot(cache)
    size = f", {_GIGABYTES[name]} GB," if name in _GIGABYTES else ""
    folder = f"./{name.rpartition('/')[2]}"
    raise OSError(
        f"--teacher {typed}: no such folder here, and not in the hub's cache ({HF_HUB_CACHE}). Download the "
        f"model{size} "
        f"with `hf download {name} --local-dir {folder}`, then use --teacher {folder}."
    )


def _newest_snapshot(cache):
    """Return the snapshot of a folder of the hub's cache that its main branch names, or its only one."""
    snapshots = [path for path in visible((cache / "snapshots").glob("*")) if path.is_dir()]
    refs = {
        path.name: path.read_text(errors="replace").strip()
        for path in visible((cache / "refs").glob("*"))
        if path.is_file()
    }
    chosen = [path for path in snapshots if path.name == refs.get("main")] or snapshots
    if len(chosen) == 1:
        return chosen[0]
    name = shlex.quote(cache.name.removeprefix("models--").replace("--", "/", 1))
    if not chosen:
        raise OSError(
            f"{cache}: no snapshot in this folder of the hub's cache. Download the model with `hf download "
            f"{name}`."
        )
    branches = {path: [ref for ref, commit in refs.items() if commit == path.name] for path in chosen[:4]}
    known = ", ".join(f"{path.name} ({', '.join(names) or 'no branch'})" for path, names in branches.items())
    raise ValueError(
        f"{cache}: {len(chosen)} snapshots and no main one: {known}. Choose one, as --teacher {chosen[0]}."
    )
