"""A table of captioned images (.parquet, or saved by the library `datasets`) -> a list of its images.

pyarrow is imported only when a table is read.
"""

from functools import lru_cache, partial
from pathlib import Path

from .listed_images import ListedImage, Unusable, read_object, text_of
from .tables import find_column, read_texts

SAVED_STATE = "state.json"  # of a dataset saved by `datasets`


def list_parquet(path: Path) -> list[ListedImage]:
    """List the rows of a .parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        images, captions = _columns(path, file.schema_arrow)
        texts = read_texts(file.read(columns=[captions])[captions])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}). Write it again."
        ) from None
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
    state = read_object(place / SAVED_STATE)
    rows: list[ListedImage] = []
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError(
            f"--images {place}: was saved as a selection by an old version of datasets. Save it again."
        )
    for entry in state.get("_data_files", []):
        path = place / str(entry["filename"])
        table = _stream(path)
        images, captions = _columns(path, table.schema)
        rows += [
            ListedImage(
                f"{path.name} row {row + 1}",
                partial(text_of, caption),
                partial(_cell, _whole, path, images, 0, row),
            )
            for row, caption in enumerate(read_texts(table[captions]))
        ]
    return rows


def _columns(path, schema):
    """Return the names of the columns of images (bytes, or a struct with bytes as in `datasets`) and captions."""
    import pyarrow

    for field in schema:
        is_struct = pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if is_struct or pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            return field.name, find_column(path, schema.names)
    raise ValueError(
        f"{path}: has the columns {', '.join(schema.names)}, but none of images. Expected bytes of image files."
    )


def _cell(read, path, column, group, row):
    value = read(path, column, group)[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise Unusable("a cell without the image's bytes")
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
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as an Arrow stream ({str(error).splitlines()[0]}). "
            "Save the dataset again."
        ) from None
