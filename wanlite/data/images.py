"""A place of captioned images -> those that can be learnt from, as pictures of a size; no torch, and Pillow
only to decode.

    a folder of images    a caption in a .txt, .caption or .json of the same name, or metadata.jsonl or metadata.csv with
                          file_name and a caption
    a table               .parquet files with a column of images, or a folder that the library `datasets` saved
    .tar files            as webdataset has them: an image and its caption as in a folder

A column of captions is called as one of prompts. Names that begin with a dot are not files of a place. What
cannot be used is skipped, counted and named; it never ends a run.
"""

import hashlib
import io
import json
import math
import os
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePath

from .prompts import check_text, find_column, read_rows, read_texts

KINDS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp"), "JPEG"),
    ".png": "PNG",
    ".webp": "WEBP",
}  # the decoders that are asked, and no others
OTHER_KINDS = {
    ".apng",
    ".avif",
    ".avifs",
    ".bmp",
    ".cr2",
    ".dib",
    ".dng",
    ".emf",
    ".eps",
    ".exr",
    ".gif",
    ".hdr",
    ".heic",
    ".heif",
    ".hif",
    ".icns",
    ".ico",
    ".j2k",
    ".jp2",
    ".jpx",
    ".jxl",
    ".jxr",
    ".mpo",
    ".nef",
    ".pbm",
    ".pcx",
    ".pgm",
    ".pnm",
    ".ppm",
    ".psd",
    ".qoi",
    ".raw",
    ".svg",
    ".tga",
    ".tif",
    ".tiff",
    ".wmf",
    ".xcf",
}  # named, with a caption or not
CAPTIONS = (".txt", ".caption", ".json")  # the first that is there is read: a.txt or a.png.txt of a.png
METADATA = ("metadata.jsonl", "metadata.csv")
EXPECTED = (
    f"a folder of images (JPEG, PNG, WebP) with a {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]} beside each "
    f"or "
    f"{' or '.join(METADATA)}, .parquet files, a folder saved by datasets, or webdataset's .tar files"
)
MAX_BYTES = 2**28  # of an image's file; of a caption's, a hundredth of it
MAX_NAMED = 3  # names of a kind of what is skipped
LONGEST = 80  # characters of such a name
NO_TEXT = "a caption that is not UTF-8"


class Unusable(ValueError):
    """Why an image is skipped, in words."""


@dataclass(frozen=True)
class Listed:
    """An image that lies in a place, not looked at yet."""

    name: str
    caption: Callable[[], str]  # both may raise Unusable, or OSError
    content: Callable[[], bytes]


@dataclass(frozen=True)
class CaptionedImage:
    """An image that was decoded once: what it says, of what bytes it is, and which of the sizes it comes
    nearest to.
    """

    caption: str
    sha256: str
    size: tuple[int, int]  # (width, height)
    listed: Listed


def choose_images(place, sizes, most=None, held_out=(), say=None, seen=None, is_shown=False):
    """Return the CaptionedImages of a place that can be used, `most` of them at most; `say` is told what is
    skipped and why.

    `sizes` are (width, height) to crop to; an image takes the one whose aspect ratio is nearest its own and
    is skipped where it is smaller, as one whose caption is among the `held_out`. `seen` is what look() said
    of contents, by their sha256: what it holds is not decoded again, all else is added. Raises ValueError
    where none is left.
    """
    from tqdm import tqdm  # takes its defaults from the environment, which a script sets first

    chosen, skipped, held_out, seen = [], {}, set(held_out), {} if seen is None else seen
    listed = list_images(place)
    for image in tqdm(
        listed, desc="looking at images", unit="image", leave=False, disable=None if is_shown else True
    ):
        if len(chosen) == most:
            break
        try:
            caption = _checked(image.caption())
            if caption in held_out:
                raise Unusable("its caption is a held-out prompt")
            content = image.content()
            sha256 = hashlib.sha256(content).hexdigest()
            if sha256 not in seen:
                seen[sha256] = look(content)
            if isinstance(seen[sha256], str):
                raise Unusable(seen[sha256])
            width, height = seen[sha256]
            size = min(sizes, key=lambda size: abs(math.log(size[0] * height / (size[1] * width))))
            if width < size[0] or height < size[1]:
                raise Unusable(f"smaller than {size[0]} x {size[1]}")
        except (Unusable, OSError) as problem:
            skipped.setdefault(
                str(problem) if isinstance(problem, Unusable) else "cannot be read", []
            ).append(image.name)
            continue
        chosen.append(CaptionedImage(caption, sha256, size, image))
    reasons = "; ".join(
        f"{reason} ({len(names)}: "
        f"{', '.join(map(_sayable, names[:MAX_NAMED]))}{', ...' if len(names) > MAX_NAMED else ''})"
        for reason, names in skipped.items()
    )
    if not chosen:
        raise ValueError(f"--images {place}: none of its {len(listed)} images can be used: {reasons}.")
    if say:
        say(
            f"images   {len(chosen):,} of {place}"
            + (f"; {sum(map(len, skipped.values())):,} skipped: {reasons}" if skipped else "")
        )
    return chosen


