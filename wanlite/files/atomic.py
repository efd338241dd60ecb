"""Files and folders that are there whole or not at all, whatever kills the writer.

Written beside their place under a hidden name, flushed to the disk, then renamed. A folder ends with a
manifest of its files. What would be no whole save is found before it is written: values that are not finite,
too little space. Of files that were downloaded: which are a model's, which formats are not read, how long
they have to be, and what a wrapper did to their names.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows: one writer at a time is up to the user
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
SPARE = 2**20  # bytes that a file system needs beside the files themselves
DEEPEST = 3  # folders below the one where a model's files are expected
MAX_ENTRIES = 2000  # of a folder that is searched
MAX_HEADER = 10**8  # bytes: the limit of the safetensors format
_TAKE = "Take safetensors in fp32, fp16, bf16 or scaled fp8."
_FORMATS = [
    (re.compile(pattern, re.I), fault, todo)
    for pattern, fault, todo in (  # by the end of a file's name
        (r"\.gguf$", "GGUF is not read", _TAKE),
        (r"openvino.*\.(xml|bin)$", "OpenVINO is not read", _TAKE),
        (r"\.(ckpt|pt|pt2|pth|bin|bin\.index\.json|pkl|pickle|distcp)$", "pickles are never opened", _TAKE),
        (r"\.onnx([._]data)?$", "ONNX is not read", _TAKE),
        (r"\.(engine|plan|trt)$", "TensorRT is not read", _TAKE),
        (r"\.(mlmodel|mlmodelc|mlpackage)$", "CoreML is not read", _TAKE),
        (r"\.npz$", "NumPy's and MLX's files are not read", _TAKE),
        (r"\.msgpack$", "Flax is not read", _TAKE),
        (r"\.(h5|hdf5|tflite|pb)$", "HDF5 and TensorFlow are not read", _TAKE),
        (r"\.(zip|tar|7z|rar|tgz|gz|xz|zst|bz2)$", "archives are not unpacked", "Unpack it there."),
        (r"\.(sft|safetensor)$", "only *.safetensors is read", "Rename it."),
    )
]
_IN_KEYS = rb'"[^"\\]*(?:%b)[^"\\]*":\s*\{'
_KINDS = [
    (re.compile(_IN_KEYS % pattern), fault, todo)
    for pattern, fault, todo in (  # by the keys of a safetensors header
        (
            rb"qweight|wscales|qzeros|quant_state|quant_map|\.absmax|smooth_factor|\.SCB|\._data|\.scales",
            "weights in 4 or 8 bits (nunchaku, GPTQ, bitsandbytes, quanto, MLX) are not read",
            _TAKE,
        ),
        (rb"lora_|lokr_|hada_|dora_scale", "this is a LoRA", "Choose a text-to-video Wan."),
    )
]
_FIRST_BYTES = [
    (magic, f"it is {what}, whatever its name says: {todo}")
    for magic, what, todo in (
        (b"GGUF", "GGUF", "take safetensors"),
        (b"\x89HDF", "HDF5", "take safetensors"),
        (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
        (b"Rar!", "a RAR archive", "unpack it"),
        (b"\x1f\x8b", "a gzip archive", "unpack it"),
        (b"\xfd7zXZ", "an xz archive", "unpack it"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it"),
    )
]
_INFIX = re.compile(
    r"(?:(?<=\.)|^)(?:_\w+|module)\.(?=.)"
)  # DDP, FSDP and torch.compile put them before and into names
_BOTH_ENDS = [
    (re.compile(rf"^(|.*\.){re.escape(first)}$"), last)
    for first, last in (  # tensors that a network always has
        ("patch_embedding.weight", "head.head.weight"),
        ("patch_embedding.weight", "proj_out.weight"),
        ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("token_embedding.weight", "blocks.0.attn.q.weight"),
        ("conv2.weight", "decoder.middle.0.residual.0.gamma"),
    )
]


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
        os.replace(aside, target)  # an earlier save was killed between its two renames
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in (*files, *(path for path in partial.rglob("*") if path.is_dir())):
            flush(path)
        write_json(
            partial / MANIFEST,
            {"files": {str(path.relative_to(partial)): _describe(path) for path in files}} | facts,
        )
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
    """Return a folder's manifest, None where there is none that can be read; one without facts may list files
    alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = manifest if "files" in manifest else {"files": manifest}
        is_readable = manifest["files"] and all(
            isinstance(entry, dict) for entry in manifest["files"].values()
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if is_readable else None


def find_corruption(folder, sizes_only=False):
    """Return why a folder does not verify against its manifest, or None where it does; sizes alone take no
    time.
    """
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
    """Take a folder's lock, until the process ends or the descriptor that is returned is closed; None where
    another has it.

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
    needed, free = num_bytes + SPARE, shutil.disk_usage(folder).free
    if free < needed:  # rounded apart, so that the figures never look equal
        raise OSError(
            f"{folder}: no space left: {math.ceil(needed / 1e5) / 10:,.1f} MB are needed, "
            f"{math.floor(free / 1e5) / 10:,.1f} MB are free. Free some, or name a folder on another disk."
        )


def not_finite(tensors):
    """Return the names of tensors that hold NaN or infinity: {name: tensor} is read once, and waited for once
    on a device.

    No memory is taken: isfinite() and sums in another dtype would copy, of a Wan's text encoder gigabytes.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if math.isfinite(
        sum(tensor.sum().float() for tensor in floats.values())
    ):  # it may overflow where all are finite
        return []
    return [
        name
        for name, tensor in floats.items()
        if tensor.numel() and not all(map(math.isfinite, tensor.aminmax()))
    ]


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- what was downloaded -----------------------------------------------------------------------------------


