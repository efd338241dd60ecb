"""Text with slots -> a template, and a template -> text.

`{name}` is a slot, `[text]` is there in half of the cases, `(one|two|three)` is one of its alternatives.
"""

import re
from collections.abc import Callable
from functools import cache

from .choices import Choices

TOKEN = re.compile(r"[{}\[\]()|]|[^{}\[\]()|]+")

Part = str | tuple  # text, ("slot", name) or ("choice", templates)
Template = tuple[Part, ...]


@cache
def parse(text: str) -> Template:
    """Return the template of a text. Raises ValueError for brackets that do not match."""
    tokens = TOKEN.findall(text)
    template, end = _parse(tokens, 0, "")
    if end != len(tokens):
        raise ValueError(f"{text!r}: brackets do not match.")
    return template


def _parse(tokens, start, closing):
    """Return (template, index after it) of the tokens up to `closing` or `|`."""
    parts: list[Part] = []
    while start < len(tokens) and tokens[start] not in ("}", "]", ")", "|"):
        mark = tokens[start]
        if mark == "{":
            if tokens[start + 2 : start + 3] != ["}"]:
                raise ValueError(f"{''.join(tokens)!r}: }} is missing.")
            parts.append(("slot", tokens[start + 1]))
            start += 3
        elif mark in "[(":
            choice, start = _parse_choice(tokens, start + 1, "]" if mark == "[" else ")")
            parts.append(("choice", ((), *choice) if mark == "[" else choice))
        else:
            parts.append(mark)
            start += 1
    if closing and start == len(tokens):
        raise ValueError(f"{''.join(tokens)!r}: {closing} is missing.")
    return tuple(parts), start


def _parse_choice(tokens, start, closing):
    alternatives = []
    while True:
        template, start = _parse(tokens, start, closing)
        alternatives.append(template)
        if tokens[start] != "|":
            if tokens[start] != closing:
                raise ValueError(f"{''.join(tokens)!r}: expected {closing}, found {tokens[start]}.")
            return tuple(alternatives), start + 1
        start += 1


def expand(template: Template, fill: Callable[[str], str], choices: Choices) -> str:
    """Return the text of a template; `fill(name)` returns the text of a slot."""
    parts = []
    for part in template:
        if type(part) is str:
            parts.append(part)
        elif part[0] == "slot":
            parts.append(fill(part[1]))
        else:
            parts.append(expand(choices.pick(part[1]), fill, choices))
    return "".join(parts)


def slots(template: Template) -> set[str]:
    """Return the names of all slots of a template."""
    names = set()
    for part in template:
        if type(part) is not str:
            names |= {part[1]} if part[0] == "slot" else set().union(*map(slots, part[1]))
    return names
