"""A folder or file of captioned images -> a list of its images, which are read later.

    a folder of images    captions in .txt, .caption or .json files of the same names, or in a metadata.jsonl or
                          metadata.csv with file_name and a caption
    a table               .parquet files with a column of images, or a folder saved by the library `datasets`
    .tar files            in the webdataset layout, with captions as in a folder

A column of captions has one of the names of a column of prompts. Files whose names begin with a dot are ignored.
"""

import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from ..files.inside import OutsideError, resolve_inside, walk
from ..files.json_files import open_regular, refuse_duplicates
from .image_tables import SAVED_STATE, list_parquet, list_saved_dataset
from .listed_images import MAX_BYTES, NOT_UTF8, ListedImage, Unusable, read_object, text_of
from .rows import read_rows
from .tables import find_column, list_columns

KINDS = {  # {suffix: decoder}; other decoders are not used
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp"), "JPEG"),
    ".png": "PNG",
    ".webp": "WEBP",
}
OTHER_KINDS = {  # of images that cannot be used; they are skipped, with or without a caption
    f".{name}"
    for names in (
        "apng, avif, avifs, bmp, cr2, dib, dng, emf, eps, exr, gif, hdr, heic, heif, hif, icns, ico",
        "j2k, jp2, jpx, jxl, jxr, mpo, nef, pbm, pcx, pgm, pnm, ppm, psd, qoi, raw, svg, tga, tif, tiff",
        "wmf, xcf",
    )
    for name in names.split(", ")
}
CAPTIONS = (".txt", ".caption", ".json")  # in the order in which they are tried; a.txt or a.png.txt for a.png
METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = "dataset_dict.json"  # of a dataset with several splits, saved by `datasets`
EXPECTED = (
    f"a folder of images (JPEG, PNG, WebP) with a {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]} beside each or "
    f"{' or '.join(METADATA)}, .parquet files, a folder saved by datasets, or webdataset's .tar files"
)
MAX_HEADER = 2**20  # bytes of a header in a .tar file
MAX_CAPTION_BYTES = MAX_BYTES // 100
Reader = Callable[[int], bytes]  # largest size -> content; may raise Unusable


def list_images(place: str | os.PathLike) -> list[ListedImage]:
    """Return the images of a file or folder; raises OSError or ValueError if there are none."""
    place = Path(place)
    if not place.exists():
        raise OSError(f"--images {place}: no such file or folder. Expected {EXPECTED}.")
    try:
        listed = _list(place)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--images {place}: metadata that is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from None
    except (tarfile.TarError, RecursionError) as error:  # the latter of headers that follow headers
        raise ValueError(f"--images {place}: a damaged .tar file ({error}). Copy it again.") from None
    if not listed:
        raise ValueError(f"--images {place}: no image found. Expected {EXPECTED}.")
    return listed


def _list(place: Path) -> list[ListedImage]:
    """List a file or folder according to the names of its files."""
    names: list[Path] = []
    if place.is_file():
        files = {place.suffix.lower(): [place]}
    elif (place / SPLITS).is_file():
        splits = read_object(resolve_inside(place, SPLITS)).get("splits")
        splits = [str(split) for split in splits] if isinstance(splits, list) else []
        if "train" not in splits:
            raise ValueError(
                f"--images {place}: has the splits {list_columns(splits)}, but not train. Name the folder "
                "of a split."
            )
        return list_saved_dataset(resolve_inside(place, "train"))
    elif (place / SAVED_STATE).is_file():
        return list_saved_dataset(place)
    elif metadata := [place / name for name in METADATA if (place / name).is_file()]:
        return _list_described(place, resolve_inside(place, metadata[0].name))
    else:
        names = [path for path in sorted(walk(place)) if not is_hidden(path.relative_to(place))]
        files = {suffix: [path for path in names if path.suffix == suffix] for suffix in (".parquet", ".tar")}
        for path in chain.from_iterable(files.values()):
            resolve_inside(place, path.relative_to(place))
    if files.get(".parquet"):
        return [row for path in files[".parquet"] for row in list_parquet(path)]
    if files.get(".tar"):
        return [row for path in files[".tar"] for row in _list_tar(path)]
    return _list_folder(place, names) if place.is_dir() else []


def is_hidden(name: str | PurePath) -> bool:
    """Whether a file is not the user's, such as `.DS_Store`, `._a.png`, `__MACOSX/a.png` or `.cache/a.png`."""
    return any(
        part == "__MACOSX" or part.startswith(".") and part not in (".", "..")
        for part in PurePath(name).parts
    )


def _list_folder(place, paths):
    files = {
        (name := path.relative_to(place).as_posix()): partial(_read_file, place, name)
        for path in paths
        if path.suffix.lower() in KINDS or not path.is_dir()
    }
    return _pair(files)


