"""An image and the scene of its caption -> a verdict, by comparison with all sprites at all allowed places.

The nearest drawing minimises the squared error: at half resolution over objects, styles, mirror images and
positions, then at full resolution among the FINALISTS. The difference from the background is D = colour - alpha
* background for a sprite, and P for an image:

    |P - D|^2 = |P|^2 - 2 <P, colour> + 2 <P * background, alpha> + |D|^2

Legend: T templates (objects x styles x 2), Q positions (49), K pixels along a sprite's side, h K/2.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from scipy import ndimage

from .scenes import BACKGROUNDS, IMAGE_SIZE, JITTER, PAIRS, PLACES, Scene, backdrop, corner
from .sprites import NAMES, SIZES, STYLES, sprites

ATTRIBUTES = ("object", "style", "count", "place", "background")
RIGHT = "seen"  # the verdict on an image that has everything that its caption names
MAX_RESIDUAL = 0.15  # largest squared error of an object relative to |D|^2 of its sprite
PRESENT = 0.7  # a place with at least this residual counts as empty; an empty one has 1
DETAIL = (0.7, 1.3)  # of a crisp image: ratio of the norms of the Laplacians of image and nearest drawing
FARTHEST_BACKGROUND = 25.0  # median distance in grey levels between the borders of image and background
STRAY = 40.0  # distance from the background in grey levels, averaged over 4 x 4 pixels outside the objects
MAX_STRAY = 3  # squares of 4 x 4 stray pixels; the smallest object covers a dozen
FINALISTS = 4  # templates compared at full resolution


@dataclass(frozen=True)
class Fit:
    """The nearest sprite at a place; `error` is its squared error minus that of an empty place."""

    error: float
    residual: float
    name: str
    style: str
    size: str
    place: str
    sprite: tuple  # corner x, y and D (K, K, 3)


def judge(image: np.ndarray, scene: Scene) -> dict[str, float]:
    """Compare an image with the scene of its caption, in which None allows any value.

    Returns a fraction 0..1 for each of ATTRIBUTES, `seen` (1 if all of them are 1, else 0), `whole` (1 if seen and
    no residual is above MAX_RESIDUAL, else 0), `residual` (mean over objects, 1 for an empty place, at most 2),
    `detail` (see DETAIL) and `crisp` (1 if it lies within DETAIL, else 0).
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"the judge reads images of {IMAGE_SIZE}x{IMAGE_SIZE}x3, found {image.shape}.")
    background, is_known = read_background(image)
    added = image - backdrop(background)
    fits = _fit_scene(added, background, scene)
    places = _find_places(added, background, scene, fits)
    residuals = [min(fit.residual, 2.0) for fit in fits]
    is_clear = _count_stray(added, fits) <= MAX_STRAY
    verdict = {
        "object": _share(fit.name == thing.name for fit, thing in zip(fits, scene.objects)),
        "style": _share(thing.style in (None, fit.style) for fit, thing in zip(fits, scene.objects)),
        "count": float(is_clear and max(residuals) < PRESENT),
        "place": _share(
            place and thing.place in (None, place) for place, thing in zip(places, scene.objects)
        ),
        "background": float(is_known and scene.background in (None, background)),
    }
    seen = float(min(verdict.values()) == 1)
    detail = _roughness(image) / _roughness(_redraw(background, fits))
    return verdict | {
        "seen": seen,
        "whole": float(seen and max(residuals) <= MAX_RESIDUAL),
        "residual": float(np.mean(residuals)),
        "detail": float(detail),
        "crisp": float(DETAIL[0] <= detail <= DETAIL[1]),
    }


def read_objects(image: np.ndarray, scene: Scene) -> list[Fit]:
    """Return the Fit of the nearest sprite, of any object and style, for each object of a scene."""
    background, _ = read_background(image)
    return _fit_scene(image - backdrop(background), background, scene)


# ---- reading -----------------------------------------------------------------------------------------------


def read_background(image: np.ndarray) -> tuple[str, bool]:
    """Return the background with the nearest border, and whether it is within FARTHEST_BACKGROUND."""
    border = _border(image)
    distances = {
        name: float(np.median(np.abs(border - _border(backdrop(name))).mean(1))) for name in BACKGROUNDS
    }
    nearest = min(distances, key=lambda name: distances[name])
    return nearest, distances[nearest] < FARTHEST_BACKGROUND


def _border(image, width=2):
    edges = image[:width], image[-width:], image[:, :width], image[:, -width:]
    return np.concatenate([edge.reshape(-1, 3) for edge in edges]).astype(np.float32)


def _fit_scene(added, background, scene):
    """Return the Fit of each object of a scene, over all sizes and places that the scene allows."""
    first = scene.objects[0]
    if scene.kind == "one":
        sizes, places = (
            (value,) if value else tuple(values)
            for value, values in ((first.size, SIZES), (first.place, PLACES))
        )
        fits = (fit(added, background, size, place) for size, place in product(sizes, places))
        return [min(fits, key=lambda fit: fit.error)]
    pairs = PAIRS if first.place is None else [tuple(thing.place for thing in scene.objects)]
    fitted = (
        [fit(added, background, thing.size, place) for thing, place in zip(scene.objects, places)]
        for places in pairs
    )
    return min(fitted, key=lambda fits: sum(fit.error for fit in fits))


