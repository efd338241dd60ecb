"""A file of prompts, of any usual kind -> its prompts. No torch, so that a wrong path is refused at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tables import KINDS, check_text, find_column, read_lines, read_rows, read_texts

MAX_NAMED = 5  # rows without a prompt in a message
EXPECTED = f"Expected a text file with one prompt a line, or {', '.join(KINDS)}."


def read_prompts(path: str | Path, log: Callable[[str], Any] | None = None) -> list[str]:
    """Return the prompts of a text file, one a line, or of a table's column prompt, text or caption.

    Rows without a prompt are left out and logged. Raises OSError where the file cannot be read and ValueError
    where it holds no prompt or another format than its suffix.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(f"{path}: no such file. {EXPECTED}")
    if not path.is_file():
        raise OSError(f"{path}: not a file. {EXPECTED}")
    is_table = path.suffix.lower() in KINDS
    try:
        rows = _table(path) if is_table else read_lines(path)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}, in line {line}). Save it as UTF-8."
        ) from None
    prompts = {number: prompt.strip() if isinstance(prompt, str) else "" for number, prompt in rows}
    for number, prompt in prompts.items():
        check_text(prompt, f"{path}: row {number}")
    found = [prompt for prompt in prompts.values() if prompt]
    if not found:
        raise ValueError(f"{path}: holds no prompt. Write one prompt a {'row' if is_table else 'line'}.")
    if (empty := [number for number, prompt in prompts.items() if not prompt]) and log:
        named = ", ".join(map(str, empty[:MAX_NAMED])) + (", ..." if len(empty) > MAX_NAMED else "")
        log(f"{path}: {len(empty)} of {len(prompts)} rows hold no prompt and are left out: {named}")
    return found


def _table(path):
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path)
    names, rows = read_rows(path)
    if kind in (".csv", ".tsv"):
        column = find_column(path, names)
        return [(number, row.get(column)) for number, row in rows]
    return [
        (
            number,
            row if isinstance(row, str) else row[find_column(path, row)] if isinstance(row, dict) else None,
        )
        for number, row in rows
    ]


def _parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        column = find_column(path, parquet.read_schema(path).names)
        return list(enumerate(read_texts(parquet.read_table(path, columns=[column])[column]), 1))
    except (pyarrow.ArrowException, OSError) as error:  # the latter of a damaged page
        raise ValueError(
            f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}). Write it again."
        ) from None
