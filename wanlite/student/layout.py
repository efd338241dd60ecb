"""Files of a saved student: their names and paths, and the lists of names in messages.

This module does not import torch.
"""

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from ..files.file_names import WEIGHTS
from ..files.inside import OutsideError, resolve_inside
from ..files.json_files import MAX_SHOWN, shown

WEIGHTS_STEM = WEIGHTS.removesuffix(".safetensors")
STEMS = (WEIGHTS_STEM, "diffusion_model")  # in the order in which they are tried, before an index
STAGE_PREFIX = ".saving-"  # of the hidden folder of a save until it is published
MAX_LISTED = 1000  # files of a folder that are read for a message
MAX_NAMED = 6  # names in a message


def check_variant(variant: str | None) -> None:
    """Raise ValueError for a variant that cannot be part of a file name; None means no variant."""
    if variant is not None and not (
        isinstance(variant, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,32}", variant)
    ):
        raise ValueError(
            f"variant {variant!r} cannot be part of a file name. Expected a word such as fp16 or bf16."
        )


def variant_infix(variant: str | None) -> str:
    """Return the part of a file name that names a variant."""
    return "" if variant is None else f".{variant}"


def weight_names(infix: str = "") -> list[str]:
    """Return the possible names of a student's single weights file."""
    return [f"{stem}{infix}.safetensors" for stem in STEMS]


def index_name(infix: str = "") -> str:
    """Return the name of the index of a student in shards."""
    return f"{WEIGHTS_STEM}.safetensors.index{infix}.json"


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of a file in a folder, None if it is missing; raises OSError for a link that leads out."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    if not path.exists():
        raise OSError(f"{path}: a link to a missing file. Put the file itself there.")
    try:
        return resolve_inside(folder, name)
    except OutsideError as error:
        raise OSError(str(error)) from None


def list_names(folder: Path) -> str:
    """Return the names of the files in a folder, for a message."""
    return join_names(sorted(entry.name for entry in islice(folder.iterdir(), MAX_LISTED))) or "nothing"


def join_names(names: Sequence[str], count: int = MAX_NAMED) -> str:
    """Return the first `count` names, for a message."""
    return (
        ", ".join(shown(f"{name:.{MAX_SHOWN}}") for name in names[:count])
        + (" and more" if len(names) > count else "")
        or "none"
    )
