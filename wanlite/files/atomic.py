"""Atomic writes: a file or a folder is complete or absent, whenever the writer is killed.

Content is written under a hidden name beside its place, flushed to the disk, then renamed. A folder ends with a
manifest of its files.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from .file_names import PROVENANCE
from .inside import resolve_inside, walk
from .json_files import OWN, open_regular, read_json, shown
from .locks import alone

MANIFEST = "manifest.json"
READ = (
    ".json",
    ".safetensors",
    ".model",
    ".jinja",
    "merges.txt",
    "vocab.txt",
)  # endings of files that loaders read
SPARE = 2**20  # bytes that a file system needs beside the files themselves


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; several runs may write the same file."""
    write_bytes(path, f"{json.dumps(content, indent=2)}\n".encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; several runs may write the same file."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:  # never through a link
            file.write(content)
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def new_folder(target: str | Path, **facts: Any) -> Iterator[Path]:
    """Yield a hidden folder beside `target` to write into; on success it becomes `target`.

    Its manifest is written last: {"files": {name: size and sha256}} and the `facts`. Raises OSError while another
    process writes the same target.
    """
    target = Path(target)
    aside = target.with_name(f".{target.name}.old")
    with alone(target, ".partial"):
        if aside.exists() and not target.exists():
            os.replace(aside, target)  # an earlier save was killed between its two renames
        _remove_leftovers(target)
        partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
        partial.mkdir()
        try:
            yield partial
            _write_manifest(partial, facts)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            os.replace(target, aside)
        os.replace(partial, target)
        flush(target.parent)
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(target):
    """Remove the hidden folders of killed saves; one that cannot be removed is never written to."""
    leftover = re.compile(rf"\.{re.escape(target.name)}(\.[0-9a-f]{{32}})?\.partial")
    for path in target.parent.iterdir():
        if leftover.fullmatch(path.name) and path.is_symlink():
            path.unlink()
        elif leftover.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    entries = sorted(walk(folder))
    files = [path for path in entries if path.is_file()]
    for path in (*files, *(path for path in entries if path.is_dir())):
        flush(path)
    described = {str(path.relative_to(folder)): _describe(path) for path in files}
    write_json(folder / MANIFEST, {"files": described} | facts)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest, or None if there is no readable one.

    A manifest without facts may list its files at the top level.
    """
    try:
        manifest = read_json(folder / MANIFEST, OWN)
    except OSError:
        return None
    manifest = manifest if "files" in manifest else {"files": manifest}
    files = manifest["files"]
    is_readable = (
        isinstance(files, dict) and files and all(isinstance(entry, dict) for entry in files.values())
    )
    return manifest if is_readable else None


def find_corruption(folder: Path, sizes_only: bool = False, hashed_later: Collection[str] = ()) -> str | None:
    """Return how a folder differs from its manifest, or None if it does not; comparing sizes alone is fast.

    Of the files in `hashed_later`, too, only sizes are compared.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return "has no readable manifest"
    for name, described in manifest["files"].items():
        try:
            path = resolve_inside(folder, name)
        except OSError:
            return f"its manifest names {shown(name)}, which leads out of the folder"
        if os.path.normpath(name) != name:  # a file that is named often would be read as often
            return f"its manifest names {shown(name)}, expected {shown(os.path.normpath(name))}"
        if not path.is_file():
            return f"lacks {shown(name)}"
        if (size := path.stat().st_size) != described.get("size"):
            expected = str(described.get("size"))
            return f"{shown(name)} differs from its manifest: found {size} bytes, expected {expected:.20}"
        if not (sizes_only or name in hashed_later) and _describe(path) != described:
            return f"{name} differs from its manifest"
    if unlisted := _find_unlisted(folder, manifest["files"]):
        return f"its manifest does not list {shown(unlisted)}"
    return None


def _find_unlisted(folder: Path, listed: Collection[str]) -> str | None:
    """Return a file that a loader may read and a manifest does not list, None if there is none."""
    for path in walk(folder):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)  # of a save, or of another program
        is_read = path.name.endswith(READ) and path.name not in (MANIFEST, PROVENANCE)
        if is_read and not is_hidden and not path.is_dir() and str(name) not in listed:
            return str(name)
    return None


@lru_cache(maxsize=64)
def _find_corruption_of(folder: Path, version: tuple) -> str | None:
    return find_corruption(folder)


def find_corruption_once(folder: Path) -> str | None:
    """Return the result of find_corruption(), for which the files are hashed once in a process.

    It takes half a second per GB: 6 s for the text encoder of a Wan. Files that have changed since are hashed again.
    """
    paths = [path for path in sorted(walk(folder)) if path.is_file()]
    status = [(path, path.stat()) for path in paths]
    version = tuple((path, found.st_ino, found.st_size, found.st_mtime_ns) for path, found in status)
    return _find_corruption_of(folder, version)


def _describe(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        return {
            "size": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),  # type: ignore[arg-type]
        }


def check_space(folder: str | Path, num_bytes: int) -> None:
    """Raise OSError if `num_bytes` do not fit on the disk of a folder, before anything is written."""
    needed, free = num_bytes + SPARE, shutil.disk_usage(folder).free
    if free < needed:  # rounded apart, so that the figures never look equal
        raise OSError(
            f"{folder}: no space left: {math.ceil(needed / 1e5) / 10:,.1f} MB are needed, "
            f"{math.floor(free / 1e5) / 10:,.1f} MB are free. Free some, or choose a folder on another disk."
        )


def flush(path: str | Path) -> None:
    """Write a file's content, or a folder's list of names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
