"""Text with slots -> a template, and a template -> text.

`{name}` is a slot, `[text]` is there in half of the cases, `(one|two|three)` is one of its alternatives.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from .choices import Choices

MARK = re.compile(r"[{}\[\]()|]|[^{}\[\]()|]+")
CLOSING = {"[": "]", "(": ")"}

Template = tuple[Any, ...]  # of strings, Slots and Alternatives


@dataclass(frozen=True)
class Slot:
    """A place that is filled by name."""

    name: str


@dataclass(frozen=True)
class Alternatives:
    """Templates of which one is chosen."""

    templates: tuple[Template, ...]


@cache
def parse(text: str) -> Template:
    """Return the template of a text, one object for equal texts. Raises ValueError for unmatched brackets."""
    marks = MARK.findall(text)
    template, end = _parse(marks, 0)
    if end != len(marks):
        raise ValueError(f"{text!r}: found {marks[end]}, expected no bracket to close here.")
    return template


def _parse(marks: list[str], start: int) -> tuple[Template, int]:
    """Return (template, index behind it) of the marks up to one that ends it."""
    parts: list[Any] = []
    while start < len(marks) and marks[start] not in ("}", "]", ")", "|"):
        mark = marks[start]
        if mark == "{":
            _expect(marks, start + 2, "}")
            parts.append(Slot(marks[start + 1]))
            start += 3
        elif mark in CLOSING:
            templates, start = _parse_alternatives(marks, start + 1, CLOSING[mark])
            parts.append(Alternatives(((), *templates) if mark == "[" else templates))
        else:
            parts.append(mark)
            start += 1
    return tuple(parts), start


def _parse_alternatives(marks, start, closing):
    templates = []
    while True:
        template, start = _parse(marks, start)
        templates.append(template)
        if marks[start : start + 1] != ["|"]:
            _expect(marks, start, closing)
            return tuple(templates), start + 1
        start += 1


def _expect(marks, place, closing):
    if marks[place : place + 1] != [closing]:
        raise ValueError(f"{''.join(marks)!r}: a bracket is not closed by {closing}.")


def expand(template: Template, fill: Callable[[str], str], choices: Choices) -> str:
    """Return the text of a template; `fill(name)` returns the text of a slot."""
    parts = []
    for part in template:
        if type(part) is str:
            parts.append(part)
        elif type(part) is Slot:
            parts.append(fill(part.name))
        else:
            parts.append(expand(choices.pick(part.templates), fill, choices))
    return "".join(parts)


def slots(template: Template) -> set[str]:
    """Return the names of all slots of a template."""
    names: set[str] = set()
    for part in template:
        if isinstance(part, Slot):
            names.add(part.name)
        elif isinstance(part, Alternatives):
            names.update(*map(slots, part.templates))
    return names