def _pair(files: Mapping[str, Reader]) -> list[ListedImage]:
    """Return all images among the files of a folder, and other files with a caption of their own, such as videos."""
    beside: dict[str, dict[str, str]] = defaultdict(dict)  # {name without suffixes: {suffixes: name}}
    stems = set()
    for name in files:
        stem, suffix = _split(name)
        if suffix in KINDS or suffix in OTHER_KINDS:
            stems.add(stem)
            continue
        for dot in (
            position
            for position, letter in enumerate(name)
            if letter == "." and position > name.rfind("/") + 1
        ):
            beside[name[:dot]][name[dot:].lower()] = name
    found = []
    for name, content in files.items():
        stem, suffix = _split(name)
        captions = [
            beside[base][kind] for kind in CAPTIONS for base in (stem, name) if kind in beside.get(base, ())
        ]
        if suffix in KINDS:
            caption = partial(_refuse, _describe_missing(beside.get(stem, ())))
            if captions:
                caption = partial(_read_caption, files[captions[0]], captions[0])
            found.append(ListedImage(name, caption, partial(content, MAX_BYTES)))
        elif suffix in OTHER_KINDS or captions and suffix not in CAPTIONS and stem not in stems:
            caption = partial(_refuse, "not a JPEG, PNG or WebP")
            found.append(ListedImage(name, caption, partial(content, MAX_BYTES)))
    return found


def _split(name):
    """Return a name without its suffix, and the suffix in lower case."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (name, "")


def _describe_missing(suffixes):
    """Return the reason to skip an image without a caption; `suffixes` are those of files of its name."""
    return (
        f"no {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]} but a {min(suffixes)}" if suffixes else "no caption"
    )


def _refuse(reason):
    raise Unusable(reason)


def _read_caption(content, name):
    text = _text(content(MAX_CAPTION_BYTES))
    if not name.lower().endswith(".json"):
        return text
    try:
        row = json.loads(text, object_pairs_hook=refuse_duplicates)
        return text_of(row[find_column(name, row)]) if isinstance(row, dict) else text_of(row)
    except (ValueError, RecursionError):
        raise Unusable("a caption that cannot be read in its .json") from None


def _list_described(place, metadata):
    """List a folder of images with a table of file names and captions."""
    columns, rows = read_rows(metadata)
    if odd := [number for number, row in rows if not isinstance(row, dict) or "file_name" not in row]:
        raise ValueError(
            f"{metadata}: row {odd[0]} has no file_name. Expected file_name and a caption in every row."
        )
    captions = find_column(metadata, columns)
    names = find_column(metadata, columns, ("file_name",))
    return [
        ListedImage(
            str(row[names] or f"row {number}"),
            partial(text_of, row.get(captions)),
            partial(_read_inside, place, row[names]),
        )
        for number, row in rows
    ]


def _read_inside(place, name):
    path = _resolve(place, str(name))
    if is_hidden(os.path.relpath(path, place)):
        raise Unusable("a hidden file")
    return _read_file(place, str(name), MAX_BYTES)


def _resolve(place, name):
    try:
        return resolve_inside(place, name)
    except OutsideError as error:
        raise Unusable(error.reason) from None


def _read_file(place, name, limit):
    if not (place / name).is_file():
        raise Unusable("no such file")
    with open_regular(_resolve(place, name)) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise Unusable(f"more than {limit / 1e6:.0f} MB")
        return file.read(limit)


def _text(content):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unusable(NOT_UTF8) from None


# ---- webdataset --------------------------------------------------------------------------------------------


def _list_tar(path):
    with open_regular(path) as file, _open_tar(_Headers(file)) as tar:
        files = {
            member.name: partial(_read_member, path, member.offset_data, member.size)
            for member in tar
            if member.isreg() and not is_hidden(member.name)
        }
    images = _pair(files)
    names = [_split(image.name)[0] if _split(image.name)[1] in KINDS else image.name for image in images]
    return [replace(image, name=f"{path.name} {name}") for image, name in zip(images, names)]


def _open_tar(headers: Any) -> tarfile.TarFile:
    return tarfile.open(fileobj=headers, mode="r:")


class _Headers:
    """A .tar file, of which the library reads headers; those with long names or attributes have a bounded size.

    A member of another size than its file can hold would be sought at any place, also before the header.
    """

    def __init__(self, file):
        self.file, self.tell = file, file.tell
        self.size = os.fstat(file.fileno()).st_size

    def seek(self, position):
        if not 0 <= position <= self.size:
            raise tarfile.ReadError("a member of an impossible size")
        return self.file.seek(position)

    def read(self, count):
        if count > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        return self.file.read(count)


def _read_member(path, offset, size, limit):
    """Read a member of a .tar file at its offset."""
    if size > limit:
        raise Unusable(f"more than {limit / 1e6:.0f} MB")
    with open_regular(path) as file:
        file.seek(offset)
        return file.read(size)
