"""Locks between runs that write to the same folder; the operating system releases those of a killed process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
_HELD: list[FileLock] = []  # by lock(): a lock that is no longer referenced is released


def lock(folder: Path, wait: bool = False) -> FileLock | None:
    """Lock a folder until the process ends or release() is called; None if another process has the lock.

    With `wait`, wait for the lock instead. On a file system without locks, or one that cannot be written to,
    the folder counts as having one writer.
    """
    held = _acquire(folder / LOCK, wait)
    if held is not None:
        _HELD.append(held)
    return held


def release(held: FileLock) -> None:
    """Release a lock and remove its file."""
    if held in _HELD:
        _HELD.remove(held)
    if held.is_locked:
        with suppress(OSError):
            Path(held.lock_file).unlink()  # while it is held: whoever waits for it opens a new file
    held.release()


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock; yields False if another process has it and `wait` is off."""
    with _holding(folder / LOCK, wait) as is_held:
        yield is_held


@contextmanager
def in_turn(folder: Path, log: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of a folder that is to be made; log and wait if another process has it.

    The lock file is beside the folder, because a new folder replaces the old one.
    """
    path = _beside(folder)
    with _holding(path, wait=False) as is_held:
        if is_held:
            yield
            return
    log(f"waiting for another run, which makes {folder}")
    with _holding(path, wait=True):
        yield


@contextmanager
def alone(folder: Path, kind: str = "") -> Iterator[None]:
    """Hold the lock of a folder that is to be made; raises OSError with the process that has it, if another has.

    The lock file is beside the folder. Locks of another `kind`, a part of its name, are independent.
    """
    path = _beside(Path(os.path.realpath(folder)), kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _holding(path, wait=False) as is_held:
        if not is_held:
            raise OSError(
                f"{folder}: {_read_holder(path)} is writing there. Wait until it ends, or name another folder."
            )
        _write_holder(path)
        yield


def _beside(folder, kind=""):
    return folder.with_name(f".{folder.name}{kind}{LOCK}")


def _write_holder(path):
    """Write the number of this process into its lock file, for the error of another one."""
    with suppress(OSError):  # a file system without locks has no lock file
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
        os.write(descriptor, str(os.getpid()).encode())
        os.close(descriptor)


def _read_holder(path):
    """Return the process that wrote a lock file, in words."""
    with suppress(OSError), open(path, "rb") as file:
        if (number := file.read(10)).isdigit():
            return f"process {number.decode()}"
    return "another process"


@contextmanager
def _holding(path: Path, wait: bool) -> Iterator[bool]:
    held = _acquire(path, wait)
    try:
        yield held is not None
    finally:
        if held is not None:
            release(held)


def _acquire(path: Path, wait: bool) -> FileLock | None:
    held = FileLock(path, thread_local=False)
    try:
        held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except OSError:
        pass  # no locks here: one writer
    return held
