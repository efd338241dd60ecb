"""Images -> one grid: rows with a name each, or rows of a given number of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

LABEL_WIDTH = 92  # pixels at the left, for the names of the rows
GUTTER = 4  # white pixels between two images that have no names


def save_grid(path: Path, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Write `rows`, {name: images (B, height, width, 3) uint8}, one below the other; returns the grid (height,
    width, 3).
    """
    bands = [
        np.concatenate([_label(name, images.shape[1]), *images], axis=1) for name, images in rows.items()
    ]
    grid = np.concatenate(bands)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
    return grid


def _label(name, height):
    band = Image.new("RGB", (LABEL_WIDTH, height), "white")
    ImageDraw.Draw(band).multiline_text((4, height / 2), name.replace(", ", "\n"), fill="black", anchor="lm")
    return np.array(band)


def lay_out(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return images (height, width, 3) of one size in rows of `columns`, a gutter apart; empty cells are
    white.
    """
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    grid = np.full((rows * (height + GUTTER) - GUTTER, columns * (width + GUTTER) - GUTTER, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + GUTTER), number % columns * (width + GUTTER)
        grid[top : top + height, left : left + width] = image
    return grid
