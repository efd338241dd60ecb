"""Text files and tables (.jsonl, .json, .csv, .tsv, .parquet) of prompts or captions -> rows.

This module does not import torch, so that a wrong path is refused at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from ..files.json_files import shown
from ..runtime.terminal import one_line

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
MAX_NAMED = 6  # columns in a message
MAX_REASON = 200  # characters of a library's message
MIN_GROUP, MAX_GROUP = 2**26, 2**31  # bytes of a column of a row group that are always, and never, accepted


def check_text(text: str, source: object) -> None:
    """Raise ValueError for a text that UTF-8 cannot encode, which JSON escapes and tables may contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source} holds {ascii(text[error.start])}, not a character that UTF-8 can encode. "
            "Write it again."
        ) from None


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


def read_texts(column: Any) -> Iterator[Any]:
    """Yield the cells of an Arrow column; invalid UTF-8 is decoded to characters that check_text() refuses.

    A text of a dictionary, which many cells may share, is the same object in all of them.
    """
    import pyarrow

    def read(cell):
        try:
            return cell.as_py()
        except UnicodeDecodeError:
            return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")

    for chunk in column.chunks if isinstance(column, pyarrow.ChunkedArray) else [column]:
        if not pyarrow.types.is_dictionary(chunk.type):
            yield from map(read, chunk)
            continue
        text_at = cache(lambda index, texts=chunk.dictionary: read(texts[index]))
        yield from (None if index is None else text_at(index) for index in chunk.indices.to_pylist())


def open_parquet(path: Any, schema: Any, column: str) -> Any:
    """Return the ParquetFile of a path, which holds a text of many rows of `column` once."""
    import pyarrow
    from pyarrow import parquet

    kind = schema.field(column).type
    is_text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    return parquet.ParquetFile(path, read_dictionary=[column] if is_text else None)


def broken_table(path: Any, kind: str, error: Exception, remedy: str) -> ValueError:
    """Return the error for a file that pyarrow cannot read."""
    reason = one_line(str(error).partition("\n")[0], MAX_REASON)
    return ValueError(f"{path}: cannot be read as {kind} ({reason}). {remedy}")


def check_row_groups(path: object, metadata: Any, column: str, bytes_each: int = MAX_GROUP) -> None:
    """Raise ValueError for a parquet file with a row group that would take gigabytes; nothing of it is read.

    `metadata` is that of pyarrow; the rows of `column` may have `bytes_each` on average.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        parts = map(group.column, range(group.num_columns))
        size = sum(
            part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column
        )
        if size > min(MAX_GROUP, max(MIN_GROUP, group.num_rows * bytes_each)):
            raise ValueError(
                f"{path}: {size / 1e6:,.0f} MB of {column} in a group of {group.num_rows:,} rows, too many to be read "
                "at once. Write it again, in smaller row groups."
            )


def find_column(path: object, names: Iterable[str], wanted: Sequence[str] = COLUMNS) -> str:
    """Return the first of the `wanted` names that a column has; raises ValueError unless there is exactly one."""
    names = list(names)
    found = _columns_of(wanted, names)
    expected = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
    if not found:
        raise ValueError(f"{path}: has the columns {list_columns(names)}, expected one called {expected}.")
    if len(found) > 1:
        raise ValueError(
            f"{path}: has {len(found)} columns called {found[0].strip()}, expected one. Rename the others."
        )
    return found[0]


def list_columns(names: Sequence[str]) -> str:
    """Return the names of the first columns, for a message."""
    listed = ", ".join(shown(f"{name!s:.40}") for name in names[:MAX_NAMED]) or "none"
    return f"{listed} and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else listed


def _columns_of(wanted, names):
    """Return the names that equal the first of `wanted` with a match, ignoring case."""
    matches = ([name for name in names if name and name.strip().lower() == each] for each in wanted)
    return next(filter(None, matches), [])
