"""A file of prompts of any size and usual kind -> its prompts, or a sample of them. No torch, so that a wrong path
is refused at once.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from heapq import heappush, heappushpop
from pathlib import Path
from typing import Any

from ..files.text_files import locate_undecodable
from .rows import stream_cells, stream_lines
from .tables import KINDS, check_text

MAX_NAMED = 5  # rows without a prompt in a message
EXPECTED = f"Expected a text file with one prompt a line, or {', '.join(KINDS)}."


def read_prompts(
    path: str | Path, log: Callable[[str], Any] | None = None, count: int | None = None, seed: int = 0
) -> list[str]:
    """Return the prompts of a text file, one a line, or of a table's column prompt, text or caption.

    With `count`, return the sample of sample_prompts(); memory grows with the sample, not with the file.
    Rows without a prompt are left out and logged. Raises OSError where the file cannot be read and ValueError
    where it holds no prompt or another format than its suffix.
    """
    prompts = stream_prompts(path, log)
    return list(prompts) if count is None else sample_prompts(prompts, count, seed)


def stream_prompts(path: str | Path, log: Callable[[str], Any] | None = None) -> Iterator[str]:
    """Yield the prompts of a file, of which one block at a time is held; errors as of read_prompts()."""
    path = Path(path)
    if not os.path.exists(path):
        raise OSError(f"{path}: no such file. {EXPECTED}")
    if not path.is_file():
        raise OSError(f"{path}: not a file. {EXPECTED}")
    is_table = path.suffix.lower() in KINDS
    empty: list[int] = []
    num_empty, num_rows = 0, 0
    try:
        for number, cell in stream_cells(path) if is_table else stream_lines(path):
            num_rows += 1
            prompt = cell.strip() if isinstance(cell, str) else ""
            if prompt:
                check_text(prompt, f"{path}: row {number}")
                yield prompt
            else:
                num_empty += 1
                empty += [number] * (len(empty) < MAX_NAMED)
    except UnicodeDecodeError:
        byte, line = locate_undecodable(path)
        raise ValueError(f"{path}: not UTF-8 text (byte {byte}, in line {line}). Save it as UTF-8.") from None
    if num_empty == num_rows:
        raise ValueError(f"{path}: holds no prompt. Write one prompt a {'row' if is_table else 'line'}.")
    if num_empty and log:
        named = ", ".join(map(str, empty)) + (", ..." if num_empty > MAX_NAMED else "")
        log(f"{path}: {num_empty} of {num_rows} rows hold no prompt and are left out: {named}")


def sample_prompts(prompts: Iterable[str], count: int, seed: int) -> list[str]:
    """Return `count` different prompts, each with the same probability; no more than these are held.

    The sample consists of the prompts with the smallest hashes under the seed, in the order of their hashes:
    the order of the file has no influence, and a larger sample begins with a smaller one. If there are at
    most `count` different prompts, all are returned in the order of the file.
    """
    key = str(seed).encode()
    held: set[int] = set()
    heap: list[tuple[int, int, str]] = []  # (-hash, number of the prompt, prompt): the largest hash first
    is_sample = False
    for number, prompt in enumerate(prompts):
        digest = int.from_bytes(blake2b(prompt.encode(), digest_size=8, key=key).digest())
        if digest in held or (is_sample and digest > -heap[0][0]):
            continue
        held.add(digest)
        if len(heap) < count:
            heappush(heap, (-digest, number, prompt))
        else:
            held.discard(-heappushpop(heap, (-digest, number, prompt))[0])
            is_sample = True
    ordered = sorted(heap, reverse=True) if is_sample else sorted(heap, key=lambda each: each[1])
    return [prompt for _, _, prompt in ordered]