def _checked(caption):
    caption = caption.strip()
    if not caption:
        raise Unusable("no caption")
    try:
        check_text(caption, "")
    except ValueError:
        raise Unusable(NO_TEXT) from None
    return caption


def look(content):
    """Return the (width, height) of an image file's bytes once it is upright, or in words why it cannot be
    decoded.
    """
    try:
        return decode(content).size
    except Unusable as problem:
        return str(problem)


def read_image(image):
    """Return a CaptionedImage as a picture (height, width, 3) uint8 of its size, the middle of it; OSError
    where it has changed.
    """
    import numpy as np
    from PIL import Image, ImageOps

    content = image.listed.content()
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise OSError(f"{_sayable(image.listed.name)}: has changed since this run began. Start it again.")
    return np.asarray(ImageOps.fit(decode(content), image.size, Image.Resampling.LANCZOS))


def decode(content):
    """Return the bytes of an image file as a Pillow image: upright, RGB, transparent parts white; raises
    Unusable.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(
                io.BytesIO(content), formats=sorted(set(KINDS.values()))
            )  # reads the header alone
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unusable(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels") from None
    except Exception:  # of whatever kind: decoders raise what they come across
        raise Unusable("not a whole JPEG, PNG or WebP") from None


def _as_rgb(image):
    from PIL import Image

    if image.mode.startswith("I;16"):  # 16 bits of grey; Pillow would cut them off at 255
        image = image.point(lambda value: value * (1 / 256)).convert("I").convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _sayable(name):
    name = name.encode("utf-8", "replace").decode()  # a name on a disk may be no text
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}..."


# ---- what lies in a place ----------------------------------------------------------------------------------


def list_images(place):
    """Return what lies in a place as a list of Listed, of which no image is read yet; raises OSError and
    ValueError.
    """
    place = Path(place)
    if not place.exists():
        raise OSError(f"--images {place}: no such place. Expected {EXPECTED}.")
    try:
        listed = _list(place)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--images {place}: metadata that is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from None
    except tarfile.TarError as error:
        raise ValueError(
            f"--images {place}: a .tar file in it is not whole ({error}). Copy it again."
        ) from None
    if not listed:
        raise ValueError(f"--images {place}: holds no image. Expected {EXPECTED}.")
    return listed


def _list(place):
    """Take a place for the kind that the names in it say."""
    if place.is_file():
        files = {place.suffix.lower(): [place]}
    elif (place / "dataset_dict.json").is_file():
        splits = _read_json(place / "dataset_dict.json").get("splits", [])
        if "train" not in splits:
            raise ValueError(
                f"--images {place}: has the splits {', '.join(splits)} and none called train. Name the "
                f"folder of one."
            )
        return _list(place / "train")
    elif (place / "state.json").is_file():
        return _saved_dataset(place)
    elif metadata := [place / name for name in METADATA if (place / name).is_file()]:
        return _described(place, metadata[0])
    else:
        names = [path for path in sorted(place.rglob("*")) if not is_hidden(path.relative_to(place))]
        files = {suffix: [path for path in names if path.suffix == suffix] for suffix in (".parquet", ".tar")}
    if files.get(".parquet"):
        return [row for path in files[".parquet"] for row in _parquet(path)]
    if files.get(".tar"):
        return [row for path in files[".tar"] for row in _tar(path)]
    return _folder(place, names) if place.is_dir() else []


def is_hidden(name):
    """Whether a name is that of a system's or a tool's file: `.DS_Store`, `._a.png`, `__MACOSX/a.png`,
    `.cache/a.png`.
    """
    return any(
        part == "__MACOSX" or part.startswith(".") and part not in (".", "..")
        for part in PurePath(name).parts
    )


def _folder(place, paths):
    files = {
        path.relative_to(place).as_posix(): partial(_file, path)
        for path in paths
        if path.suffix.lower() in KINDS or not path.is_dir()
    }
    return [Listed(name, caption, content) for name, caption, content in _pair(files)]


def _pair(files):
    """Return (name, caption, content) of every image among `files`, {name: reads at most so many bytes of
    it}, and of every other file that has a caption of its own, as a video has."""
    beside, stems = defaultdict(dict), set()  # {name without some suffixes: {those suffixes: name}}
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
            caption = (
                partial(_read_caption, files[captions[0]], captions[0])
                if captions
                else partial(_refuse, _why_uncaptioned(beside.get(stem, ())))
            )
            found.append((name, caption, content))
        elif suffix in OTHER_KINDS or captions and suffix not in CAPTIONS and stem not in stems:
            found.append((name, partial(_refuse, "not a JPEG, PNG or WebP"), content))
    return found


def _split(name):
    """Return a name without its suffix, and the suffix in small letters."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (name, "")


