"""Resolution and aspect ratios -> the image sizes of training."""

import re
from collections.abc import Sequence
from typing import Any

MAX_SIDE = 2**20  # pixels: products of two are exact
MAX_RATIO = 4  # of the longer side to the shorter


def complete_resolution(resolution: int | Sequence[int], unit: int = 16) -> int | list[int]:
    """Return --resolution as run.json stores it: one number for a square, else [width, height].

    Raises ValueError for sides that are not multiples of `unit` pixels, the side of a token.
    """
    sides: list[Any] = list(resolution) if isinstance(resolution, (list, tuple)) else [resolution]
    if len(sides) not in (1, 2) or any(type(side) is not int for side in sides):
        raise ValueError(
            f"--resolution {' '.join(map(str, sides[:3])):.60}: expected one number, for a square, or WIDTH HEIGHT."
        )
    for side in sides:
        if side > MAX_SIDE:
            raise ValueError(
                f"--resolution {side!s:.40} is more than {MAX_SIDE:,}, the largest side in pixels."
            )
        if side % unit or side <= 0:
            nearest = max(unit, round(side / unit) * unit)
            raise ValueError(f"--resolution {side} is not divisible by {unit}; the nearest is {nearest}.")
    return sides[0] if sides[0] == sides[-1] else sides


def bucket_sizes(
    size: tuple[int, int], aspect_ratios: Sequence[str] | None, unit: int = 16
) -> list[tuple[int, int]]:
    """Return a size (width, height) of about the area of `size` for each of `aspect_ratios`, such as "3:2".

    Without ratios, `size` is the only one. Sides are multiples of `unit`; ratios that round to the same size
    share a bucket. Raises ValueError for a text that is not a ratio.
    """
    if aspect_ratios is None:
        return [size]
    sizes: dict[tuple[int, int], None] = {}
    area = size[0] * size[1]
    for text in aspect_ratios:
        sides = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text)
        ratio = int(sides[1]) / int(sides[2]) if sides else 0
        if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
            raise ValueError(
                f"--aspect_ratios {text:.40}: expected WIDTH:HEIGHT such as 3:2, from 1:{MAX_RATIO} to {MAX_RATIO}:1."
            )
        width, height = (max(1, round((area * each) ** 0.5 / unit)) * unit for each in (ratio, 1 / ratio))
        sizes[width, height] = None
    return list(sizes)
