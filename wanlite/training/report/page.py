"""run.json, metrics.jsonl and samples/ of a run -> report.html, one file that a browser opens without a network.

python -m wanlite.training.report.page outputs/wan_t2i     # write it again
"""

import base64
import re
import sys
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from ...files.atomic import write_bytes
from ...files.file_names import REPORT, SAMPLES
from ...runtime.terminal import one_line
from ..run_folder import read_run
from . import tables
from .charts import thin
from .curves import make_charts
from .history import format_steps, read_history

MAX_GRIDS = 24
MAX_IMAGE_BYTES = 6_000_000  # of all grids; base64 adds a third
SCALES = (1, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)  # of a grid that is too large
MAX_PIXELS_PER_BYTE = 8  # more pixels are not tried: images take more than a bit for each
MAX_TEXT = 300  # characters of a prompt or a setting
NUMBER = re.compile(r"step-(\d+)\.png")
FLAG = re.compile(r"(--\w+)")


class GridImage(NamedTuple):
    """The grid of a step for the page."""

    step: int
    uri: str
    width: int


def write_report(folder: str | Path) -> None:
    """Write report.html in the folder of a run, atomically."""
    write_bytes(Path(folder) / REPORT, render(folder).encode("utf-8", "replace"))


def render(folder: str | Path) -> str:
    """Return the page of a run; every text in it is escaped."""
    folder = Path(folder)
    history = read_history(folder, read_run(folder))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shorten": shorten, "format_steps": format_steps, "split_at_flags": FLAG.split}
    return environment.get_template("template.html").render(
        name=folder.absolute().name,
        history=history,
        tables=tables,
        charts=make_charts(history),
        grids=embed_grids(folder / SAMPLES, {each.step for each in history.validations}),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def shorten(value: Any) -> str:
    """Return a value of the settings, or a prompt, as one short line."""
    values = value if isinstance(value, list) else [value]
    return one_line(", ".join(map(str, values)), MAX_TEXT)


def embed_grids(folder: Path, validated: set[int]) -> list[GridImage]:
    """Return the grids of the validated steps as data URIs, at most MAX_GRIDS; broken files are left out."""
    found = {int(match[1]): path for path in folder.glob("*") if (match := NUMBER.fullmatch(path.name))}
    steps = thin(sorted(found.keys() & validated), MAX_GRIDS)
    grids = (_embed(step, found[step], MAX_IMAGE_BYTES // len(steps)) for step in steps)
    return [grid for grid in grids if grid]


def _embed(step, path, limit):
    try:
        content, kind = path.read_bytes(), "png"
        with Image.open(BytesIO(content)) as image:
            width = image.width
            if len(content) > limit:
                content, kind = compress(image, limit), "jpeg"
    except (OSError, SyntaxError, ValueError):  # Pillow raises each of them for broken files
        return None
    return GridImage(step, f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width)


def compress(image: Image.Image, limit: int) -> bytes:
    """Return an image as a JPEG of at most `limit` bytes, scaled down if necessary, or the smallest of SCALES."""
    pixels = image.width * image.height
    fitting = [scale for scale in SCALES if pixels * scale**2 <= MAX_PIXELS_PER_BYTE * limit]
    for scale in fitting or SCALES[-1:]:
        size = [max(1, round(side * scale)) for side in image.size]
        image.convert("RGB").resize(size).save(content := BytesIO(), "JPEG", quality=85)
        if content.tell() <= limit:
            break
    return content.getvalue()


if __name__ == "__main__":
    for run_folder in sys.argv[1:]:
        write_report(run_folder)
