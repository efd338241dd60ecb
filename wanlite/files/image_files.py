"""Images in a folder: each save is a new PNG, written atomically; existing files are never replaced."""

import os
import re
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MAX_SLUG = 40  # characters
COMPRESS_LEVEL = 1  # of 9: a third of the time of Pillow's 6, for files up to a sixth larger
NUMBERED = re.compile(
    r"(?:grid-[0-9]+-([0-9]{4,9})(?:-[0-9]+)?|([0-9]{4,9})-(?:.*-)?seed[0-9]+)\.png", re.IGNORECASE
)


def image_names(folder: str | Path, prompt: str, seed: int) -> Iterator[str]:
    """Yield names for an image in the order to try them; its number is above all numbers in the folder."""
    title = "-".join(filter(None, (slug(prompt), f"seed{seed}")))
    numbers = [
        int(found[1] or found[2]) for name in os.listdir(folder) if (found := NUMBERED.fullmatch(name))
    ]
    return (f"{number:04d}-{title}.png" for number in count(max(numbers, default=-1) + 1))


def grid_names(first: Path, last: Path) -> Iterator[str]:
    """Yield names for the grid of the images from `first` to `last`, in the order to try them."""
    name = f"grid-{first.name.partition('-')[0]}-{last.name.partition('-')[0]}"
    yield f"{name}.png"
    yield from (f"{name}-{number}.png" for number in count(2))


def slug(prompt: str) -> str:
    """Return a prompt's first words in letters that every file system takes, "" for a prompt without any."""
    plain = unicodedata.normalize("NFKD", prompt[:1000].casefold()).encode("ascii", "ignore").decode()
    words = "-".join(re.findall("[a-z0-9]+", plain))
    if len(words) <= MAX_SLUG:
        return words
    return words[: MAX_SLUG + 1].rpartition("-")[0] or words[:MAX_SLUG]


def save_image(
    image: np.ndarray, folder: str | Path, names: Iterator[str], info: PngInfo | None = None
) -> Path:
    """Write an image (height, width, 3) as a PNG under the first free name of `names`; returns its path."""
    partial = Path(folder) / f".{uuid4().hex}.partial"
    try:
        with open(partial, "xb") as file:
            Image.fromarray(image).save(file, "PNG", pnginfo=info, compress_level=COMPRESS_LEVEL)
        return next(path for path in (Path(folder) / name for name in names) if _publish(partial, path))
    except OSError as error:
        raise OSError(
            f"{folder}: an image cannot be written ({error.strerror or error}). Free some space, or choose "
            "another --output_dir; the images before it are complete."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> bool:
    """Give a complete file its name; returns whether the name was free."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: a killed process leaves an empty file
        try:
            open(path, "xb").close()
        except FileExistsError:
            return False
        os.replace(partial, path)
    return True
