"""A folder -> the files in it that may be a model's, and sentences about those in formats that are not read. No torch."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from ..files.json_files import read_first_bytes
from .names import QUANTISED

MAX_DEPTH = 3  # folders below the one where a model's files are expected
MAX_ENTRIES = 2000  # of a folder that is searched
_TAKE = "Take safetensors in fp32, fp16, bf16 or scaled fp8."
_FORMATS = [
    (re.compile(pattern, re.I), fault, remedy)
    for pattern, fault, remedy in (  # by the end of a file's name
        (r"\.gguf$", "GGUF is not read", _TAKE),
        (r"openvino.*\.(xml|bin)$", "OpenVINO is not read", _TAKE),
        (r"\.(ckpt|pt|pt2|pth|bin|bin\.index\.json|pkl|pickle|distcp)$", "pickles are never opened", _TAKE),
        (r"\.onnx([._]data)?$", "ONNX is not read", _TAKE),
        (r"\.(engine|plan|trt)$", "TensorRT is not read", _TAKE),
        (r"\.(mlmodel|mlmodelc|mlpackage)$", "CoreML is not read", _TAKE),
        (r"\.npz$", "NumPy and MLX archives are not read", _TAKE),
        (r"\.msgpack$", "Flax is not read", _TAKE),
        (r"\.(h5|hdf5|tflite|pb)$", "HDF5 and TensorFlow are not read", _TAKE),
        (r"\.(zip|tar|7z|rar|tgz|gz|xz|zst|bz2)$", "archives are not unpacked", "Unpack it there."),
        (r"\.(sft|safetensor)$", "only *.safetensors is read", "Rename it."),
    )
]
_KINDS = [
    (re.compile(rb'"[^"\\]*(?:%b)[^"\\]*":\s*\{' % pattern), fault, remedy)
    for pattern, fault, remedy in (  # by the keys of a safetensors header
        (
            QUANTISED.encode(),
            "weights in 4 or 8 bits (nunchaku, GPTQ, bitsandbytes, quanto, MLX) are not read",
            _TAKE,
        ),
        (rb"lora_|lokr_|hada_|dora_scale", "this is a LoRA", "Choose a text-to-video Wan."),
    )
]


def visible(paths: Iterable[Path]) -> list[Path]:
    """Return paths in order, without the hidden files that macOS, notebooks and the hub add to a folder."""
    return sorted(path for path in paths if not path.name.startswith("."))


def levels_below(folder: Path) -> Iterator[list[Path]]:
    """Yield [folder], the visible folders in it, those in these, ...; links are followed, each folder once."""
    level, visited = [folder], set[Path]()
    for _ in range(MAX_DEPTH + 1):
        level = list({place: entry for entry in level if (place := entry.resolve()) not in visited}.values())
        visited |= {entry.resolve() for entry in level}
        yield level
        entries = islice((path for entry in level for path in _entries(entry)), MAX_ENTRIES)
        level = visible(path for path in entries if path.is_dir())


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(OSError):  # missing, or not readable
        yield from folder.iterdir()


def weights_by_depth(folder: Path, places: Iterable[str]) -> list[list[Path]]:
    """Return lists of a folder's safetensors files: those in its `places`, those a folder deeper, ...

    The place "" is the folder itself, and nothing below it.
    """
    levels = [list(levels_below(folder / place)) if place else [[folder]] for place in places]
    return [
        visible(
            path
            for level in levels
            for entries in level[depth : depth + 1]
            for entry in entries
            for path in entry.glob("*.safetensors")
        )
        for depth in range(MAX_DEPTH + 1)
    ]


def find_unsupported_format(path: Path) -> tuple[str, str] | None:
    """Return (why a file's format is not read, what to do), or None for any other file."""
    found = next(((fault, remedy) for pattern, fault, remedy in _FORMATS if pattern.search(path.name)), None)
    if found is None and path.suffix == ".safetensors" and path.is_file():
        beginning = read_first_bytes(path, 2**16)
        found = next(
            ((fault, remedy) for pattern, fault, remedy in _KINDS if pattern.search(beginning)), None
        )
    return found


def describe_unsupported(paths: Iterable[Path]) -> str:
    """Return a sentence about the first visible files in one format that is not read, "" for none."""
    reasons = {path: reason for path in visible(paths) if (reason := find_unsupported_format(path))}
    if not reasons:
        return ""
    fault, remedy = next(iter(reasons.values()))
    names = [path.name for path, reason in reasons.items() if reason == (fault, remedy)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"found {', '.join(names[:3])}{more}: {fault}. {remedy}"


def list_names(folder: Path) -> str:
    """Return the names of the first visible entries of a folder, for a message."""
    return ", ".join(path.name for path in visible(folder.iterdir())[:8]) or "nothing"