def open_regular(path):
    """Open a regular file for reading; a folder, pipe, device or socket under its name is refused, never
    waited for.
    """
    try:
        number = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        )
    except OSError as error:
        raise OSError(
            f"{path}: cannot be read ({error.strerror}). Expected a regular file that you may read."
        ) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(
            f"{path}: not a regular file. Expected one; a folder, pipe, device or socket is never opened."
        )
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
        raise OSError(
            f"{path}: holds a {type(found).__name__}, expected an object {{...}}. Download it again."
        )
    return found


def broken_download(path, fault):
    """Return the error for a file that is not what its name says: the `fault` found, or what a download left
    in its place.
    """
    instead = what_came_instead(first_bytes(path))
    return OSError(f"{path}: {instead}." if instead else f"{path}: {fault}. Download it again.")


def first_bytes(path):
    with open_regular(path) as file:
        return file.read(64)


def what_came_instead(beginning):
    """Describe by its first bytes what a download left in place of a file, and what to do; None where it
    cannot be told.
    """
    if beginning.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer: run `git lfs pull` in that folder"
    if beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "it is a web page: download the file again"
    return next((instead for magic, instead in _FIRST_BYTES if beginning.startswith(magic)), None)


def came_instead_of_safetensors(beginning):
    """As what_came_instead(), for a file that is named safetensors."""
    if beginning.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickle, whatever its name says, and pickles are never opened: take safetensors"
    return what_came_instead(beginning)


def broken_safetensors(path, error):
    """Return the error for a file that safetensors refused: what it is instead, or how many bytes it has too
    few or too many.
    """
    if instead := came_instead_of_safetensors(first_bytes(path)):
        return OSError(f"{path}: {instead}.")
    fault = _length_fault(path) or str(error)
    return OSError(
        f"{path}: {fault if 'too long' in fault else f'not a whole safetensors file ({fault})'}. Download it "
        f"again."
    )


def _length_fault(path):
    with open_regular(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            return None
        try:
            header = json.loads(file.read(length))
            end = (
                8
                + length
                + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            )
            return wrong_length(end, size)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None


def wrong_length(end, size):
    """Describe how a file of `size` bytes differs from what its header promises, `end`; None where it does
    not.
    """
    if end == size:
        return None
    difference = f"{abs(size - end):,} byte{'s' * (abs(size - end) > 1)}"
    return f"{difference} {'too long' if size > end else 'too short'}: its tensors end at byte {end:,}, the file at {size:,}"


# ---- which files are a model's -----------------------------------------------------------------------------


def visible(paths):
    """Return paths in order, without names that begin with a dot: what macOS, notebooks and the hub leave
    beside a model.
    """
    return sorted(path for path in paths if not path.name.startswith("."))


def levels_below(folder):
    """Yield [folder], the visible folders in it, those in these, ...; each once, wherever links lead."""
    level, met = [folder], set()
    for _ in range(DEEPEST + 1):
        level = list({place: entry for entry in level if (place := entry.resolve()) not in met}.values())
        met |= {entry.resolve() for entry in level}
        yield level
        entries = islice((path for entry in level for path in _entries(entry)), MAX_ENTRIES)
        level = visible(path for path in entries if path.is_dir())


def _entries(folder):
    with suppress(OSError):  # not there, or not to be read
        yield from folder.iterdir()


def weights_by_depth(folder, places):
    """Return lists of a folder's safetensors files: those in its places, those a folder deeper, ...; below ""
    none is deeper.
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
        for depth in range(DEEPEST + 1)
    ]


def why_not_read(path):
    """Return (why a file's format is not read, what to do), or None for any other file."""
    found = next(((fault, todo) for pattern, fault, todo in _FORMATS if pattern.search(path.name)), None)
    if found is None and path.suffix == ".safetensors" and path.is_file():
        with open_regular(path) as file:
            beginning = file.read(2**16)
        found = next(((fault, todo) for pattern, fault, todo in _KINDS if pattern.search(beginning)), None)
    return found


def name_not_read(paths):
    """Return a sentence on the first visible files of one format that is not read, or "" where there are
    none.
    """
    reasons = {path: reason for path in visible(paths) if (reason := why_not_read(path))}
    if not reasons:
        return ""
    fault, todo = next(iter(reasons.values()))
    names = [path.name for path, reason in reasons.items() if reason == (fault, todo)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"found {', '.join(names[:3])}{more}: {fault}. {todo}"


# ---- what wrappers do to names -----------------------------------------------------------------------------


def unwrapped(names, source):
    """Return {stored name: name} of all tensors of a network, without what wrappers put before all of them
    and into some.

    A prefix is whatever stands before both of two tensors that each Wan transformer, autoencoder or UMT5 has.
    Raises ValueError, naming the `source`, where there are several: then it is open which network is meant.
    """
    bare = {name: _INFIX.sub("", name) for name in names}
    held, prefixes = set(bare.values()), set()
    for first, last in _BOTH_ENDS:
        prefixes = prefixes or {
            match[1] for name in held if (match := first.match(name)) and match[1] + last in held
        }
    if len(prefixes) > 1:
        raise ValueError(
            f"{source}: holds {len(prefixes)} networks, under {', '.join(map(repr, sorted(prefixes)[:3]))}, "
            f"expected "
            "one. Keep each in a file of its own."
        )
    prefix, found = next(iter(prefixes), ""), {}
    for name, short in bare.items():
        if (other := found.setdefault(short.removeprefix(prefix), name)) != name:
            raise ValueError(
                f"{source}: holds {short.removeprefix(prefix)} twice, as {other} and as {name}. Keep one of "
                f"them."
            )
    return {name: short for short, name in found.items()}
