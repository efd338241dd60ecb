"""A folder and a name that one of its files holds -> a path inside the folder, or one OSError.

Names and links that lead out of a folder are refused before anything is opened: a downloaded folder decides
nothing about the files beside it. The folder itself may be a link. In the hub's cache, files are links to blobs of
the same repository, which count as inside. This module does not import torch.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .json_files import DOWNLOADED, check_regular, read_json, shown

REPOSITORIES = ("models--", "datasets--", "spaces--")  # first letters of folders in the hub's cache
MAX_NAME = 255  # bytes, in every usual file system
MAX_LEVELS = 32  # folders in folders; those of a saved student and of the hub's cache have four
MAX_FILES = 10_000  # of a component: a sharded text encoder has a dozen
TOKENIZER = "tokenizer"  # the component without weights
INDEX = ".index.json"  # last letters of the name of an index of weights


class OutsideError(OSError):
    """The error for a name or a link that leads out of a folder; `reason` is short, for a list of skipped files."""

    def __init__(self, message: str, reason: str = "outside the folder"):
        super().__init__(message)
        self.reason = reason


def resolve_inside(folder: str | Path, name: str | os.PathLike) -> Path:
    """Return the path of `name` in a folder; raises OutsideError for a name or a link that leads out of it.

    The file may be missing.
    """
    folder = Path(folder)
    path, target = _follow(folder, name)
    if any(target.is_relative_to(root) for root in _roots(folder)):
        return path
    if path.is_symlink():
        raise OutsideError(
            f"{path}: a link that leads out of the folder, to {target}. Put the file itself there."
        )
    raise OutsideError(f"{folder}: {shown(str(name))} leads out of the folder. Put the file itself there.")


def _follow(folder, name):
    """Return a path and its place on the disk; raises OSError for a name that is none."""
    try:
        path = folder / name
        if max(map(len, map(os.fsencode, path.parts))) > MAX_NAME:
            raise OSError("a name that is too long")
        return path, path.resolve()
    except (OSError, RuntimeError):
        reason = "cannot be read"  # a loop of links, a name that is too long
    except (TypeError, ValueError):
        reason = "an invalid file name"  # another type, zero bytes, unpaired surrogates
    raise OutsideError(
        f"{folder}: {shown(str(name))} is not the name of a file that can be read. Copy the folder again.",
        reason,
    )


def _roots(folder: Path) -> Iterator[Path]:
    """Yield the folders in which the files of a folder may lie."""
    resolved = folder.resolve()
    yield resolved
    for place in (folder.absolute(), resolved):
        yield from (parent.resolve() for parent in place.parents if parent.name.startswith(REPOSITORIES))


def walk(folder: str | Path) -> Iterator[Path]:
    """Yield the entries of a folder and of the folders in it, in no order; folders that are links are not entered.

    Raises OSError for folders nested deeper than MAX_LEVELS, in which Path.rglob() exceeds the interpreter's stack.
    """
    folder = Path(folder)
    waiting = [(folder, 0)]
    while waiting:
        place, level = waiting.pop()
        if level > MAX_LEVELS:
            raise OSError(
                f"{folder}: has folders nested deeper than {MAX_LEVELS} levels. Move them elsewhere."
            )
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(place) as entries:
            for entry in entries:
                yield place / entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((place / entry.name, level + 1))


def plain_name(name: object, source: str | Path) -> str:
    """Return the name of a file beside `source`, which holds it; raises OSError for anything else."""
    is_name = isinstance(name, str) and Path(name).name == name and name not in ("", "..")
    if not is_name or {"\0", "\\"} & {*str(name)} or len(str(name).encode(errors="replace")) > MAX_NAME:
        raise OSError(
            f"{source}: names a file {shown(str(name))}, expected the plain name of one beside it. Copy it again."
        )
    return str(name)


def check_inside(folder: str | Path, name: str) -> None:
    """Refuse a component's folder `name` in which a library would open a file outside, or one of any size.

    Raises OSError for links and indexes that lead out, for other than regular files, and for a file other than
    weights that is larger than those of a Wan checkpoint. Contents are read of indexes alone.
    """
    component = resolve_inside(folder, name)
    for number, entry in enumerate(walk(component)):
        if number == MAX_FILES:
            raise OSError(f"{component}: holds more than {MAX_FILES:,} files. Copy the folder again.")
        path = resolve_inside(folder, entry.relative_to(folder))
        if path.is_dir():
            continue
        size = check_regular(path).st_size
        is_small = path.suffix == ".json" or component.name == TOKENIZER
        if is_small and size > DOWNLOADED.max_bytes:
            raise OSError(f"{path}: {size:,} bytes, too large for {DOWNLOADED.owner}. Copy it again.")
        if path.name.endswith(INDEX):
            check_index(path)


def check_index(path: Path) -> None:
    """Raise OSError for an index of weights that names anything but files beside it."""
    weight_map = read_json(path, DOWNLOADED).get("weight_map")
    if not isinstance(weight_map, dict):
        raise OSError(f"{path}: has no weight_map of tensor names to file names. Copy it again.")
    for name in {str(name): name for name in weight_map.values()}.values():  # thousands of the same few
        resolve_inside(path.parent, plain_name(name, path))
