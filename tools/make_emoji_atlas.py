"""Make emoji_atlas/ from npm packages: each object in three styles of 48 x 48 pixels, as one lossless image.

    npm pack --pack-destination packages @lobehub/fluent-emoji-3d@1.1.0
    npm pack --pack-destination packages @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9
    pip install resvg-py==0.5.0
    python tools/make_emoji_atlas.py --packages packages      # a minute

Writes atlas.webp and atlas.json, the names of the objects and styles. Packages and renderer are needed only here:
the project reads the atlas. The same versions make the same bytes.
"""

import argparse
import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "glossy": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "painted": ("@iconify-json/noto", "1.2.9"),
}
RENDERER = "resvg-py", "0.5.0"
SIZE = 48  # pixels; the largest sprite is drawn at 44
COLUMNS = 16  # objects side by side; each style has rows of its own
RENDERED = 256  # pixels, before a drawing is trimmed and reduced
FAINT = 12  # alpha 0..255 up to which a pixel counts as margin

# name: code point. Countable objects that a person recognizes at 26 pixels and that all three packages contain.
OBJECTS = {
    "fox": "1f98a",
    "cat": "1f431",
    "dog": "1f436",
    "mouse": "1f42d",
    "rabbit": "1f430",
    "panda": "1f43c",
    "tiger": "1f42f",
    "lion": "1f981",
    "cow": "1f42e",
    "pig": "1f437",
    "frog": "1f438",
    "monkey": "1f435",
    "chicken": "1f414",
    "penguin": "1f427",
    "chick": "1f425",
    "duck": "1f986",
    "owl": "1f989",
    "unicorn": "1f984",
    "bee": "1f41d",
    "butterfly": "1f98b",
    "snail": "1f40c",
    "ladybug": "1f41e",
    "turtle": "1f422",
    "octopus": "1f419",
    "crab": "1f980",
    "fish": "1f420",
    "dolphin": "1f42c",
    "whale": "1f433",
    "elephant": "1f418",
    "giraffe": "1f992",
    "sheep": "1f411",
    "parrot": "1f99c",
    "flamingo": "1f9a9",
    "crocodile": "1f40a",
    "zebra": "1f993",
    "apple": "1f34e",
    "lemon": "1f34b",
    "banana": "1f34c",
    "watermelon": "1f349",
    "strawberry": "1f353",
    "peach": "1f351",
    "pineapple": "1f34d",
    "eggplant": "1f346",
    "avocado": "1f951",
    "carrot": "1f955",
    "mushroom": "1f344",
    "pumpkin": "1f383",
    "croissant": "1f950",
    "pretzel": "1f968",
    "burger": "1f354",
    "pizza": "1f355",
    "donut": "1f369",
    "cupcake": "1f9c1",
    "car": "1f697",
    "bus": "1f68c",
    "tractor": "1f69c",
    "rocket": "1f680",
    "helicopter": "1f681",
    "airplane": "2708",
    "boat": "26f5",
    "bicycle": "1f6b2",
    "anchor": "2693",
    "football": "26bd",
    "basketball": "1f3c0",
    "guitar": "1f3b8",
    "trumpet": "1f3ba",
    "camera": "1f4f7",
    "clock": "23f0",
    "key": "1f511",
    "lock": "1f512",
    "gift": "1f381",
    "balloon": "1f388",
    "crown": "1f451",
    "hat": "1f3a9",
    "house": "1f3e0",
    "tent": "26fa",
    "castle": "1f3f0",
    "cactus": "1f335",
    "tree": "1f332",
    "rose": "1f339",
    "sunflower": "1f33b",
    "snowman": "26c4",
    "star": "2b50",
    "sun": "2600",
    "heart": "2764",
    "robot": "1f916",
    "ghost": "1f47b",
    "skull": "1f480",
    "backpack": "1f392",
    "teddy": "1f9f8",
    "umbrella": "2602",
    "axe": "1fa93",
    "bomb": "1f4a3",
    "volcano": "1f30b",
    "rainbow": "1f308",
    "diamond": "1f48e",
}


# ---- packages ----------------------------------------------------------------------------------------------


def find_packages(folder: str | Path) -> dict[str, Path]:
    """Return {style: path} of the packages in a folder; raises ValueError for a missing or another version."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(Path(folder).glob("*.tgz")):
        name, version = read_name(path)
        found.setdefault(name, {})[version] = path
    paths = {}
    for style, (name, wanted) in PACKAGES.items():
        versions = found.get(name, {})
        if wanted not in versions:
            raise ValueError(
                f"{folder}: found {name} {' and '.join(versions) or 'in no version'}, expected {wanted}. Get it: "
                f"npm pack --pack-destination {folder} {name}@{wanted}"
            )
        paths[style] = versions[wanted]
    return paths


def read_name(path: Path) -> tuple[str, str]:
    """Return the name and the version of a package that npm packed."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            package = read_member(archive, "package/package.json")
        return package["name"], package["version"]
    except (
        tarfile.TarError,
        zlib.error,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path}: not a package of npm ({error}). Delete it, and get it again with npm pack."
        ) from None


