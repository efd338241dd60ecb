"""Changes of a student's folder, and files beside it, of which the inputs consist."""

import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.hostile_inputs.trial import Place

ESCAPE, BIDI = "\x1b[2J\x1b]0;a\x07", "\u202egnp.\u2066"
HUGE = 3 * 10**9  # bytes of a sparse file
ODD = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    0.5,
    "",
    "a",
    "\ud800",
    [],
    [[]],
    {},
    {"a": [1]},
    [None] * 3,
)
SETTINGS = "scheduler/scheduler_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
ENCODER, VAE = "text_encoder/config.json", "vae/config.json"


def write_sparse(path: Path, size: int = HUGE) -> None:
    """Write a file of zeros that take no space on the disk."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)


def unseal(path: Path) -> None:
    """Remove the digest of a changed file, as its author would."""
    (path.parent / "manifest.json").unlink(missing_ok=True)


def edit(name: str, **changes: Any) -> Callable[[Place], None]:
    """Return a change of values in a JSON file; a value of `...` removes the key."""

    def prepare(place):
        path = place.student / name
        content = json.loads(path.read_text()) | changes
        content.pop("drawing_sha256", None)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        unseal(path)

    return prepare


def replace(name: str, write: Callable[[Path], Any]) -> Callable[[Place], None]:
    """Return a change that replaces a file by what `write(path)` makes."""

    def prepare(place):
        path = place.student / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        unseal(path)
        write(path)

    return prepare


def several(*changes: Callable[[Place], Any]) -> Callable[[Place], None]:
    """Return a change that makes several ones in turn."""

    def prepare(place):
        for change in changes:
            change(place)

    return prepare


def link_out(name: str, is_absolute: bool = False) -> Callable[[Place], None]:
    """Return a change that moves a file outside and leaves a link to it."""

    def prepare(place):
        path, target = place.student / name, place.outside / Path(name).name
        shutil.move(path, target) if path.exists() else target.write_text("{}")
        path.symlink_to(target if is_absolute else os.path.relpath(target, path.parent))
        if path.is_file():
            unseal(path)

    return prepare


def beside(name: str, write: Callable[[Path], Any], *flags: Any) -> Callable[[Place], list]:
    """Return a change that makes a file beside the student, named by the last of the `flags`."""

    def prepare(place):
        write(place.beside / name)
        return [*flags, place.beside / name]

    return prepare


def text(content: str) -> Callable[[Path], int]:
    """Return a function that writes a text."""
    return lambda path: path.write_bytes(content.encode("utf-8", "surrogatepass"))


def save_image(path: Path, **options: Any) -> None:
    """Write an image of the size that the tiny student draws."""
    Image.new("RGB", (64, 64), "red").save(path, **options)


def png(chunks: Sequence[tuple[bytes, bytes]], size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a PNG file with more chunks before its pixels."""
    width, height = size
    rows = zlib.compress((b"\0" + b"\xff\0\0" * min(width, 10**4)) * min(height, 10**4))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *chunks,
        (b"IDAT", rows),
        (b"IEND", b""),
    ]
    body = (
        struct.pack(">I", len(each)) + kind + each + struct.pack(">I", zlib.crc32(kind + each))
        for kind, each in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def header_file(header: Any, length: int | None = None, body: bytes = b"") -> Callable[[Path], int]:
    """Return a function that writes a safetensors file with this header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if length is None else length
    return lambda path: path.write_bytes(struct.pack("<Q", size % 2**64) + content + body)


def tar_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """Return a header of a .tar file with any bytes for its size."""
    block = bytearray(tarfile.TarInfo(name).tobuf())
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def captioned(place: Place) -> Path:
    """Make a folder of three captioned images beside the student."""
    folder = place.beside / "photos"
    folder.mkdir()
    for number, name in enumerate("abc"):
        Image.new("RGB", (80, 80), (0, 0, 80 * number)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo {name}")
    return folder
