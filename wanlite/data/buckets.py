"""Resolution and aspect ratios -> the sizes of images that a run trains on."""

import re

WIDEST = 4  # aspect ratio of a bucket


def complete_resolution(resolution, unit=16):
    """Return --resolution as a run records it: one number for a square, else [width, height].

    Raises ValueError for sides that do not divide into tokens of `unit` pixels.
    """
    sides = [resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) not in (1, 2):
        raise ValueError(
            f"--resolution {' '.join(map(str, sides))}: expected one number, for a square, or WIDTH HEIGHT."
        )
    for side in sides:
        if side % unit or side <= 0:
            nearest = max(unit, round(side / unit) * unit)
            raise ValueError(f"--resolution {side} is not divisible by {unit}; the nearest is {nearest}.")
    return sides[0] if sides[0] == sides[-1] else sides


def bucket_sizes(size, aspect_ratios, unit=16):
    """Return the sizes (width, height) of about the area of `size` that have `aspect_ratios`, as "3:2"; None
    for `size` alone.

    Sides are multiples of `unit`; ratios that come out as one size are one bucket. Raises ValueError for what
    is no ratio.
    """
    if aspect_ratios is None:
        return [size]
    sizes, area = {}, size[0] * size[1]
    for said in aspect_ratios:
        sides = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", said)
        ratio = int(sides[1]) / int(sides[2]) if sides else 0
        if not 1 / WIDEST <= ratio <= WIDEST:
            raise ValueError(
                f"--aspect_ratios {said}: expected WIDTH:HEIGHT as 3:2, from 1:{WIDEST} to {WIDEST}:1."
            )
        width, height = (max(1, round((area * each) ** 0.5 / unit)) * unit for each in (ratio, 1 / ratio))
        sizes[width, height] = None
    return list(sizes)
