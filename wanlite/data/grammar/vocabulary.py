"""The .toml files of this folder -> scenes, settings, media and shared lists, read once.

A scene names its `casts` (nouns with the adjectives and actions that fit them), its lists `place`, `detail` and
`sentence`, and the `setting` whose light, weather and views fit. Lists are separated by semicolons or lines.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .templates import Template, parse

FOLDER = Path(__file__).parent
Lists = dict[str, tuple[Template, ...]]


@dataclass(frozen=True)
class Cast:
    """Nouns of one kind, and the words that fit each of them.

    A noun that begins with `~` is a plural without a singular, and with `=` an uncountable noun.
    """

    nouns: tuple[str, ...]
    lists: Lists  # adjectives, actions, traits, groups


@dataclass(frozen=True)
class Scene:
    """What fits together in one image. `forms` are templates of whole prompts, by length."""

    name: str
    weight: int
    casts: tuple[Cast, ...]
    lists: Lists
    forms: Lists


@dataclass(frozen=True)
class Vocabulary:
    """Everything that prompts are composed of; a list of a scene hides that of its setting."""

    scenes: tuple[Scene, ...]
    media: tuple[Lists, ...]


def split(text: str) -> tuple[str, ...]:
    """Return the entries of a list, separated by semicolons or lines."""
    return tuple(entry.strip() for entry in re.split(r"[;\n]", text) if entry.strip())


def _parse_lists(table: dict) -> Lists:
    return {name: tuple(map(parse, split(text))) for name, text in table.items() if isinstance(text, str)}


@cache
def read_vocabulary() -> Vocabulary:
    """Return the vocabulary of the .toml files."""
    shared = tomllib.loads((FOLDER / "shared.toml").read_text(encoding="utf-8"))
    settings = {name: _parse_lists(table) for name, table in shared["settings"].items()}
    general, forms = _parse_lists(shared["lists"]), _parse_lists(shared["forms"])
    media = tuple(_parse_lists(table) for table in shared["media"])
    scenes = []
    for path in sorted((FOLDER / "scenes").glob("*.toml")):
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            scenes.append(_read_scene(name, table, settings, general, forms))
    return Vocabulary(tuple(scenes), media)


def _read_scene(name, table, settings, general, forms):
    casts = tuple(
        Cast(split(cast["nouns"]), _parse_lists({key: cast[key] for key in cast if key != "nouns"}))
        for cast in table.get("casts", ())
    )
    lists = general | settings[table.get("setting", "plain")] | _parse_lists(table)
    return Scene(name, table.get("weight", 2), casts, lists, _parse_lists(table.get("forms", {})) or forms)
