"""A seed -> scenes of a world, for training or held out."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.random import Generator

Scene = TypeVar("Scene")
Value = TypeVar("Value")


def sample_scenes(
    random_scene: Callable[[Generator, int | None], Scene],
    is_held_out: Callable[[Scene], bool],
    seed: int,
    count: int,
    held_out: bool = False,
    num_objects: int | None = None,
) -> list[Scene]:
    """Return `count` scenes, all for training or all held out; the same seed gives the same scenes."""
    random = np.random.default_rng([seed, int(held_out), num_objects or 0])
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(random, num_objects)
        if is_held_out(scene) == held_out:
            found.append(scene)
    return found


def pick(random: Generator, values: Iterable[Value]) -> Value:
    """Return a random one of the values."""
    choices = tuple(values)
    return choices[random.integers(len(choices))]
