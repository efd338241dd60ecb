"""Folders and the bytes that a run writes there -> the space that each has and lacks."""

import shutil
from pathlib import Path
from typing import NamedTuple

from ..files.inside import walk

TOKENS_PER_WORD = 1.3  # of UMT5, in English


class FolderSpace(NamedTuple):
    """The bytes that a run needs in a folder, those of files that exist there, and those free on its disk."""

    needed_bytes: int
    existing_bytes: int
    free_bytes: int

    @property
    def missing_bytes(self) -> int:
        """The bytes that are still to be written."""
        return self.needed_bytes - min(self.needed_bytes, self.existing_bytes)


def measure_folders(needed: dict[str, int]) -> dict[str, FolderSpace]:
    """Return {folder: its FolderSpace} for {folder: bytes needed}; a folder inside another counts once."""
    spaces = {}
    for folder, needed_bytes in needed.items():
        inner = [other for other in needed if other != folder and Path(other).is_relative_to(folder)]
        spaces[folder] = FolderSpace(
            needed_bytes, count_existing_bytes(folder, inner), count_free_bytes(folder)
        )
    return spaces


def count_existing_bytes(folder, excluded=()):
    """Return the bytes of the files in a folder, without those in `excluded` folders."""
    excluded = [Path(each).absolute() for each in excluded]
    return sum(
        path.stat().st_size
        for path in walk(Path(folder).absolute())
        if path.is_file() and not any(path.is_relative_to(each) for each in excluded)
    )


def count_free_bytes(folder):
    """Return the free bytes of the disk that a folder is on, or will be on once it is created."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def count_text_bytes(prompts, width):
    """Return the bytes of the embeddings of prompts in bfloat16, from their words; nothing is tokenized."""
    return 2 * width * round(sum(1 + TOKENS_PER_WORD * len(prompt.split()) for prompt in prompts))


def format_size(size, rounding=round):
    """Return a size in GB or MB; with `math.ceil` and `math.floor`, two compared sizes never look equal."""
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB")
    return f"{rounding(10 * size / unit) / 10:,.1f} {name}"
