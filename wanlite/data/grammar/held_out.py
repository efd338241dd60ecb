"""A prompt -> whether it is held out: whether it names a subject and a place that never meet in training.

The rule reads the words of a prompt alone, so that it holds for every seed, and for prompts from elsewhere.
"""

from collections.abc import Iterable
from functools import cache
from zlib import crc32

from .english import american, head_word, plural, words_of
from .templates import Template
from .vocabulary import read_vocabulary

ONE_OF = 60  # pairs of a subject and a place, one is held out


def is_held_out(prompt: str) -> bool:
    """Return whether a prompt names a held-out pair of a subject and a place, in the singular or plural."""
    words = set(words_of(prompt))
    subjects, places = lexicon()
    found = {subjects[word] for word in words & subjects.keys()}
    return any(not found.isdisjoint(held_out_with(places[word])) for word in words & places.keys())


@cache
def held_out_with(place: str) -> frozenset[str]:
    """Return the subjects that never meet this place in training; both are words in the singular."""
    subjects = set(lexicon()[0].values()) - {place}
    return frozenset(each for each in subjects if crc32(f"{each} {place}".encode()) % ONE_OF == 0)


@cache
def lexicon() -> tuple[dict[str, str], dict[str, str]]:
    """Return {form of a word: word} of the subjects and of the places of all scenes."""
    scenes = read_vocabulary().scenes
    casts = [cast for scene in scenes for cast in scene.casts]
    nouns = (noun.lstrip("~=") for cast in casts for noun in cast.nouns)
    lists = [each.lists for each in scenes] + [cast.lists for cast in casts]
    places = (entry for each in lists for entry in each.get("place", ()))
    return _forms(map(head_word, nouns)), _forms(map(_last_word, places))


def _last_word(place: Template) -> str:
    text = place[-1] if place and isinstance(place[-1], str) else ""
    return text.rpartition(" ")[2]


def _forms(words: Iterable[str]) -> dict[str, str]:
    """Return {spelling in singular or plural: word}."""
    forms: dict[str, str] = {}
    for word in sorted({each.lower() for each in words if words_of(each) == [each.lower()]}):
        forms |= {spelled: word for each in (word, plural(word)) for spelled in (each, american(each))}
    return forms
