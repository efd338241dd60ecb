"""The world of shapes: captioned scenes drawn by rule, and a judge that reads the scene of an image by rule.

A scene has one object at one of five places, or two objects in opposite halves. An object has a size, a colour
and a shape; the background has a colour. One combination in eight is held out of all training captions.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from .sampling import pick, sample_scenes

IMAGE_SIZE = 64  # pixels, square
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (160, 50, 190),
    "cyan": (50, 205, 225),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
SIZES = {"small": 10.0, "large": 13.5}  # radius in pixels
PLACES = {  # x, y in pixels
    "center": (32, 32),
    "left": (16, 32),
    "right": (48, 32),
    "top": (32, 16),
    "bottom": (32, 48),
}
PAIRS = (("left", "right"), ("top", "bottom"))
JITTER = 1.0  # pixels in each direction, on both axes

ONE_OBJECT = (
    "a {a} at the {place} on a {background} background",
    "on a {background} background, a {a} at the {place}",
    "at the {place}, a {a} on {background}",
    "{background} background with a {a} at the {place}",
)
TWO_OBJECTS = {
    ("left", "right"): (
        "a {a} left of a {b} on a {background} background",
        "a {b} right of a {a} on a {background} background",
        "on a {background} background, a {a} at the left and a {b} at the right",
        "{background} background with a {b} at the right and a {a} at the left",
    ),
    ("top", "bottom"): (
        "a {a} above a {b} on a {background} background",
        "a {b} below a {a} on a {background} background",
        "on a {background} background, a {a} at the top and a {b} at the bottom",
        "{background} background with a {b} at the bottom and a {a} at the top",
    ),
}


@dataclass(frozen=True)
class Object:
    """A shape with its properties, which are keys of the tables above."""

    size: str
    colour: str
    shape: str
    place: str

    def __str__(self):
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object, or two in the order of PAIRS (left before right, top before bottom), on a background."""

    objects: tuple[Object, ...]
    background: str


# ---- scenes ------------------------------------------------------------------------------------------------


