"""A seed -> scenes for training or held-out ones, and a scene -> its image.

A scene has one object, small or large, at one of five places, or two small objects in opposite halves, different
or of a kind. Drawings of a scene vary: objects may be mirrored, and are moved by up to JITTER pixels.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator

from ..sampling import pick, sample_scenes
from .sprites import NAMES, SIZES, STYLES, sprites

IMAGE_SIZE = 64  # pixels, square
JITTER = 3  # pixels in each direction, on both axes
PLACES = {  # steps from the centre: x, y
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
PAIRS = (("left", "right"), ("top", "bottom"))
KINDS = ("one", "pair", "two")  # one object, two different ones, two of a kind
KIND_SHARES = (0.45, 0.4, 0.15)
MIN_CONTRAST = 35.0  # mean distance in grey levels between a sprite and its background
COLOURS = {
    "white": (243, 243, 243),
    "grey": (128, 128, 128),
    "black": (18, 18, 18),
    "pink": (245, 170, 190),
    "blue": (50, 90, 200),
    "yellow": (245, 220, 110),
}
GRADIENTS = {  # colours at the top and at the bottom
    "sky": ((90, 160, 235), (235, 245, 252)),
    "sunset": ((80, 40, 120), (250, 160, 70)),
    "night": ((10, 12, 40), (60, 50, 110)),
}
MEADOW = ((150, 205, 245), (225, 242, 252)), ((40, 120, 40), (120, 190, 70))  # gradients of sky and grass
HORIZON = 38.5  # pixels from the top; the edge is two pixels wide
BACKGROUNDS = (*COLOURS, *GRADIENTS, "meadow")


@dataclass(frozen=True)
class Object:
    """An object; None stands for a property that a caption omits."""

    name: str
    style: str | None
    size: str | None
    place: str | None


@dataclass(frozen=True)
class Scene:
    """One object, or two in the order of PAIRS (left before right, top before bottom), on a background."""

    objects: tuple[Object, ...]
    background: str | None

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if len(self.objects) == 1:
            return "one"
        return "two" if self.objects[0].name == self.objects[1].name else "pair"


# ---- scenes ------------------------------------------------------------------------------------------------


def random_scene(random: Generator, num_objects: int | None = None) -> Scene:
    """Return a random scene; kinds have the chances KIND_SHARES unless `num_objects` is given."""
    kind = random.choice(KINDS, p=KIND_SHARES)
    while num_objects is not None and (kind == "one") != (num_objects == 1):
        kind = random.choice(KINDS, p=KIND_SHARES)
    if kind == "one":
        objects = (
            Object(pick(random, NAMES), pick(random, STYLES), pick(random, SIZES), pick(random, PLACES)),
        )
    else:
        objects = _two_objects(random, kind == "two")
    background = pick(random, BACKGROUNDS)
    while any(contrast(thing, background) < MIN_CONTRAST for thing in objects):
        background = pick(random, BACKGROUNDS)
    return Scene(objects, background)


def _two_objects(random, are_alike):
    first, second = ((pick(random, NAMES), pick(random, STYLES)) for _ in range(2))
    while second[0] == first[0]:
        second = pick(random, NAMES), second[1]
    places = PAIRS[random.integers(len(PAIRS))]
    return Object(*first, "small", places[0]), Object(*(first if are_alike else second), "small", places[1])


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of objects, styles and places is held out of training (one in eight is).

    Training has all objects in all styles, because the appearance of an object in a style does not follow from
    others.
    """
    index = 0
    for weight, thing in zip((1, 2), scene.objects):
        index += weight * (
            NAMES.index(thing.name) + 3 * _index(STYLES, thing.style) + 5 * _index(PLACES, thing.place)
        )
    return index % 8 == 0


def scenes(seed: int, count: int, held_out: bool = False, num_objects: int | None = None) -> list[Scene]:
    """Return `count` scenes for training, or held-out ones; see sample_scenes()."""
    return sample_scenes(random_scene, is_held_out, seed, count, held_out, num_objects)


def _index(values, value):
    """Return the index of a value, or the number of values for None."""
    return len(values) if value is None else tuple(values).index(value)


# ---- drawing -----------------------------------------------------------------------------------------------


def draw(scene: Scene, random: Generator | None = None) -> np.ndarray:
    """Draw a scene as an image (64, 64, 3) uint8; with `random`, objects are mirrored and moved at random."""
    image = backdrop(scene.background).copy()
    for thing in scene.objects:
        _paste(image, thing, random)
    return image.clip(0, 255).round().astype(np.uint8)


def _paste(image, thing, random):
    x, y = corner(thing.size, thing.place)
    colour, alpha = (
        values[NAMES.index(thing.name), STYLES.index(thing.style)] for values in sprites(thing.size)
    )
    if random is not None:
        x, y = np.array([x, y]) + random.integers(-JITTER, JITTER + 1, 2)
        if random.random() < 0.5:
            colour, alpha = colour[:, ::-1], alpha[:, ::-1]
    window = image[y : y + SIZES[thing.size], x : x + SIZES[thing.size]]
    window[:] = window * (1 - alpha) + colour


def ground(scene: Scene) -> np.ndarray:
    """Return the background of a scene (64, 64, 3), float32."""
    return backdrop(scene.background)


def corner(size: str, place: str) -> tuple[int, ...]:
    """Return the top left corner x, y of an object at its place, at least JITTER pixels inside the image.

    Different places have different positions, and the two objects of a pair do not overlap.
    """
    margin = (IMAGE_SIZE - SIZES[size]) // 2
    return tuple(margin + step * (margin - JITTER) for step in PLACES[place])


@cache
def backdrop(background: str) -> np.ndarray:
    """Return a background (64, 64, 3), float32, read-only."""
    if background in COLOURS:
        image = _gradient(COLOURS[background], COLOURS[background])
    elif background in GRADIENTS:
        image = _gradient(*GRADIENTS[background])
    else:
        sky, grass = (_gradient(*ends) for ends in MEADOW)
        below = ((np.arange(IMAGE_SIZE, dtype=np.float32) - HORIZON) / 2 + 0.5).clip(0, 1)[:, None, None]
        image = (1 - below) * sky + below * grass
    image.flags.writeable = False
    return image


def _gradient(top, bottom):
    down = np.linspace(0, 1, IMAGE_SIZE, dtype=np.float32)[:, None, None]
    return np.broadcast_to(
        (1 - down) * np.float32(top) + down * np.float32(bottom), (IMAGE_SIZE, IMAGE_SIZE, 3)
    ).copy()


def contrast(thing: Object, background: str) -> float:
    """Return the mean difference in grey levels between an object's pixels and the background behind them."""
    return _contrasts(thing.size, thing.place, background)[NAMES.index(thing.name), STYLES.index(thing.style)]


@cache
def _contrasts(size, place, background):
    colour, alpha = sprites(size)
    x, y = corner(size, place)
    window = backdrop(background)[y : y + SIZES[size], x : x + SIZES[size]]
    return np.abs(colour - alpha * window).mean((2, 3, 4)) / alpha.mean((2, 3, 4))