def read_member(archive: tarfile.TarFile, name: str) -> Any:
    """Return the content of a JSON file in a package; raises KeyError if it is missing."""
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(name)
    return json.load(file)


def find_renderer() -> Any:
    """Return the module that renders SVG as PNG; raises ValueError if it is missing or has another version."""
    name, wanted = RENDERER
    try:
        found = version(name)
    except PackageNotFoundError:
        found = None
    if found != wanted:
        raise ValueError(
            f"found {name} {found or 'in no version'}, expected {wanted}. Get it: pip install {name}=={wanted}"
        )
    import resvg_py

    return resvg_py


def read_drawings(path: Path, renderer: Any) -> list[Image.Image]:
    """Return the RGBA image of each of OBJECTS, from a package of WebP files or of SVG texts."""
    with tarfile.open(path, "r:gz") as archive:
        names = archive.getnames()
        if "package/icons.json" not in names:
            return [read_webp(archive, names, code) for code in OBJECTS.values()]
        icons, chars = (read_member(archive, f"package/{name}.json") for name in ("icons", "chars"))
    return [render_svg(icons, chars[code], renderer) for code in OBJECTS.values()]


def read_webp(archive: tarfile.TarFile, names: Sequence[str], code: str) -> Image.Image:
    """Return the image of a code point, with or without a variation selector in its file's name."""
    paths = (f"package/assets/{code}{suffix}.webp" for suffix in ("", "-fe0f"))
    name = next(path for path in paths if path in names)
    return Image.open(archive.extractfile(name)).convert("RGBA")


def render_svg(icons: Mapping[str, Any], name: str, renderer: Any) -> Image.Image:
    """Return the image of an icon, whose name may be an alias."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = renderer.svg_to_bytes(svg_string=text, width=RENDERED, height=RENDERED)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


# ---- sprites -----------------------------------------------------------------------------------------------


def make_sprite(drawing: Image.Image) -> np.ndarray:
    """Trim a drawing, centre it in a square and reduce the square to (SIZE, SIZE, 4) uint8."""
    rows, columns = np.where(np.asarray(drawing)[..., 3] > FAINT)
    trimmed = drawing.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    side = max(trimmed.size)
    square = Image.new("RGBA", (side, side))
    square.paste(trimmed, tuple((side - length) // 2 for length in trimmed.size))
    return reduce_rgba(np.asarray(square, np.float32), SIZE)


def reduce_rgba(square: np.ndarray, size: int) -> np.ndarray:
    """Resize with colours weighted by alpha, so that the colours of transparent pixels do not bleed into edges."""
    square = np.concatenate([square[..., :3] * square[..., 3:] / 255, square[..., 3:]], -1)
    small = np.stack(
        [
            np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.LANCZOS))
            for channel in np.moveaxis(square, -1, 0)
        ],
        -1,
    )
    alpha = small[..., 3:].clip(0, 255)
    colour = (small[..., :3] * 255 / alpha.clip(1)).clip(0, 255) * (alpha >= 1)
    return np.concatenate([colour, alpha], -1).round().astype(np.uint8)


def lay_out(sprites: Sequence[np.ndarray]) -> np.ndarray:
    """Lay sprites (objects, SIZE, SIZE, 4) out in rows of COLUMNS; empty places are transparent."""
    rows = -(-len(sprites) // COLUMNS)
    filled = np.zeros((rows * COLUMNS, SIZE, SIZE, 4), np.uint8)
    filled[: len(sprites)] = sprites
    return filled.reshape(rows, COLUMNS, SIZE, SIZE, 4).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 4)


def main() -> None:
    """Read the packages and write the atlas."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder that npm pack filled")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "emoji_atlas")
    options = parser.parse_args()
    try:
        paths, renderer = find_packages(options.packages), find_renderer()
    except (OSError, ValueError) as error:
        parser.exit(2, f"make_emoji_atlas.py: {error}\n")
    drawings = (read_drawings(path, renderer) for path in paths.values())
    atlas = np.concatenate([lay_out([make_sprite(drawing) for drawing in style]) for style in drawings])
    options.output_dir.mkdir(parents=True, exist_ok=True)
    Image.fromarray(atlas).save(options.output_dir / "atlas.webp", lossless=True, quality=100, method=6)
    contents = {"size": SIZE, "columns": COLUMNS, "styles": list(PACKAGES), "names": list(OBJECTS)}
    (options.output_dir / "atlas.json").write_text(json.dumps(contents) + "\n", encoding="utf-8")
    print(f"{options.output_dir}: {len(OBJECTS)} objects in {len(PACKAGES)} styles")


if __name__ == "__main__":
    main()
