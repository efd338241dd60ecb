"""Prompt embeddings that are kept on disk: a prompt that was drawn before needs no text encoder.

That of a real Wan has 11 GB, all of which is hashed, loaded and checked to encode a dozen words. There is one file for
each prompt, in wanlite/embeddings of the user's cache folder. Its name is a digest of the prompt, of the files of
tokenizer and text encoder, and of all that the last bits depend on. It begins with a sha256 of name and content.

Legend: L text length, T text width.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..files.atomic import write_bytes
from ..files.cache import fingerprint
from ..files.json_files import open_regular
from ..network import TEXT_LENGTH
from ..teacher.components import num_bytes
from ..teacher.expert_files import sampled_digest

MIN_ENCODER_BYTES = 2**30  # a smaller text encoder loads within a second
MAX_FILE_BYTES = 2**25  # an embedding of 512 tokens has 8 MB in a real Wan
MAX_KEPT_BYTES = 2**30  # the files that were not used for longest are deleted beyond
DIGEST_LENGTH = 64  # characters of a sha256


def encode_or_read(
    folder: str | Path,
    device: str,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], dict[str, Tensor]],
    min_encoder_bytes: int = MIN_ENCODER_BYTES,
) -> dict[str, Tensor]:
    """Return {prompt: embedding (L, T)}, read from disk or encoded by `encode(prompts)` and kept.

    `folder` is the saved student. Embeddings of text encoders below `min_encoder_bytes` are not kept, and neither are
    those of truncated prompts, of which each run warns. Files that are damaged or cannot be written are ignored. The
    last bits of an embedding depend on the prompts that were encoded with it.
    """
    place = kept_folder()
    if place is None or num_bytes(Path(folder) / "text_encoder") < min_encoder_bytes:
        return encode(prompts)
    encoder = digest_encoder(folder, device)
    paths = {prompt: place / fingerprint([encoder, prompt]) for prompt in dict.fromkeys(prompts)}
    found = {prompt: _read(path) for prompt, path in paths.items()}
    kept = {prompt: embedding for prompt, embedding in found.items() if embedding is not None}
    missing = [prompt for prompt in paths if prompt not in kept]
    if not missing:
        return kept
    encoded = encode(missing)
    with suppress(OSError):  # a full disk, or a home that is read-only
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for prompt, embedding in encoded.items():
            if len(embedding) < TEXT_LENGTH:
                _write(paths[prompt], embedding)
        _delete_oldest(place)
    return kept | encoded


def kept_folder() -> Path | None:
    """Return the folder of kept embeddings in the user's cache folder; None for a user without one."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):  # others are to be ignored, by the XDG specification
        return Path(home) / "wanlite/embeddings"
    with suppress(RuntimeError):
        return Path.home() / ".cache/wanlite/embeddings"
    return None


def digest_encoder(folder: str | Path, device: str) -> str:
    """Return a digest of tokenizer and text encoder, of the kind of device, and of the libraries."""
    components = (Path(folder) / name for name in ("text_encoder", "tokenizer"))
    files = sampled_digest(
        (path.parent.name, path)
        for component in components
        for path in sorted(component.iterdir())
        if path.is_file()
    )
    versions = (torch.__version__, transformers.__version__, TEXT_LENGTH)
    return fingerprint([files, torch.device(device).type, *versions])


def _read(path):
    """Return an embedding, None if its file is missing or damaged."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_FILE_BYTES)
        tensors = content[DIGEST_LENGTH:]
        if content[:DIGEST_LENGTH] != _digest(path, tensors):
            return None
        os.utime(path)
        return load(tensors)["embedding"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path, embedding):
    tensors = save({"embedding": embedding.detach().cpu().contiguous().clone()})
    write_bytes(path, _digest(path, tensors) + tensors)


def _digest(path, tensors):
    return hashlib.sha256(path.name.encode() + tensors).hexdigest().encode()


def _delete_oldest(place):
    """Delete the files that were not used for longest, until the others have at most MAX_KEPT_BYTES."""
    files = sorted(((path.stat(), path) for path in place.iterdir()), key=lambda each: -each[0].st_mtime)
    total = 0
    for status, path in files:
        total += status.st_size
        if total > MAX_KEPT_BYTES:
            path.unlink(missing_ok=True)
