"""emoji_atlas/ -> sprites of a size, with colours multiplied by alpha.

The atlas is an image of all objects in all styles, written by tools/make_emoji_atlas.py; its authors are named in
emoji_atlas/NOTICE.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ATLAS = Path(__file__).resolve().parents[3] / "emoji_atlas"
_CONTENTS = json.loads((ATLAS / "atlas.json").read_text(encoding="utf-8"))
NAMES = tuple(_CONTENTS["names"])
STYLES = tuple(_CONTENTS["styles"])
SIZES = {"small": 26, "large": 44}  # pixels, square


@cache
def sprites(size: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all objects in all styles at a size of SIZES: colours multiplied by alpha, and alpha 0..1.

    Shapes: (objects, styles, pixels, pixels, 3) and (objects, styles, pixels, pixels, 1), float32, read-only.
    """
    reduced = np.stack([_reduce(sprite, SIZES[size]) for sprite in _read_atlas()])
    reduced = reduced.reshape(len(NAMES), len(STYLES), *reduced.shape[1:])
    reduced.flags.writeable = False
    return reduced[..., :3], reduced[..., 3:]


def _read_atlas():
    """Return all sprites (objects * styles, side, side, 4): colours 0..255 times alpha, and alpha 0..1."""
    side, columns = _CONTENTS["size"], _CONTENTS["columns"]
    with Image.open(ATLAS / "atlas.webp") as image:
        pixels = np.asarray(image.convert("RGBA"), np.float32)
    rows = pixels.shape[0] // side
    cells = (
        pixels.reshape(rows, side, columns, side, 4).swapaxes(1, 2).reshape(len(STYLES), -1, side, side, 4)
    )
    cells = cells[:, : len(NAMES)].swapaxes(0, 1).reshape(-1, side, side, 4)
    alpha = cells[..., 3:] / 255
    return np.concatenate([cells[..., :3] * alpha, alpha], -1)


def _reduce(sprite: np.ndarray, pixels: int) -> np.ndarray:
    channels = (Image.fromarray(channel) for channel in np.moveaxis(sprite, -1, 0))
    resized = (channel.resize((pixels, pixels), Image.Resampling.LANCZOS) for channel in channels)
    reduced = np.stack([np.asarray(channel) for channel in resized], -1)
    return reduced.clip(0, (255, 255, 255, 1)).astype(np.float32)
