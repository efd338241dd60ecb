"""Rows of pictures with a name each -> one PNG."""

import numpy as np
from PIL import Image, ImageDraw

LABEL_WIDTH = 92  # pixels at the left, for the names of the rows


def save_grid(path, rows):
    """Write `rows`, {name: pictures (B, height, width, 3) uint8}, one below the other; returns the grid (height, width, 3)."""
    bands = [np.concatenate([_label(name, pictures.shape[1]), *pictures], axis=1) for name, pictures in rows.items()]
    grid = np.concatenate(bands)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
    return grid


def _label(name, height):
    band = Image.new("RGB", (LABEL_WIDTH, height), "white")
    ImageDraw.Draw(band).multiline_text((4, height / 2), name.replace(", ", "\n"), fill="black", anchor="lm")
    return np.array(band)