def random_scene(random: Generator, num_objects: int | None = None) -> Scene:
    """Return a random scene; one or two objects are equally likely unless `num_objects` is given."""
    num_objects = num_objects or int(random.integers(1, 3))
    places = (pick(random, PLACES),) if num_objects == 1 else PAIRS[random.integers(len(PAIRS))]
    objects = tuple(
        Object(pick(random, SIZES), pick(random, COLOURS), pick(random, SHAPES), place) for place in places
    )
    return Scene(objects, pick(random, BACKGROUNDS))


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of places, colours and shapes is held out of training (one in eight is)."""
    index = 0
    for weight, thing in zip((1, 3), scene.objects):
        index += weight * (
            list(COLOURS).index(thing.colour)
            + 3 * SHAPES.index(thing.shape)
            + 5 * list(PLACES).index(thing.place)
        )
    return index % 8 == 0


def scenes(seed: int, count: int, held_out: bool = False, num_objects: int | None = None) -> list[Scene]:
    """Return `count` scenes for training, or held-out ones; see sample_scenes()."""
    return sample_scenes(random_scene, is_held_out, seed, count, held_out, num_objects)


def caption(scene: Scene, random: Generator) -> str:
    """Return a random caption of a scene."""
    return pick(random, all_captions(scene))


def all_captions(scene: Scene) -> list[str]:
    """Return every caption of a scene."""
    values = {"a": scene.objects[0], "background": scene.background, "place": scene.objects[0].place}
    if len(scene.objects) == 1:
        return [template.format(**values) for template in ONE_OBJECT]
    first, second = scene.objects
    return [template.format(b=second, **values) for template in TWO_OBJECTS[first.place, second.place]]


def captions(seed: int, count: int, held_out: bool = False, num_objects: int | None = None) -> list[str]:
    """Return `count` captions; see scenes()."""
    random = np.random.default_rng([seed, 7])
    return [caption(scene, random) for scene in scenes(seed, count, held_out, num_objects)]


def read_caption(text: str) -> Scene | None:
    """Return the scene of a caption, None for any other text."""
    for pattern, places in _CAPTION_PATTERNS:
        match = pattern.fullmatch(text.strip().lower())
        if match:
            values = match.groupdict()
            places = places or (values["place"],)
            objects = (_read_object(values[name], place) for name, place in zip("ab", places))
            return Scene(tuple(objects), values["background"])
    return None


def _read_object(text, place):
    size, colour, shape = text.split()
    return Object(size, colour, shape, place)


def _caption_patterns():
    """Return (pattern, places of the objects) of all captions; None: the place is in the caption."""

    def any_of(words):
        return "(?:" + "|".join(words) + ")"

    thing = f"{any_of(SIZES)} {any_of(COLOURS)} {any_of(SHAPES)}"
    groups = {
        "a": f"(?P<a>{thing})",
        "b": f"(?P<b>{thing})",
        "place": f"(?P<place>{any_of(PLACES)})",
        "background": f"(?P<background>{any_of(BACKGROUNDS)})",
    }
    templates: list[tuple[str, tuple[str, str] | None]] = [(template, None) for template in ONE_OBJECT]
    templates += [(template, pair) for pair in PAIRS for template in TWO_OBJECTS[pair]]
    return [(re.compile(template.format(**groups)), places) for template, places in templates]


_CAPTION_PATTERNS = _caption_patterns()


# ---- drawing -----------------------------------------------------------------------------------------------

_Y, _X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5  # pixel centres


def coverage(shape: str, radius: float, x: float, y: float) -> np.ndarray:
    """Return the coverage (64, 64), 0..1, of each pixel by a shape centred at x, y, from its signed distance."""
    across, down = _X - x, _Y - y
    if shape == "circle":
        distance = np.hypot(across, down) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(across, down) - 0.74 * radius) - 0.26 * radius
    elif shape == "square":
        distance = np.maximum(abs(across), abs(down)) - 0.85 * radius
    elif shape == "cross":
        arm, width = radius, 0.32 * radius
        distance = np.minimum(
            np.maximum(abs(across) - arm, abs(down) - width), np.maximum(abs(across) - width, abs(down) - arm)
        )
    elif shape == "triangle":  # equilateral, point up, centred on its centroid
        slope = 0.5 * np.sqrt(3.0) * abs(across) - 0.5 * down
        distance = np.maximum(slope, down) - 0.53 * radius
    else:
        raise ValueError(f"shape {shape!r} is unknown, expected one of {', '.join(SHAPES)}.")
    return np.clip(0.5 - distance, 0, 1)


def draw(scene: Scene, random: Generator | None = None) -> np.ndarray:
    """Draw a scene as an image (64, 64, 3) uint8; `random` moves each object by up to JITTER pixels."""
    image = ground(scene)
    for thing in scene.objects:
        x, y = map(float, PLACES[thing.place])
        if random is not None:
            x, y = np.array([x, y]) + random.uniform(-JITTER, JITTER, 2)
        covered = coverage(thing.shape, SIZES[thing.size], x, y)[..., None]
        image = covered * _rgb(COLOURS[thing.colour]) + (1 - covered) * image
    return image.round().astype(np.uint8)


def ground(scene: Scene) -> np.ndarray:
    """Return the background of a scene (64, 64, 3), float32."""
    return np.broadcast_to(_rgb(BACKGROUNDS[scene.background]), (IMAGE_SIZE, IMAGE_SIZE, 3))


def _rgb(colour):
    return np.array(colour, np.float32)


# ---- the judge ---------------------------------------------------------------------------------------------

MIN_OVERLAP = 0.78  # intersection over union with the best template; below it, the shape is unknown
MIN_AREA = 40  # pixels; the smallest shape covers 145
SOFTEST_EDGE = 3.0  # pixels across an edge with coverage from 0.25 to 0.75; a sharp edge has 0.5
MAX_SPECKLED = 0.3  # fraction of an object's inside that may differ from its colour
FARTHEST_PLACE = 6.0  # pixels between an object's centroid and its place
FARTHEST_COLOUR = 60.0  # RGB distance of the colour of an object or background from the palette
ATTRIBUTES = ("count", "background", "colour", "shape", "size", "place")
RIGHT = "whole"  # the verdict on an image that has everything that its caption names


def read_image(image: np.ndarray) -> Scene | None:
    """Return the scene of an image (64, 64, 3) uint8, None if it does not show a scene of this world.

    Images with a stray blob, an unknown shape or an unknown colour do not show one.
    """
    background, things, is_clean = _read_things(image)
    if background is None or not is_clean or None in things or not 1 <= len(things) <= 2:
        return None
    places = tuple(thing.place for thing in things)
    if len(things) == 2 and places not in PAIRS:
        return None
    return Scene(tuple(things), background)


def judge(image: np.ndarray, scene: Scene) -> dict[str, float]:
    """Compare an image with the scene of its caption: {"whole": 0 or 1, each of ATTRIBUTES: fraction 0..1}."""
    background, things, _ = _read_things(image)
    by_place = {thing.place: thing for thing in things if thing is not None}
    verdict = {
        "whole": float(read_image(image) == scene),
        "count": float(len(things) == len(scene.objects)),
        "background": float(background == scene.background),
    }
    for attribute in ("colour", "shape", "size"):
        verdict[attribute] = float(
            np.mean(
                [
                    getattr(by_place.get(thing.place), attribute, None) == getattr(thing, attribute)
                    for thing in scene.objects
                ]
            )
        )
    verdict["place"] = float(np.mean([thing.place in by_place for thing in scene.objects]))
    return verdict


def _read_things(image):
    """Return the name of the background, the objects in the order of PLACES (None: unknown), and is_clean.

    An image is clean if it has no stray pixels.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"the judge reads images of {IMAGE_SIZE}x{IMAGE_SIZE}x3, found {image.shape}.")
    smooth = ndimage.median_filter(image, size=(3, 3, 1)).astype(np.float32)
    border = np.concatenate(
        [
            smooth[:3].reshape(-1, 3),
            smooth[-3:].reshape(-1, 3),
            smooth[:, :3].reshape(-1, 3),
            smooth[:, -3:].reshape(-1, 3),
        ]
    )
    ground = np.median(border, axis=0)
    background = _nearest(ground, BACKGROUNDS)
    if background is None:
        return None, [], False
    differs = np.linalg.norm(smooth - ground, axis=-1) > 45
    labels, count = ndimage.label(differs, structure=np.ones((3, 3)))
    things, leftover = [], 0
    for label in range(1, count + 1):
        area = int((labels == label).sum())
        if area < MIN_AREA:
            leftover += area
        else:
            things.append(_read_thing(image.astype(np.float32), labels == label, ground))
    things.sort(key=lambda thing: list(PLACES).index(thing.place) if thing else len(PLACES))
    return background, things, leftover <= 12


