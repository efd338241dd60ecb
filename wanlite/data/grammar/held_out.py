"""A prompt -> whether it is held out: whether it names a subject and a place that never meet in training.

The rule reads the words of a prompt alone, so that it holds for every seed, and for prompts from elsewhere.
"""

import re
from collections.abc import Iterable
from functools import cache
from zlib import crc32

from .english import american, head_word, plural
from .templates import Template
from .vocabulary import read_vocabulary

ONE_OF = 60  # pairs of a subject and a place, one is held out
WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


def is_held_out(prompt: str) -> bool:
    """Return whether a prompt names a held-out pair of a subject and a place, in the singular or plural."""
    words = set(WORD.findall(prompt.lower()))
    subjects, places = _lexicon()
    found = {subjects[word] for word in words & subjects.keys()}
    return any(
        is_pair_held_out(subject, places[word]) for word in words & places.keys() for subject in found
    )


@cache
def is_pair_held_out(subject: str, place: str) -> bool:
    """Return whether a subject and a place, as words in the singular, are held out together."""
    return subject != place and crc32(f"{subject} {place}".encode()) % ONE_OF == 0


@cache
def _lexicon() -> tuple[dict[str, str], dict[str, str]]:
    """Return {form of a word: word} of the subjects and of the places of all scenes."""
    scenes = read_vocabulary().scenes
    nouns = (noun.lstrip("~=") for scene in scenes for cast in scene.casts for noun in cast.nouns)
    places = (entry for scene in scenes for entry in scene.lists.get("place", ()))
    return _forms(map(head_word, nouns)), _forms(map(_last_word, places))


def _last_word(place: Template) -> str:
    text = place[-1] if place and isinstance(place[-1], str) else ""
    return text.rpartition(" ")[2]


def _forms(words: Iterable[str]) -> dict[str, str]:
    """Return {spelling in singular or plural: word}."""
    forms = {}
    for word in sorted({each.lower() for each in words if each.strip()}):
        forms |= {spelled: word for each in (word, plural(word)) for spelled in (each, american(each))}
    return forms
