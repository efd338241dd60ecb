"""Images in a folder: each is a new PNG, whole or not there, and none that lies there is ever replaced."""

import os
import re
import unicodedata
from itertools import count
from pathlib import Path
from uuid import uuid4

from PIL import Image

LONGEST_SLUG = 40  # characters
NUMBERED = re.compile(
    r"(?:grid-[0-9]+-([0-9]{4,9})(?:-[0-9]+)?|([0-9]{4,9})-(?:.*-)?seed[0-9]+)\.png", re.IGNORECASE
)


def image_names(folder, prompt, seed):
    """Yield names for an image in the order in which they are to be tried: its number is above all that are
    in the folder.
    """
    title = "-".join(filter(None, (slug(prompt), f"seed{seed}")))
    numbers = [
        int(found[1] or found[2]) for name in os.listdir(folder) if (found := NUMBERED.fullmatch(name))
    ]
    return (f"{number:04d}-{title}.png" for number in count(max(numbers, default=-1) + 1))


def grid_names(first, last):
    """Yield names for the grid of the images from `first` to `last`, two paths."""
    name = f"grid-{first.name.partition('-')[0]}-{last.name.partition('-')[0]}"
    yield f"{name}.png"
    yield from (f"{name}-{number}.png" for number in count(2))


def slug(prompt):
    """Return a prompt's first words in letters that every file system takes, "" where it has none."""
    plain = unicodedata.normalize("NFKD", prompt[:1000].casefold()).encode("ascii", "ignore").decode()
    words = "-".join(re.findall("[a-z0-9]+", plain))
    return (
        words
        if len(words) <= LONGEST_SLUG
        else words[: LONGEST_SLUG + 1].rpartition("-")[0] or words[:LONGEST_SLUG]
    )


def save_image(image, folder, names, info=None):
    """Write an image (height, width, 3) as a PNG under the first of `names` that is free; returns its path."""
    partial = Path(folder) / f".{uuid4().hex}.partial"
    try:
        with open(partial, "xb") as file:
            Image.fromarray(image).save(file, "PNG", pnginfo=info)
        return next(path for path in (Path(folder) / name for name in names) if _publish(partial, path))
    except OSError as error:
        raise OSError(
            f"{folder}: an image cannot be written ({error.strerror or error}). Free some space, or name "
            f"another "
            "--output_dir; the images before it are complete."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _publish(partial, path):
    """Give a whole file its name; returns whether the name was free."""
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
