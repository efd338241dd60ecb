"""A prompt -> whether its words contradict each other: snow in June, a bearded girl, rain from a clear sky."""

import tomllib
from functools import cache

from .english import american, words_of
from .vocabulary import FOLDER


def contradicts_itself(prompt: str) -> bool:
    """Return whether a prompt has words of both sides of a contradiction."""
    masks, first_sides = _read_contradictions()
    words, found = words_of(prompt), 0
    for word in words:
        found |= masks.get(word, 0)
    for pair in zip(words, words[1:]):
        found |= masks.get(" ".join(pair), 0)
    return bool(found & found >> 1 & first_sides)


@cache
def _read_contradictions() -> tuple[dict[str, int], int]:
    """Return {word or two words: a bit for each side that has it}, and the bits of all first sides."""
    pairs = tomllib.loads((FOLDER / "contradictions.toml").read_text(encoding="utf-8"))
    masks: dict[str, int] = {}
    for bit, side in enumerate(pair[name] for pair in pairs.values() for name in ("one", "other")):
        for term in filter(None, map(str.strip, side.replace("\n", ";").split(";"))):
            for spelled in {term, american(term)}:
                masks[spelled] = masks.get(spelled, 0) | 1 << bit
    return masks, sum(1 << 2 * number for number in range(len(pairs)))
