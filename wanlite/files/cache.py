"""A cache on disk: one folder for each set of inputs, named by their digest.

provenance.json records the inputs: content that was moved or copied under another name is refused, never used.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .atomic import write_json
from .file_names import PROVENANCE
from .json_files import OWN, Limits, read_json

RECORD = OWN._replace(max_bytes=2**27, max_containers=2**21)  # a million images
LAYOUT = 4  # of the files in a cache; it changes when older ones cannot be read, or cannot be verified


def cache_folder(parent: str | Path, kind: str, **inputs: Any) -> Path:
    """Return the folder for results of exactly these inputs: a teacher, prompts, guidance, a schedule, ...

    Raises ValueError for a folder of that name whose content has other inputs, and names the difference.
    """
    folder = Path(parent) / f"{kind}-{fingerprint(inputs)[:16]}"
    text = json.dumps({**inputs, "layout": LAYOUT}, default=str)
    expected = json.loads(text)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / PROVENANCE
    if not record.exists():
        write_json(record, expected)
        return folder
    try:
        found = read_json(record, _limits_of(text))
    except OSError:
        raise ValueError(
            f"{record}: cannot be read. Delete the folder: the same command makes it again."
        ) from None
    if (layout := found.get("layout")) != LAYOUT:
        raise ValueError(
            f"{folder}: was made by another version (layout was {json.dumps(layout)[:20]}, is {LAYOUT}), and cannot "
            f"be verified. Delete it, or all of {parent} at once: the same command makes it again."
        )
    if differing := [
        f"{name} was {_shorten(found.get(name))}, is {_shorten(value)}"
        for name, value in expected.items()
        if found.get(name) != value
    ]:
        raise ValueError(
            f"{folder}: holds results of other inputs ({'; '.join(differing)}). Delete it, or move it back to its "
            "former place."
        )
    return folder


def user_cache() -> Path:
    """Return the folder of files that all runs of a user share: WANLITE_CACHE, else wanlite in the user's cache."""
    if own := os.environ.get("WANLITE_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanlite"


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written to, or created."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def write_record(path: Path, content: Any) -> None:
    """Write a single file of the cache: JSON content with its sha256."""
    write_json(path, {"content": content, "sha256": fingerprint(content)})


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of write_record(), {} if there is none or if it differs from its sha256."""
    try:
        found = read_json(path, RECORD)
    except OSError:
        return {}
    content = found.get("content")
    return content if isinstance(content, dict) and fingerprint(content) == found.get("sha256") else {}


def fingerprint(content: Any) -> str:
    """Return the sha256 of any content, as JSON; values that JSON lacks are written by str()."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _limits_of(text: str) -> Limits:
    """Return the limits of a record whose expected text is known; it is indented, and may be of other inputs."""
    return OWN._replace(
        max_bytes=2**20 + 8 * len(text), max_containers=2**16 + 2 * text.count("[") + text.count("{")
    )


def _shorten(value: Any) -> str:
    """Return a value as one line; a long one, as thousands of prompts, by its fingerprint."""
    text = json.dumps(value)
    return text if len(text) < 80 else fingerprint(value)[:16]
