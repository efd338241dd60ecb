"""Files and folders that are there whole or not at all, whatever kills the writer.

Written beside their place under a hidden name, flushed to the disk, then renamed. A folder ends with a manifest of its files.
What would be no whole save is found before it is written: values that are not finite, too little space. What a download left in
place of a file is told from its first bytes.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:          # Windows: one writer at a time is up to the user
    fcntl = None             # type: ignore[assignment]

MANIFEST = "manifest.json"
SPARE = 2**20                # bytes that a file system needs beside the files themselves


def write_json(path, content):
    """Write JSON so that a reader sees the old file or the new one; other runs may be writing the same one."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def new_folder(target, **facts):
    """Yield a hidden folder beside `target` to write into; on success it becomes `target`.

    Its manifest is written last: {"files": {name: size and sha256}} and the `facts`.
    """
    target = Path(target)
    partial, aside = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if aside.exists() and not target.exists():
        os.replace(aside, target)                             # an earlier save was killed between its two renames
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in (*files, *(path for path in partial.rglob("*") if path.is_dir())):
            flush(path)
        write_json(partial / MANIFEST, {"files": {str(path.relative_to(partial)): _describe(path) for path in files}} | facts)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def read_manifest(folder):
    """Return a folder's manifest, None where there is none that can be read; one without facts may list files alone."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = manifest if "files" in manifest else {"files": manifest}
        is_readable = manifest["files"] and all(isinstance(entry, dict) for entry in manifest["files"].values())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if is_readable else None


def why_broken(folder, sizes_only=False):
    """Return why a folder does not verify against its manifest, or None where it does; sizes alone take no time."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "has no readable manifest"
    for name, described in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != described.get("size"):
            return f"{name} differs from its manifest: {path.stat().st_size} bytes, {described.get('size')} were written"
        if not sizes_only and _describe(path) != described:
            return f"{name} differs from its manifest"
    return None


def _describe(path):
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def hold(folder, is_patient=False):
    """Take a folder's lock, until the process ends or the descriptor that is returned is closed; None where another has it.

    Patience waits for it. A file system without locks counts as having one writer.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(descriptor)
            return None
    return descriptor


@contextmanager
def locked(folder, is_patient=True):
    """Hold a folder's lock; yields False where another has it."""
    descriptor = hold(folder, is_patient)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def in_turn(folder, say):
    """Hold a folder's lock; where another has it, say so and wait."""
    with locked(folder, is_patient=False) as is_mine:
        if is_mine:
            yield
            return
    say(f"waiting for another run, which makes {folder}")
    with locked(folder):
        yield


def check_space(folder, num_bytes):
    """Refuse to write `num_bytes` where they do not fit, before anything is written."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE:
        raise OSError(f"{folder}: no space left: {num_bytes / 1e6:,.1f} MB are to be written, {free / 1e6:,.1f} MB are free. "
                      "Free some, or name a folder on another disk.")


def not_finite(tensors):
    """Return the names of tensors that hold NaN or infinity: {name: tensor} is read once, and waited for once on a device.

    No memory is taken: isfinite() and sums in another dtype would copy, of a Wan's text encoder gigabytes.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if math.isfinite(sum(tensor.sum().float() for tensor in floats.values())):       # it may overflow where all are finite
        return []
    return [name for name, tensor in floats.items() if tensor.numel() and not all(map(math.isfinite, tensor.aminmax()))]


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- what was downloaded ---------------------------------------------------------------------------------------------------

def open_regular(path):
    """Open a regular file for reading; a folder, pipe, device or socket under its name is refused, never waited for."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}). Expected a regular file that you may read.") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(f"{path}: not a regular file. Expected one; a folder, pipe, device or socket is never opened.")
    return open(number, "rb", buffering=0)


def read_downloaded_json(path):
    """Return the object in a JSON file of any size as a dict."""
    with open_regular(path) as file:
        content = file.read()
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise broken_download(path, f"not JSON ({reason})") from None
    if not isinstance(found, dict):
        raise OSError(f"{path}: holds a {type(found).__name__}, expected an object {{...}}. Download it again.")
    return found


def broken_download(path, fault):
    """Return the error for a file that is not what its name says: the `fault` found, or what a download left in its place."""
    instead = what_came_instead(first_bytes(path))
    return OSError(f"{path}: {instead}." if instead else f"{path}: {fault}. Download it again.")


def first_bytes(path):
    with open_regular(path) as file:
        return file.read(64)


def what_came_instead(beginning):
    """Say by its first bytes what a download left in place of a file, and what to do; None where it cannot be told."""
    if beginning.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer: run `git lfs pull` in that folder"
    if beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "it is a web page: download the file again"
    return None
