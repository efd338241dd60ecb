"""A PNG of this project -> the settings of its image, for the page to restore."""

from pathlib import Path

from PIL import Image

MAX_FILE = 64 * 2**20  # bytes
NAMES = ("prompt", "seed", "num_inference_steps", "width", "height", "guidance_scale", "negative_prompt")
NUMBERS = ("seed", "num_inference_steps", "width", "height")


def read_png_settings(path: str | Path) -> dict[str, str]:
    """Return the text chunks of an image's settings; raises ValueError for other files.

    The pixels are not decoded. Numbers are whole, and checked no further.
    """
    try:
        if Path(path).stat().st_size > MAX_FILE:
            raise ValueError
        with Image.open(path, formats=["PNG"]) as image:
            found = {name: text for name, text in image.info.items() if isinstance(text, str)}
    except Exception:  # Pillow raises many kinds
        raise ValueError("The file is not a PNG image that can be read.") from None
    if not {"prompt", *NUMBERS} <= found.keys():
        raise ValueError(
            "The image has no settings: only a single image that this page or run_inference.py wrote has them, "
            "and programs that edit images remove them."
        )
    if wrong := [name for name in NUMBERS if not found[name].isascii() or not found[name].isdigit()]:
        raise ValueError(f"The image's {wrong[0]} is not a whole number.")
    return {name: found[name] for name in (*NAMES, "weights_sha256") if name in found}
