"""A folder or file of captioned images -> the usable images, each with one of the run's sizes.

Images that cannot be used are skipped and logged; they never end a run. This module does not import torch, and
Pillow only to decode.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.json_files import open_regular
from .image_sources import KINDS, list_images
from .listed_images import MAX_BYTES, NOT_UTF8, ListedImage, Unusable
from .tables import check_text

if TYPE_CHECKING:  # numpy is imported only to decode
    import numpy as np

MAX_NAMED = 3  # skipped images that a message names, for each reason
MAX_DECODED = 2**28  # bytes of an image's pixels, of which a few copies are made
MAX_SHOWN = 80  # characters of a name in a message
Size = tuple[int, int]  # width and height


@dataclass(frozen=True)
class CaptionedImage:
    """A usable image, and the size that it is cropped to."""

    caption: str
    sha256: str  # of the file
    size: Size
    listed: ListedImage


def choose_images(
    place: str,
    sizes: Sequence[Size],
    max_count: int | None = None,
    held_out: Collection[str] = (),
    log: Callable[[str], Any] | None = None,
    known: MutableMapping[str, Any] | None = None,
    is_shown: bool = False,
) -> list[CaptionedImage]:
    """Return the usable images of a file or folder, at most `max_count`, and log the reasons to skip others.

    An image is cropped to the size with the nearest aspect ratio; it is skipped if it is smaller, or if its
    caption is `held_out`. `known` is a cache, {sha256 of the content: read_size()}, to which new images are
    added. Raises ValueError if no image is usable.
    """
    from tqdm import tqdm  # reads its defaults from the environment, which scripts set first

    known = {} if known is None else known
    chosen: list[CaptionedImage] = []
    skipped: dict[str, list[str]] = {}
    listed = list_images(place)
    held_out = set(held_out)
    for image in tqdm(listed, desc="reading images", unit="image", leave=False, disable=not is_shown or None):
        if len(chosen) == max_count:
            break
        try:
            chosen.append(_check_image(image, sizes, held_out, known))
        except Unusable as problem:
            skipped.setdefault(str(problem), []).append(image.name)
        except OSError:
            skipped.setdefault("cannot be read", []).append(image.name)
    reasons = "; ".join(f"{reason} ({_count_and_names(names)})" for reason, names in skipped.items())
    if not chosen:
        raise ValueError(f"--images {place}: none of its {len(listed)} images can be used: {reasons}.")
    if log:
        count = sum(map(len, skipped.values()))
        log(f"images   {len(chosen):,} of {place}" + (f"; {count:,} skipped: {reasons}" if skipped else ""))
    return chosen


def _check_image(image, sizes, held_out, known) -> CaptionedImage:
    """Read an image; raises Unusable, or OSError if it cannot be read."""
    caption = _checked_caption(image.caption())
    if caption in held_out:
        raise Unusable("its caption is a held-out prompt")
    content = image.content()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 not in known:
        known[sha256] = read_size(content)
    if isinstance(known[sha256], str):
        raise Unusable(known[sha256])
    width, height = known[sha256]
    size = min(sizes, key=lambda each: abs(math.log(each[0] * height / (each[1] * width))))
    if width < size[0] or height < size[1]:
        raise Unusable(f"smaller than {size[0]} x {size[1]}")
    return CaptionedImage(caption, sha256, size, image)


def _count_and_names(names):
    shown = ", ".join(map(_printable, names[:MAX_NAMED]))
    return f"{len(names)}: {shown}{', ...' if len(names) > MAX_NAMED else ''}"


def _checked_caption(caption):
    caption = caption.strip()
    if not caption:
        raise Unusable("no caption")
    try:
        check_text(caption, "")
    except ValueError:
        raise Unusable(NOT_UTF8) from None
    return caption


def read_size(content: bytes) -> Size | str:
    """Return the size of the upright image in a file's bytes, or the reason why it cannot be decoded."""
    try:
        return decode(content).size
    except Unusable as problem:
        return str(problem)


def read_image(image: CaptionedImage) -> "np.ndarray":
    """Return an image (height, width, 3) uint8, cropped and resized; raises OSError if its file has changed."""
    import numpy as np
    from PIL import Image, ImageOps

    content = image.listed.content()
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise OSError(f"{_printable(image.listed.name)}: has changed since this run began. Start it again.")
    return np.asarray(ImageOps.fit(decode(content), image.size, Image.Resampling.LANCZOS))


def read_image_file(path: str | Path, flag: str, size: Size | None = None) -> Any:
    """Read an image file to a Pillow image, as decode() does; `flag` names it in errors.

    Raises OSError for a file that cannot be read, and ValueError for one that is not a usable image, or not one of
    `size`.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:  # names the file and the remedy
        raise OSError(f"{flag} {error}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{flag} {path}: more than {MAX_BYTES / 1e6:.0f} MB, too large for an image.")
    try:
        image = decode(content, size)
    except Unusable as problem:
        raise ValueError(f"{flag} {path}: {problem}. Save the image again.") from None
    if size and image.size != size:
        raise ValueError(
            f"{flag} {path} is {image.width} x {image.height}, expected {size[0]} x {size[1]}. Resize it, or add its "
            "--width and --height."
        )
    return image


def decode(content: bytes, size: Size | None = None) -> Any:
    """Decode the bytes of an image file to a Pillow image: upright, in RGB, with a white background.

    An image that is not of the expected `size`, upright or on its side, is returned without its pixels. Raises Unusable
    if the bytes cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            formats = sorted(set(KINDS.values()))
            image = Image.open(io.BytesIO(content), formats=formats)  # reads only the header
            if (num_bytes := _decoded_bytes(image)) > MAX_DECODED:
                raise Unusable(f"{num_bytes / 1e6:.0f} MB of pixels")
            if size and sorted(image.size) != sorted(size):
                return image  # pixels take a hundred times the memory of the file
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise Unusable(f"more than {limit:.0f} million pixels") from None
    except Unusable:
        raise
    except Exception:  # decoders raise errors of many types
        raise Unusable("not a complete JPEG, PNG or WebP") from None


def _decoded_bytes(image):
    """Return the bytes of an image in memory, before it is converted."""
    depth = 4 if image.mode in ("I", "F") else 2 if image.mode.startswith("I;16") else 1
    return image.width * image.height * len(image.getbands()) * depth


def _as_rgb(image):
    from PIL import Image

    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        image = image.point(lambda value: value * (1 / 256)).convert("I").convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _printable(name):
    name = name.encode("utf-8", "replace").decode()  # names of files may not be valid text
    return name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
