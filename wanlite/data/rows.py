"""A text file or table of any size -> its rows, one at a time. No torch, so that a wrong path is refused at once."""

import csv
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ..files.json_files import check_regular, refuse_duplicates
from ..files.text_files import MAX_LINE, bounded_lines, check_no_zeros, open_text, too_long
from .tables import (
    SEPARATORS,
    broken_table,
    check_row_groups,
    find_column,
    find_separator,
    open_parquet,
    read_texts,
)

BLOCK = 1 << 20  # characters of a JSON list, read at once
BATCH = 1 << 11  # rows of a parquet file, read at once
MAX_TEXT_BYTES = 1 << 13  # of a row of prompts, on average over a row group
DECODER = json.JSONDecoder(object_pairs_hook=refuse_duplicates)
LIST_BEGIN, LIST_END, ITEM_END = (
    re.compile(r"\s*\[\s*(?=\S)"),
    re.compile(r"\]"),
    re.compile(r"\s*(?:,\s*(?=\S)|\])"),
)


def stream_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines of a text file that are not blank."""
    with open_text(path) as file:
        for number, line in enumerate(bounded_lines(file, path), 1):
            if line.strip():
                yield number, line.rstrip("\n")


def stream_cells(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, cell) of a table's column of prompts: a string, or another value where there is none.

    Raises ValueError for a file that is not what its suffix promises.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _stream_parquet(path)
    if kind in (".csv", ".tsv"):
        return _stream_csv(path)
    rows = _stream_list(path) if kind == ".json" and _begins_with_list(path) else _stream_json_lines(path)
    return _stream_column(path, rows)


def _stream_column(path, rows):
    """Yield (number, cell) of JSON rows, which are strings or objects; most have the names of the row before."""
    names, column = None, ""
    for number, row in rows:
        if isinstance(row, dict):
            if row.keys() != names:
                names, column = row.keys(), find_column(path, row)
            row = row[column]
        yield number, row


def _stream_json_lines(path):
    for number, line in stream_lines(path):
        try:
            yield number, json.loads(line, object_pairs_hook=refuse_duplicates)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, f"line {number}", error) from None


def _not_json(path, place, error=None):
    """Return the error for text that is not JSON; `error` is that of the parser."""
    if "duplicate key" in str(error):
        return ValueError(f"{path}: {place} has a {error}. Keep one of them.")
    or_list = ", or a list of them" if path.suffix.lower() == ".json" else ""
    return ValueError(f"{path}: {place} is not JSON. Expected an object or a string per line{or_list}.")


def _begins_with_list(path):
    with open_text(path) as file:
        while block := file.read(BLOCK):
            if first := block.lstrip()[:1]:
                return first == "["
    return False


def _stream_list(path):
    """Yield (number, item) of a JSON list, of which a block and one item are held."""
    with open_text(path) as file:
        text, number = _JsonText(path, file), 1
        is_open = bool(text.match(LIST_BEGIN)) and not text.match(LIST_END)
        while is_open:
            yield number, text.read_item(f"row {number}")
            number += 1
            mark = text.match(ITEM_END)
            if not mark:
                raise _not_json(path, f"the text before row {number}")
            is_open = mark[0].strip() != "]"
        if not text.is_at_end():
            raise _not_json(path, "the text after the list")


class _JsonText:
    """JSON text and a position in it; more of the file is read where the text ends."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self.file, self.text, self.position = path, file, "", 0

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Return the match at the position, and move behind it."""
        while not (found := pattern.match(self.text, self.position)):
            if len(self.text[self.position :].strip()) > 1 or not self._read():
                return None
        self.position = found.end()
        return found

    def read_item(self, place: str) -> Any:
        """Return the JSON value at the position, and move behind it."""
        while True:
            try:
                item, end = DECODER.raw_decode(self.text, self.position)
            except RecursionError:
                raise ValueError(f"{self.path}: is nested too deep for a list of prompts.") from None
            except json.JSONDecodeError:
                end = len(self.text)
            except ValueError as error:
                raise _not_json(self.path, place, error) from None
            if end < len(self.text):  # else more of the item may follow
                self.position = end
                return item
            if not self._read():
                raise _not_json(self.path, place)

    def is_at_end(self) -> bool:
        """Return whether only blanks follow."""
        while not self.text[self.position :].strip():
            self.position = len(self.text)
            if not self._read():
                return True
        return False

    def _read(self) -> bool:
        """Read as much as is held, and at least a block: an item of any length takes linear time."""
        held = self.text[self.position :]
        if len(held) > MAX_LINE:
            raise too_long(self.path, "an item of the list")
        more = self.file.read(max(BLOCK, len(held)))
        check_no_zeros(more, self.path)
        self.text, self.position = held + more, 0
        return bool(more)


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, Any]]]:
    """Return the names of the columns and [(number, row)] of a .jsonl or .csv file.

    A row is a dict or, in JSON, any other value. Raises ValueError for a file that cannot be read.
    """
    if path.suffix.lower() == ".csv":
        (_, names), *rows = [*_stream_csv_rows(path)] or [(1, [])]
        return names, [(number, dict(zip(names, cells))) for number, cells in rows]
    found = list(_stream_json_lines(path))
    return list(dict.fromkeys(name for _, row in found if isinstance(row, dict) for name in row)), found


def _stream_csv(path):
    """Yield (row, cell) of a .csv or .tsv file, whose header is row 1."""
    rows = _stream_csv_rows(path)
    names: list[str] = next(rows, (1, []))[1]
    place = names.index(find_column(path, names))
    for number, cells in rows:
        yield number, cells[place] if place < len(cells) else None


def _stream_csv_rows(path):
    """Yield (row, cells), the header first; a longer row than the header is refused."""
    with open_text(path, newline="") as file:
        header = next((line for line in bounded_lines(file, path) if line.strip()), "")
    separator, names = find_separator(path, [header]), None
    for number, cells, is_quoted in _stream_records(path, separator):
        if names is None:
            names = cells
        elif len(names) == 1 and separator == "," and not is_quoted:
            cells = [",".join(cells)]  # the commas belong to the prompt
        if len(cells) > len(names):
            raise ValueError(
                f"{path}: row {number} has {len(cells)} cells, the header {len(names)}: quote prompts with "
                f"{SEPARATORS[separator]}."
            )
        yield number, cells


def _stream_records(path, separator):
    """Yield (number, cells, whether any is quoted) of each row; empty cells at its end do not count."""
    taken: list[str] = []  # the lines of the row

    def lines(file):
        length = 0
        for line in bounded_lines(file, path):
            length = len(line) + (length if taken else 0)
            taken.append(line)
            if length > MAX_LINE:
                raise too_long(path, "a row")
            yield line

    with open_text(path, newline="") as file:
        reader = csv.reader(lines(file), delimiter=separator, strict=True)  # strict: every quote is closed
        try:
            for number, cells in enumerate(reader, 1):
                is_quoted = separator.join(cells) != "".join(taken).rstrip("\r\n")
                taken.clear()
                while cells and not cells[-1]:  # spreadsheets write them
                    cells.pop()
                if cells:
                    yield number, cells, is_quoted
        except csv.Error as error:
            start = reader.line_num - len(taken) + 1
            raise ValueError(
                f"{path}: cannot be read as {path.suffix[1:].upper()} (line {start}: {error}). Write it again."
            ) from None


def _stream_parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        check_regular(path)
        schema, number = parquet.read_schema(path), 0
        column = find_column(path, schema.names)
        with open_parquet(path, schema, column) as file:
            check_row_groups(path, file.metadata, column, MAX_TEXT_BYTES)
            groups = range(file.num_row_groups)  # one at a time, for pyarrow reads ahead
            batches = (file.iter_batches(BATCH, [group], [column]) for group in groups)
            for batch in chain.from_iterable(batches):
                for cell in read_texts(batch.column(0)):
                    number += 1
                    yield number, cell
    except (pyarrow.ArrowException, OSError) as error:  # the latter of a damaged page
        raise broken_table(path, "parquet", error, "Write it again.") from None
