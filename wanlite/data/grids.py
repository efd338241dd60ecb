"""Images -> a grid to look at: a labelled row for each kind of image, and the prompts below the columns."""

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..files.atomic import write_bytes
from ..runtime.terminal import one_line

GUTTER = 4  # white pixels between images
FRAME = (190, 190, 190)  # colour of a line around each image of a Grid
CELL = 256  # smaller images are enlarged by a whole factor, until their longer side is at least this
MAX_CELLS = 64  # of a grid
MAX_COLUMNS = 8  # more prompts continue in a further band of rows
LABEL_WIDTH = 184  # pixels at the left, for the titles of rows
FONT_SIZE = 20  # pixels
LINE = 25  # pixels from one line of text to the next
MAX_LINES = 6  # of a prompt


class Grid(NamedTuple):
    """Images of the same prompts and seeds in several rows."""

    rows: Mapping[str, np.ndarray]  # {title: images (B, height, width, 3) uint8}
    prompts: Sequence[str]
    seeds: Sequence[int]


def save_grid(path: Path, grid: Grid, step: int) -> np.ndarray:
    """Write a grid as a PNG with its prompts, seeds and step as text, and return it (height, width, 3).

    At most MAX_CELLS images are drawn.
    """
    grid = _limit(grid)
    image = draw_grid(grid)
    image.save(content := BytesIO(), "PNG", pnginfo=_describe(grid, step))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getvalue())
    return np.asarray(image)


def _limit(grid):
    """Return the grid with as many prompts as MAX_CELLS allows."""
    count = max(1, MAX_CELLS // len(grid.rows))
    rows = {title: images[:count] for title, images in grid.rows.items()}
    return Grid(rows, grid.prompts[:count], grid.seeds[:count])


def _describe(grid, step):
    """Return the text chunks of a grid; `size` is that of an image before it is enlarged."""
    info = PngInfo()
    height, width = next(iter(grid.rows.values())).shape[1:3]
    values = {
        "prompts": list(grid.prompts),
        "seeds": list(grid.seeds),
        "step": step,
        "rows": list(grid.rows),
        "size": [width, height],
    }
    for name, value in values.items():
        info.add_text(name, json.dumps(value))
    return info


def draw_grid(grid: Grid, columns: int = MAX_COLUMNS) -> Image.Image:
    """Return the image of a grid, `columns` prompts in a band; gutters and unused cells are white.

    Without titles of rows, images begin at the left.
    """
    columns = min(columns, len(grid.prompts))
    bands = [_draw_band(grid, start, columns) for start in range(0, len(grid.prompts), columns)]
    canvas = Image.new("RGB", (bands[0].width, sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        canvas.paste(band, (0, top))
        top += band.height
    return canvas


def _draw_band(grid, start, columns):
    """Draw the rows of `columns` prompts from `start` on, and the prompts below."""
    chosen = slice(start, start + columns)
    rows = {title: [enlarge(image) for image in images[chosen]] for title, images in grid.rows.items()}
    height, width, _ = next(iter(rows.values()))[0].shape
    place = partial(locate, size=(width, height), left=LABEL_WIDTH if any(rows) else GUTTER)
    texts = [wrap(prompt, width - GUTTER) for prompt in grid.prompts[chosen]]
    right, text_top = place(len(rows), columns)
    band = Image.new("RGB", (right, text_top + LINE * (max(map(len, texts)) + 1)), "white")
    for row, (title, images) in enumerate(rows.items()):
        top = place(row, 0)[1]
        _write(band, (GUTTER, top + height / 2), _wrap_label(title), "lm")
        for column, image in enumerate(images):
            _paste(band, image, place(row, column))
    for column, lines in enumerate(texts):
        _write(band, place(len(rows), column), lines, "la")
    return band


def locate(row: int, column: int, size: tuple[int, int], left: int = LABEL_WIDTH) -> tuple[int, int]:
    """Return (left, top) of an image in the first band, for images (width, height) as they are drawn.

    `left` is the width of the titles.
    """
    width, height = size
    return left + column * (width + GUTTER), GUTTER + row * (height + GUTTER)


def _paste(band, image, position):
    """Draw an image and a line around it, which separates white images from the gutters."""
    (left, top), (height, width) = position, image.shape[:2]
    ImageDraw.Draw(band).rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)
    band.paste(Image.fromarray(image), position)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Return an image with each pixel repeated, if it is smaller than CELL."""
    factor = max(1, -(-CELL // max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text, each at most `width` pixels wide, and at most MAX_LINES."""
    lines = [""]
    for word in one_line(text).split() or [""]:
        if _measure(longer := f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = longer
        else:
            lines += _split(word, width)
    lines = [line for line in lines if line]
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[: MAX_LINES - 1], _shorten(lines[MAX_LINES - 1], width)]


def _split(word, width):
    """Return a word in pieces that fit: a text without spaces is one word."""
    pieces = [""]
    for letter in word:
        if _measure(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _shorten(line, width):
    while line and _measure(f"{line} ...") > width:
        line = line[:-1]
    return f"{line} ..."


def _wrap_label(title):
    return [line for part in title.split(", ") for line in wrap(part, LABEL_WIDTH - 2 * GUTTER)]


@cache
def _font():
    return ImageFont.load_default(FONT_SIZE)


def _measure(text):
    return _font().getlength(text)


def _write(image, position, lines, anchor):
    ImageDraw.Draw(image).multiline_text(
        position, "\n".join(lines), fill="black", font=_font(), anchor=anchor, spacing=LINE - FONT_SIZE
    )
