"""An image that was found in a place and is not read yet, the reason to skip it, and its caption."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NOT_UTF8 = "a caption that is not UTF-8"


class Unusable(ValueError):
    """An image is skipped, for this reason."""


@dataclass(frozen=True)
class ListedImage:
    """An image of a place, not read yet."""

    name: str
    caption: Callable[[], str]  # both may raise Unusable, or OSError
    content: Callable[[], bytes]


def text_of(value: object) -> str:
    """Return a caption, empty for any other value."""
    return value if isinstance(value, str) else ""


def read_object(path: Path) -> dict:
    """Return the object in a JSON file of the library `datasets`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object. Save the dataset again.")
    return content
