"""Text files and tables (.jsonl, .json, .csv, .tsv, .parquet) of prompts or captions -> rows.

This module does not import torch, so that a wrong path is refused at once.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "text", "caption")  # possible names of the column of prompts
KINDS = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
)  # suffixes of tables; other files are text, one prompt per line
SEPARATORS = {  # {separator of cells: its name in messages}
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "vertical bars",
}
COMPRESSED = (  # first bytes of gzip, zip, xz, bzip2 and zstd files
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"\xfd7zXZ",
    b"BZh",
    b"\x28\xb5\x2f\xfd",
)


def check_text(text: str, source: object) -> None:
    """Raise ValueError for a text that UTF-8 cannot encode, which JSON escapes and tables may contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source} holds {ascii(text[error.start])}, not a character that UTF-8 can encode. "
            "Write it again."
        ) from None


def _read_text(path):
    """Return the content of a UTF-8 text file; raises ValueError for other files."""
    content = path.read_bytes()
    if content.startswith(COMPRESSED):
        raise ValueError(f"{path}: is compressed, expected text. Unpack it.")
    text = content.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError(f"{path}: holds zero bytes: it is UTF-16, or not text. Save it as UTF-8.")
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise ValueError(f"{path}: is a web page, expected a file of prompts. Download the file itself.")
    return text


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, line) of the lines of a text file, without blank ones."""
    text = _read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")  # splitlines() also splits at separators that JSON strings may contain
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, Any]]]:
    """Return the names of the columns and [(number, row)] of a .jsonl, .json, .csv or .tsv file.

    A row is a dict or, in JSON, any other value. Raises ValueError for a file that cannot be read.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_csv(path)
    rows = _read_json(path)
    return list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row)), rows


def _read_json(path):
    is_list = path.suffix.lower() == ".json"
    if is_list:
        try:
            rows = json.loads(_read_text(path))
        except RecursionError:
            raise ValueError(f"{path}: is nested too deeply for a list of prompts.") from None
        except json.JSONDecodeError:
            rows = None  # JSON lines with the suffix .json
        if isinstance(rows, list):
            return list(enumerate(rows, 1))
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            raise ValueError(
                f"{path}: line {number} is not JSON. Expected an object or a string per line"
                f"{', or a list of them' if is_list else ''}."
            ) from None
    return rows


def _read_csv(path):
    """Return the names of the columns, from row 1, and the rows as dicts; raises ValueError for surplus cells."""
    lines = io.StringIO(_read_text(path), newline="").readlines()
    separator = find_separator(path, lines)
    (_, names, _), *records = [*_records(path, lines, separator)] or [(1, [], False)]
    rows = []
    for number, cells, is_quoted in records:
        if len(names) == 1 and separator == "," and not is_quoted:
            cells = [",".join(cells)]  # the commas belong to the prompt
        if len(cells) > len(names):
            raise ValueError(
                f"{path}: row {number} has {len(cells)} cells, the header {len(names)}: quote prompts with "
                f"{SEPARATORS[separator]}."
            )
        rows.append((number, dict(zip(names, cells))))
    return names, rows


def find_separator(path, lines):
    """Return the separator with which the header has a column of prompts, else that of the file's suffix."""
    expected = "\t" if path.suffix.lower() == ".tsv" else ","
    header = next((line for line in lines if line.strip()), "")
    return next(
        (
            separator
            for separator in (expected, *SEPARATORS)
            if _columns_of(COLUMNS, [name.strip(' "\r\n') for name in header.split(separator)])
        ),
        expected,
    )


def _records(path, lines, separator):
    """Yield (number, cells, whether any is quoted) of each row.

    Empty cells at the end of a row, which spreadsheets write, are removed.
    """
    reader = csv.reader(lines, delimiter=separator, strict=True)  # strict: an open quote is an error
    start = 0
    try:
        for number, cells in enumerate(reader, 1):
            is_quoted = separator.join(cells) != "".join(lines[start : reader.line_num]).rstrip("\r\n")
            start = reader.line_num
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield number, cells, is_quoted
    except csv.Error as error:
        raise ValueError(
            f"{path}: cannot be read as {path.suffix[1:].upper()} (line {start + 1}: {error}). "
            "Write it again."
        ) from None


def read_texts(column: Any) -> list:
    """Return the cells of an Arrow column; invalid UTF-8 is decoded to characters that check_text() refuses."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)

    def read(cell):
        try:
            return cell.as_py()
        except UnicodeDecodeError:
            return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")

    return [read(cell) for cell in column]


def find_column(path: object, names: Iterable[str], wanted: Sequence[str] = COLUMNS) -> str:
    """Return the first of the `wanted` names that a column has; raises ValueError unless there is exactly one."""
    names = list(names)
    found = _columns_of(wanted, names)
    expected = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
    if not found:
        raise ValueError(
            f"{path}: has the columns {', '.join(map(str, names)) or 'none'}, expected one called {expected}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{path}: has {len(found)} columns called {found[0].strip()}, expected one. Rename the others."
        )
    return found[0]


def _columns_of(wanted, names):
    """Return the names that equal the first of `wanted` with a match, ignoring case."""
    matches = ([name for name in names if name and name.strip().lower() == each] for each in wanted)
    return next(filter(None, matches), [])
