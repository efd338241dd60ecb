"""The files of a saved student: their names, their paths, and how messages show what was found. No torch."""

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from ..files.json_files import shown

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
STEMS = (WEIGHTS_STEM, "diffusion_model")  # in the order in which they are read; an index comes after both
STAGE_PREFIX = ".saving-"  # of the hidden folder of a save until it is published
MAX_LISTED = 1000  # files of a folder that a message looks at
MAX_NAMED = 6  # names in a message
MAX_SHOWN = 80  # characters of a value in a message


def check_variant(variant: str | None) -> None:
    """Refuse a variant that cannot be part of a file name; None means no variant."""
    if variant is not None and not (
        isinstance(variant, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,32}", variant)
    ):
        raise ValueError(
            f"variant {variant!r} cannot be part of a file name. Expected a word such as fp16 or bf16."
        )


def infix(variant: str | None) -> str:
    """Return the part of file names that stands for a variant."""
    return "" if variant is None else f".{variant}"


def weight_names(variant_infix: str = "") -> list[str]:
    """Return the names that a student's single file of weights may have."""
    return [f"{stem}{variant_infix}.safetensors" for stem in STEMS]


def index_name(variant_infix: str = "") -> str:
    """Return the name of the index of a student in shards."""
    return f"{WEIGHTS_STEM}.safetensors.index{variant_infix}.json"


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of a file in the folder, None where it is missing; a link may not lead out of the
    folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    # in the hub's cache, files are links to blobs of the same repository
    cache = next((parent for parent in folder.parents if parent.name.startswith("models--")), folder)
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise OSError(f"{path}: a link to a missing file. Put the file itself there.") from None
    if not target.is_relative_to(cache.resolve()):
        raise OSError(f"{path}: a link that leads out of the folder, to {target}. Put the file itself there.")
    return path


def listing(folder: Path) -> str:
    """Return the names in a folder, for a message."""
    return some(sorted(entry.name for entry in islice(folder.iterdir(), MAX_LISTED))) or "nothing"


def some(names: Sequence[str], count: int = MAX_NAMED) -> str:
    """Return the first names, for a message."""
    return ", ".join(map(shown, names[:count])) + (" and more" if len(names) > count else "") or "none"


def short(value: object) -> str:
    """Return the beginning of any value's repr, for a message."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
