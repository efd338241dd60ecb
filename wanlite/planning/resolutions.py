"""Image sizes -> the shapes of their latents, by resolution."""

import math
from typing import NamedTuple

Size = tuple[int, int]  # (width, height) in pixels
LatentShape = tuple[int, int, int]  # (C, H, W)


class Resolution(NamedTuple):
    """The images of one resolution: those of `size` are validated, those of each bucket are trained on."""

    size: Size
    buckets: list[Size]
    latent_shape: LatentShape
    bucket_shapes: list[LatentShape]
    tokens: int  # of a validated image

    @property
    def largest_shape(self) -> LatentShape:
        return max(self.latent_shape, *self.bucket_shapes, key=math.prod)


def make_resolutions(sizes: list[list[Size]], stride: int, channels: int, config) -> list[Resolution]:
    """Return the Resolution of each list in `sizes`, whose first size is validated.

    `stride` is the side in pixels of a latent value, `config` that of the student. Raises ValueError for a side
    with more tokens than the rotary table has positions.
    """
    _check_sides([size for own in sizes for size in own], stride, config)
    resolutions = []
    for own in sizes:
        shapes = [(channels, height // stride, width // stride) for width, height in own]
        tokens = math.prod(shapes[0][1:]) // math.prod(config.patch_size)
        resolutions.append(Resolution(own[0], own[1:], shapes[0], shapes[1:], tokens))
    return resolutions


def _check_sides(sizes, stride, config):
    largest = max(map(max, sizes))
    limit = stride * config.patch_size[1] * config.rope_max_seq_len
    if largest > limit:
        raise ValueError(
            f"--resolution: a side of {largest:,} pixels is more than this teacher supports; the limit is "
            f"{limit:,}. Lower it, or choose other --aspect_ratios."
        )
