"""Work that is kept: a folder for what was made of exactly this, and nothing else.

The folder's name is a digest of what its content was made of, and provenance.json says it in words: content that
was moved or copied under another name is refused, never used.
"""

import hashlib
import json
from pathlib import Path

from .atomic import write_json

RECORD = "provenance.json"


def cache_folder(parent, kind, **what):
    """Return the folder for what was made of exactly this: a teacher, prompts, guidance, a schedule, ...

    Raises ValueError where a folder of that name holds what was made of something else, and says which part
    differs.
    """
    folder, said = (
        Path(parent) / f"{kind}-{fingerprint(what)[:16]}",
        json.loads(json.dumps(what, default=str)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD
    try:
        found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else said
        differing = [
            f"{name} was {_short(found.get(name))}, is {_short(value)}"
            for name, value in said.items()
            if found.get(name) != value
        ]
    except (ValueError, AttributeError):
        raise ValueError(
            f"{record}: cannot be read. Delete the folder: the same command makes it again."
        ) from None
    if differing:
        raise ValueError(
            f"{folder}: was made of something else ({'; '.join(differing)}). Delete it, or move it back to "
            f"where it "
            "came from."
        )
    if not record.exists():
        write_json(record, said)
    return folder


def fingerprint(what):
    """Return the sha256 of anything that JSON, or str, can say."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _short(value):
    """Say a value in a line; what is long, as thousands of prompts, by its fingerprint."""
    text = json.dumps(value)
    return text if len(text) < 80 else fingerprint(value)[:16]
