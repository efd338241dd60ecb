"""Scenes -> captions that omit some properties -> scenes in which these are None."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.random import Generator

from .scenes import BACKGROUNDS, PAIRS, PLACES, Object, Scene, is_held_out, random_scene
from .sprites import NAMES, SIZES, STYLES

OMITTED = 0.25  # chance that a caption omits each style, size, place and background
IRREGULAR = {"mouse": "mice", "fish": "fish", "sheep": "sheep", "snowman": "snowmen"}
GROUNDS = {  # phrases of backgrounds; others are "on white"
    "sky": "in the sky",
    "sunset": "at sunset",
    "night": "at night",
    "meadow": "in a meadow",
}

ONE = ("{a} {place} {ground}", "{ground}, {a} {place}", "{place} {ground}, {a}")
PAIR = {
    ("left", "right"): (
        "{a} left of {b} {ground}",
        "{b} right of {a} {ground}",
        "{ground}, {a} left of {b}",
        "{a} at the left and {b} at the right {ground}",
        "{ground}, {b} at the right and {a} at the left",
    ),
    ("top", "bottom"): (
        "{a} above {b} {ground}",
        "{b} below {a} {ground}",
        "{ground}, {b} below {a}",
        "{a} at the top and {b} at the bottom {ground}",
        "{ground}, {b} at the bottom and {a} at the top",
    ),
}
TWO = ("two {many} {place} {ground}", "{ground}, two {many} {place}", "a pair of {many} {place} {ground}")
TWO_PLACES = {("left", "right"): "side by side", ("top", "bottom"): "one above the other"}


# ---- a scene -> captions -----------------------------------------------------------------------------------


def captions(seed: int, count: int, held_out: bool = False, num_objects: int | None = None) -> list[str]:
    """Return `count` captions for training, or held-out ones; no caption is both."""
    random = np.random.default_rng([seed, int(held_out), num_objects or 0, 7])
    found: list[str] = []
    while len(found) < count:
        partial = omit_properties(random_scene(random, num_objects), random)
        if is_held_out(partial) == held_out:
            found.append(_choose(all_captions(partial), random))
    return found


def caption(scene: Scene, random: Generator) -> str:
    """Return a random training caption of a training scene; raises ValueError for a held-out scene."""
    if is_held_out(scene):
        raise ValueError(f"{scene}: held out, expected a training scene. Take one from scenes().")
    partial = omit_properties(scene, random)
    while is_held_out(partial):
        partial = omit_properties(scene, random)
    return _choose(all_captions(partial), random)


def omit_properties(scene: Scene, random: Generator) -> Scene:
    """Return a scene in which each style, size, place and background is None with a chance of OMITTED.

    Two objects of a kind keep or lose a property together. Two different objects keep their places, and two
    objects keep their size, which is always small.
    """

    def omit(value):
        return None if random.random() < OMITTED else value

    background = omit(scene.background)
    if scene.kind == "one":
        thing = scene.objects[0]
        return Scene(
            (Object(thing.name, omit(thing.style), omit(thing.size), omit(thing.place)),), background
        )
    if scene.kind == "pair":
        return Scene(tuple(replace(thing, style=omit(thing.style)) for thing in scene.objects), background)
    style = omit(scene.objects[0].style)
    is_placed = omit(True)
    places = (thing.place if is_placed else None for thing in scene.objects)
    return Scene(
        tuple(replace(thing, style=style, place=place) for thing, place in zip(scene.objects, places)),
        background,
    )


def all_captions(scene: Scene) -> list[str]:
    """Return all captions that mention exactly the properties of a scene that are not None."""
    first, last = scene.objects[0], scene.objects[-1]
    size = first.size if scene.kind == "one" else None
    values = {
        "a": _with_article(size, first.style, first.name),
        "b": _with_article(None, last.style, last.name),
        "many": _join(first.style, PLURALS[first.name]),
        "place": _place_phrase(scene),
    }
    captions = (
        _tidy(template.format(ground=phrase, **values))
        for template in _templates(scene)
        for phrase in _ground_phrases(scene.background)
    )
    return list(dict.fromkeys(captions))


def _templates(scene):
    return {"one": ONE, "two": TWO, "pair": PAIR.get(_places(scene))}[scene.kind]


def _places(scene):
    return tuple(thing.place for thing in scene.objects)


def _ground_phrases(background):
    if background is None:
        return ("",)
    return f"on a {background} background", GROUNDS.get(background, f"on {background}")


def _place_phrase(scene):
    if scene.kind != "one":
        return TWO_PLACES.get(_places(scene), "")
    return f"at the {scene.objects[0].place}" if scene.objects[0].place else ""


def _with_article(*words):
    phrase = _join(*words)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _join(*words):
    return " ".join(filter(None, words))


def _tidy(text):
    """Remove the spaces and commas around omitted properties."""
    return " ".join(text.replace(" ,", ",").split()).strip(", ")


def _choose(captions, random):
    return captions[random.integers(len(captions))]


def plural(word: str) -> str:
    """Return the plural of an object's name."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if re.search("(s|x|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s"


PLURALS = {name: plural(name) for name in NAMES}


# ---- a caption -> a scene ----------------------------------------------------------------------------------


def read_caption(text: str) -> Scene | None:
    """Return the scene of a caption, with None for omitted properties; returns None for any other text."""
    text = " ".join(text.lower().split())
    return next((scene for scene in _candidates(text) if text in all_captions(scene)), None)


def _candidates(text):
    """Yield all scenes with the objects and properties of a text; all_captions() decides between them."""
    words = text.replace(",", "").split()
    background, place = (
        next((name for name in names if name in words), None) for names in (BACKGROUNDS, PLACES)
    )
    found = [(_SINGULAR.get(noun, noun), style, size) for size, style, noun in _THING.findall(text)]
    things = [(noun, style or None, size or None) for noun, style, size in found]
    if len(things) == 1:
        noun, style, size = things[0]
        yield Scene((Object(noun, style, size, place),), background)
        for places in (*PAIRS, (None, None)):
            yield Scene(tuple(Object(noun, style, "small", each) for each in places), background)
    if len(things) == 2:
        for pair, places in product((things, things[::-1]), PAIRS):
            yield Scene(
                tuple(Object(noun, style, "small", each) for (noun, style, _), each in zip(pair, places)),
                background,
            )


def _any_of(words):
    return "|".join(sorted(words, key=len, reverse=True))


_SINGULAR = {many: name for name, many in PLURALS.items()}
_THING = re.compile(
    rf"\b(?:({_any_of(SIZES)}) )?(?:({_any_of(STYLES)}) )?({_any_of({*NAMES, *_SINGULAR})})\b"
)