def fit(added: np.ndarray, background: str, size: str, place: str) -> Fit:
    """Return the Fit of a size at a place; `added` (64, 64, 3) is P, the image minus its background."""
    corners = _corners(size, place)
    colour, alpha = _half_templates(size)  # (T, h*h*3), (T, h*h)
    behind, energy = _half_backdrops(background, size, place)  # (Q, h*h*3), (T, Q)
    windows = _half_windows(added, size, place)  # (Q, h*h*3)
    covered = (windows * behind).reshape(len(corners), -1, 3).sum(-1)  # (Q, h*h)
    errors = energy - 2 * (colour @ windows.T - alpha @ covered.T)  # (T, Q)
    finalists = np.argsort(errors.min(1))[:FINALISTS]
    candidates = (
        (template, corners[position])
        for template in finalists
        for position in np.argsort(errors[template])[:2]
    )
    return min(
        (_compare(added, background, size, place, *each) for each in candidates), key=lambda fit: fit.error
    )


def _compare(added, background, size, place, template, at):
    """Return the Fit of one template at one corner, at full resolution."""
    sprite = _difference(background, size, template, at)
    window = _window(added, size, at)
    energy = float(np.square(sprite).sum())
    distance = float(np.square(window - sprite).sum())
    name, style = divmod(int(template) // 2, len(STYLES))
    return Fit(
        distance - float(np.square(window).sum()),
        distance / max(energy, 1.0),
        NAMES[name],
        STYLES[style],
        size,
        place,
        (*at, sprite),
    )


def _find_places(added, background, scene, fits):
    """Return the place of each object, None if it is missing; a single object is also searched elsewhere."""
    thing = scene.objects[0]
    if scene.kind == "one" and thing.place and fits[0].residual > MAX_RESIDUAL:
        fits = _fit_scene(added, background, replace(scene, objects=(replace(thing, place=None),)))
    return [fit.place if fit.residual < PRESENT else None for fit in fits]


def _count_stray(added, fits):
    """Return the number of squares of 4 x 4 stray pixels, at least two pixels away from all objects."""
    outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    for x, y, sprite in (fit.sprite for fit in fits):
        outside[max(0, y - 2) : y + len(sprite) + 2, max(0, x - 2) : x + len(sprite) + 2] = False
    is_outside = outside.reshape(16, 4, 16, 4).all((1, 3))
    return int((is_outside & (np.abs(added).reshape(16, 4, 16, 4, 3).mean((1, 3, 4)) > STRAY)).sum())


def _redraw(background, fits):
    """Return the nearest drawing (64, 64, 3)."""
    image = backdrop(background).copy()
    for x, y, sprite in (fit.sprite for fit in fits):
        image[y : y + len(sprite), x : x + len(sprite)] += sprite
    return image


def _roughness(image):
    """Return the norm of an image's Laplacian, which blur reduces and noise increases."""
    return np.linalg.norm(ndimage.laplace(image.astype(np.float32), axes=(0, 1)))


def _share(values):
    return float(np.mean([bool(value) for value in values]))


# ---- templates ---------------------------------------------------------------------------------------------


@cache
def _templates(size):
    """Return colours (T, K, K, 3) times alpha, and alphas (T, K, K, 1), of all sprites and their mirror images."""
    both = (np.stack([values, values[:, :, :, ::-1]], 2) for values in sprites(size))
    return tuple(values.reshape(-1, *values.shape[3:]) for values in both)


@cache
def _half_templates(size):
    """Return colours (T, h*h*3) and alphas (T, h*h) at half resolution."""
    return tuple(
        _average_squares(values)[:, ::2, ::2].reshape(len(values), -1) for values in _templates(size)
    )


@cache
def _half_backdrops(background, size, place):
    """Return the background at each position (Q, h*h*3), and |D|^2 of each template there (T, Q)."""
    colour, alpha = _half_templates(size)
    behind = _half_windows(backdrop(background), size, place)  # (Q, h*h*3)
    by_pixel = behind.reshape(len(behind), -1, 3)
    crossed = (colour.reshape(len(colour), -1, 3) * alpha[..., None]).reshape(colour.shape)  # (T, h*h*3)
    energy = (
        np.square(colour).sum(1)[:, None]
        - 2 * crossed @ behind.T
        + np.square(alpha) @ np.square(by_pixel).sum(-1).T
    )
    return behind, energy


@cache
def _corners(size, place):
    """Return the Q possible corners x, y of an object of a size at a place."""
    x, y = corner(size, place)
    steps = range(-JITTER, JITTER + 1)
    return [(x + right, y + down) for down, right in product(steps, steps)]


def _half_windows(image, size, place):
    """Return the window of an image at each position, at half resolution: (Q, h*h*3)."""
    averaged = _average_squares(image)
    windows = np.stack([_window(averaged, size, at)[::2, ::2] for at in _corners(size, place)])
    return windows.reshape(len(windows), -1)


def _window(image, size, at):
    x, y = at
    return image[y : y + SIZES[size], x : x + SIZES[size]]


def _average_squares(pixels):
    """Average every 2 x 2 neighbours. Shapes: (..., H, W, C); returns (..., H-1, W-1, C)."""
    columns = pixels[..., 1:, :] + pixels[..., :-1, :]
    return (columns[..., 1:, :, :] + columns[..., :-1, :, :]) / 4


def _difference(background, size, template, at):
    """Return D of a template at a corner (K, K, 3)."""
    colour, alpha = (values[template] for values in _templates(size))
    return colour - alpha * _window(backdrop(background), size, at)