def _read_thing(image, region, ground):
    """Return the object in a connected region, None if it is unknown."""
    core = ndimage.binary_erosion(region, iterations=2)
    core = core if core.sum() >= 12 else region
    found_colour = np.median(image[core], axis=0)
    colour = _nearest(found_colour, COLOURS)
    if colour is None:
        return None
    span = found_colour - ground
    contrast = float(np.linalg.norm(_rgb(COLOURS[colour]) - ground))
    farthest = min(FARTHEST_COLOUR, 0.4 * contrast)  # faded objects are unknown
    faded = np.linalg.norm(found_colour - _rgb(COLOURS[colour])) > farthest
    if faded or np.mean(np.linalg.norm(image[core] - found_colour, axis=-1) > farthest) > MAX_SPECKLED:
        return None
    share = (image - ground) @ span / (span @ span)  # of the object's colour in each pixel
    share = share * ndimage.binary_dilation(region, iterations=2)
    covered = _sharpen(share)
    x = float((_X * covered).sum() / covered.sum())
    y = float((_Y * covered).sum() / covered.sum())
    overlap, shape, size = max(
        (_overlap(covered, _sharpen(coverage(shape, radius, x, y))), shape, size)
        for shape in SHAPES
        for size, radius in SIZES.items()
    )
    template = coverage(shape, SIZES[size], x, y) > 0.5
    edge_width = ((share > 0.25) & (share < 0.75)).sum() / (
        template & ~ndimage.binary_erosion(template)
    ).sum()
    place = min(PLACES, key=lambda name: np.hypot(PLACES[name][0] - x, PLACES[name][1] - y))
    far = np.hypot(PLACES[place][0] - x, PLACES[place][1] - y)
    if overlap < MIN_OVERLAP or edge_width > SOFTEST_EDGE or far > FARTHEST_PLACE:
        return None
    return Object(size, colour, shape, place)


def _sharpen(covered):
    """Steepen soft edges, so that slight blur reduces the overlap only slightly."""
    return np.clip(0.5 + 2.5 * (covered - 0.5), 0, 1)


def _overlap(covered, template):
    """Return the intersection over union of two coverages."""
    return np.minimum(covered, template).sum() / np.maximum(covered, template).sum()


def _nearest(colour, palette):
    """Return the name of the nearest colour of a palette, None if it is beyond FARTHEST_COLOUR."""
    distance, name = min((float(np.linalg.norm(colour - _rgb(rgb))), name) for name, rgb in palette.items())
    return name if distance <= FARTHEST_COLOUR else None
