"""An image that was listed and not read yet, and the reason to skip one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..files.json_files import OWN, read_json

MAX_BYTES = 2**28  # of an image file
NOT_UTF8 = "a caption that is not UTF-8"


class Unusable(ValueError):
    """The reason to skip an image."""


@dataclass(frozen=True)
class ListedImage:
    """An image that was listed and not read yet; `name` is used in messages."""

    name: str
    caption: Callable[[], str]  # both may raise Unusable or OSError
    content: Callable[[], bytes]


def text_of(value: object) -> str:
    """Return a text unchanged, and an empty one for any other value."""
    return value if isinstance(value, str) else ""


def read_object(path: Path) -> dict:
    """Return the JSON object in a file of the library `datasets`; raises ValueError for any other content."""
    try:
        return read_json(path, OWN)
    except OSError:
        raise ValueError(f"{path}: not a JSON object. Save the dataset again.") from None