def _why_uncaptioned(suffixes):
    return (
        f"no {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]} but a {min(suffixes)}" if suffixes else "no caption"
    )


def _refuse(reason):
    raise Unusable(reason)


def _read_caption(content, name):
    text = _text(content(MAX_BYTES // 100))
    if not name.lower().endswith(".json"):
        return text
    try:
        row = json.loads(text)
        return _said(row[find_column(name, row)]) if isinstance(row, dict) else _said(row)
    except (ValueError, RecursionError):
        raise Unusable("a caption that cannot be read in its .json") from None


def _described(place, metadata):
    """A folder of images whose captions are in a table of file_name and caption."""
    columns, rows = read_rows(metadata)
    if odd := [number for number, row in rows if not isinstance(row, dict) or "file_name" not in row]:
        raise ValueError(
            f"{metadata}: row {odd[0]} has no file_name. Expected file_name and a caption in every row."
        )
    captions, names = find_column(metadata, columns), find_column(metadata, columns, ("file_name",))
    return [
        Listed(
            str(row[names] or f"row {number}"),
            partial(_said, row.get(captions)),
            partial(_within, place, row[names]),
        )
        for number, row in rows
    ]


def _within(place, name):
    path = place / str(name)
    try:
        is_inside = path.resolve().is_relative_to(place.resolve())
    except ValueError:  # zero bytes, halves of surrogates
        raise Unusable("a name that no file can have") from None
    if not is_inside:
        raise Unusable("outside the folder")
    if is_hidden(os.path.relpath(path, place)):
        raise Unusable("a hidden file")
    return _file(path)


def _file(path, most=MAX_BYTES):
    if not path.is_file():
        raise Unusable("no such file")
    if path.stat().st_size > most:
        raise Unusable(f"more than {most / 1e6:.0f} MB")
    return path.read_bytes()


def _text(content):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unusable(NO_TEXT) from None


def _said(value):
    return value if isinstance(value, str) else ""


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no JSON object. Save the dataset again.")
    return content


# ---- tables; pyarrow is imported where there is one --------------------------------------------------------


def _parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        images, captions = _columns(path, file.schema_arrow)
        said = read_texts(file.read(columns=[captions])[captions])
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
        Listed(
            f"{path.name} row {number}",
            partial(_said, caption),
            partial(_cell, _row_group, path, images, *there),
        )
        for number, (caption, there) in enumerate(zip(said, places), 1)
    ]


def _saved_dataset(place):
    """A folder of `datasets`' save_to_disk: Arrow streams that state.json names."""
    state, rows = _read_json(place / "state.json"), []
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError(
            f"--images {place}: was saved as a selection by an old version of datasets. Save it again."
        )
    for entry in state.get("_data_files", []):
        path = place / str(entry["filename"])
        table = _stream(path)
        images, captions = _columns(path, table.schema)
        rows += [
            Listed(
                f"{path.name} row {row + 1}",
                partial(_said, caption),
                partial(_cell, _whole, path, images, 0, row),
            )
            for row, caption in enumerate(read_texts(table[captions]))
        ]
    return rows


def _columns(path, schema):
    """Return the names of the columns of images (bytes, alone or as `datasets` keeps them) and of captions."""
    import pyarrow

    for field in schema:
        is_struct = pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if is_struct or pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            return field.name, find_column(path, schema.names)
    raise ValueError(
        f"{path}: has the columns {', '.join(schema.names)}, and none of images. Expected bytes of image "
        f"files."
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


@lru_cache(maxsize=64)  # mapped, so that only rows that are asked for are read
def _stream(path):
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as an Arrow stream ({str(error).splitlines()[0]}). Save the dataset "
            f"again."
        ) from None


# ---- webdataset --------------------------------------------------------------------------------------------


def _tar(path):
    with tarfile.open(path, "r:") as tar:
        files = {
            member.name: partial(_part, path, member.offset_data, member.size)
            for member in tar
            if member.isreg() and not is_hidden(member.name)
        }
    return [
        Listed(f"{path.name} {_split(name)[0] if _split(name)[1] in KINDS else name}", caption, content)
        for name, caption, content in _pair(files)
    ]


def _part(path, offset, size, most=MAX_BYTES):
    """Read a member where it lies in its .tar file."""
    if size > most:
        raise Unusable(f"more than {most / 1e6:.0f} MB")
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
