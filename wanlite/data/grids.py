"""Images -> a grid, with a title for each row or a given number of columns."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

TITLE_WIDTH = 92  # pixels at the left, for the titles of rows
GUTTER = 4  # white pixels between images of a grid without titles


def save_grid(path: Path, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Write {title: images (B, height, width, 3) uint8} as a grid, and return it (height, width, 3)."""
    bands = [
        np.concatenate([_draw_title(title, images.shape[1]), *images], axis=1)
        for title, images in rows.items()
    ]
    grid = np.concatenate(bands)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
    return grid


def _draw_title(title, height):
    band = Image.new("RGB", (TITLE_WIDTH, height), "white")
    ImageDraw.Draw(band).multiline_text((4, height / 2), title.replace(", ", "\n"), fill="black", anchor="lm")
    return np.array(band)


def lay_out(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return a grid of images (height, width, 3) of one size with `columns`; gutters and empty cells are white."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    grid = np.full((rows * (height + GUTTER) - GUTTER, columns * (width + GUTTER) - GUTTER, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top = number // columns * (height + GUTTER)
        left = number % columns * (width + GUTTER)
        grid[top : top + height, left : left + width] = image
    return grid
