"""A table of captioned images (.parquet, or saved by the library `datasets`) -> a list of its images.

pyarrow is imported only when a table is read.
"""

from functools import lru_cache, partial
from pathlib import Path

from ..files.inside import resolve_inside
from ..files.json_files import check_regular
from .listed_images import MAX_BYTES, ListedImage, Unusable, read_object, text_of
from .tables import broken_table, check_row_groups, find_column, list_columns, open_parquet, read_texts

MAX_ROWS = 2**22  # of a table of images: a row takes a kilobyte of memory, and none in a file of empty rows
SAVED_STATE = "state.json"  # of a dataset saved by `datasets`


def list_parquet(path: Path) -> list[ListedImage]:
    """List the rows of a .parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        check_regular(path)
        schema = parquet.read_schema(path)
        images, captions = _columns(path, schema)
        file = open_parquet(path, schema, captions)
        _check_rows(path, file.metadata.num_rows)
        for column in (images, captions):
            check_row_groups(path, file.metadata, column)
        groups = (file.read_row_group(group, columns=[captions]) for group in range(file.num_row_groups))
        texts = [text for group in groups for text in read_texts(group[captions])]
    except (pyarrow.ArrowException, OSError) as error:
        raise broken_table(path, "parquet", error, "Write it again.") from None
    places = [
        (group, row)
        for group in range(file.num_row_groups)
        for row in range(file.metadata.row_group(group).num_rows)
    ]
    return [
        ListedImage(
            f"{path.name} row {number}",
            partial(text_of, caption),
            partial(_cell, _row_group, path, images, *at),
        )
        for number, (caption, at) in enumerate(zip(texts, places), 1)
    ]


def list_saved_dataset(place: Path) -> list[ListedImage]:
    """List the rows of a folder written by save_to_disk of `datasets`: Arrow streams, named in state.json."""
    state = read_object(resolve_inside(place, SAVED_STATE))
    rows: list[ListedImage] = []
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError(
            f"--images {place}: was saved as a selection by an old version of datasets. Save it again."
        )
    entries = state.get("_data_files") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{place / SAVED_STATE}: has no list of _data_files. Save the dataset again.")
    for path in (resolve_inside(place, entry.get("filename", "")) for entry in entries):
        table = _stream(path)
        images, captions = _columns(path, table.schema)
        _check_rows(path, table.num_rows)
        rows += [
            ListedImage(
                f"{path.name} row {row + 1}",
                partial(text_of, caption),
                partial(_cell, _whole, path, images, 0, row),
            )
            for row, caption in enumerate(read_texts(table[captions]))
        ]
    return rows


def _check_rows(path, count):
    """Refuse a table of more rows than are listed in memory."""
    if count > MAX_ROWS:
        raise ValueError(
            f"{path}: has {count:,} rows, expected at most {MAX_ROWS:,} images. Choose some, and write them again."
        )


def _columns(path, schema):
    """Return the names of the columns of images (bytes, or a struct with bytes as in `datasets`) and captions."""
    import pyarrow

    for field in schema:
        is_struct = pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if is_struct or pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            return field.name, find_column(path, schema.names)
    raise ValueError(
        f"{path}: has the columns {list_columns(schema.names)}, but none of images. Expected bytes of image files."
    )


def _cell(read, path, column, group, row):
    value = read(path, column, group)[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise Unusable("a cell without the image's bytes")
    if len(content) > MAX_BYTES:
        raise Unusable(f"more than {MAX_BYTES / 1e6:.0f} MB")
    return content


@lru_cache(maxsize=1)
def _row_group(path, column, group):
    from pyarrow import parquet

    return parquet.ParquetFile(path).read_row_group(group, columns=[column])[column]


def _whole(path, column, group):
    return _stream(path)[column]


@lru_cache(maxsize=64)  # memory-mapped: only rows in use are read
def _stream(path):
    import pyarrow

    try:
        check_regular(path)
        allocated, batches = pyarrow.total_allocated_bytes(), []
        stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in stream:
            batches.append(batch)
            if pyarrow.total_allocated_bytes() - allocated > MAX_BYTES:  # of compressed batches alone
                raise OSError("it is compressed, and too large to be unpacked")
        return pyarrow.Table.from_batches(batches, stream.schema)
    except (pyarrow.ArrowException, OSError) as error:
        raise broken_table(path, "an Arrow stream", error, "Save the dataset again.") from None
