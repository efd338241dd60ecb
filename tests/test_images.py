"""Captioned images: every kind of source gives the same images, unusable ones are skipped and reported,
and a run trains on them.
"""

import csv
import io
import json
import shutil
import tarfile
import time
import zlib

import numpy as np
import pyarrow
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from pyarrow import parquet

from tests.conftest import ROOT, TINY_TEACHER
from tests.test_command_lines import read_refusal
from tests.test_data import STEPS, teacher_for
from tests.test_prompts import texts
from tests.test_resolutions import leave_as_killed
from tests.test_resuming import have_equal_weights, train
from train_distillation import Settings
from wanlite.data.autoencoder import encode_images, load_autoencoder, to_pixels
from wanlite.data.datasets import Trajectories
from wanlite.data.image_sources import CAPTIONS as CAPTION_KINDS
from wanlite.data.image_sources import KINDS, list_images
from wanlite.data.images import MAX_NAMED, choose_images, decode, read_image
from wanlite.data.trajectories import TrajectoryGenerator
from wanlite.flow import add_noise, make_scheduler
from wanlite.planning.defaults import choose_data
from wanlite.planning.resolve import complete, image_sizes
from wanlite.training.run_folder import read_run
from wanlite.world import shapes

SCENES = shapes.scenes(40, 6)
CAPTIONS = [shapes.all_captions(scene)[0] for scene in SCENES]
PICTURES = [shapes.draw(scene) for scene in SCENES]
SIZE = [(64, 64)]


def encoded(image, kind="PNG", **options):
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, kind, **options)
    return content.getvalue()


CONTENTS = [encoded(image) for image in PICTURES]


def write_folder(place):
    (place / "below").mkdir(parents=True)
    for number, (content, caption) in enumerate(zip(CONTENTS, CAPTIONS)):
        path = place / ("below" if number > 3 else "") / f"{number}.png"
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"{caption}\n")
    (place / "below").rename(place / "z")  # sorted last


def write_described(place, name):
    place.mkdir()
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(CAPTIONS)]
    for row, content in zip(rows, CONTENTS):
        (place / row["file_name"]).write_bytes(content)
    with open(place / name, "w", newline="") as file:
        if name.endswith("csv"):
            table = csv.DictWriter(file, ["file_name", "text"])
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def table(contents=CONTENTS, captions=CAPTIONS):
    images = pyarrow.array(
        [{"bytes": content, "path": None} for content in contents],
        pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
    )
    return pyarrow.table({"id": list(range(len(contents))), "image": images, "caption": captions})


def write_parquet(place):
    (place / "data").mkdir(parents=True)
    parquet.write_table(
        table(CONTENTS[:4], CAPTIONS[:4]), place / "data" / "train-00000-of-00002.parquet", row_group_size=3
    )
    parquet.write_table(table(CONTENTS[4:], CAPTIONS[4:]), place / "data" / "train-00001-of-00002.parquet")


def write_saved_dataset(place):
    """Write a dataset in the layout of `datasets.save_to_disk`."""
    (place / "train").mkdir(parents=True)
    (place / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, rows in zip(names, (slice(0, 2), slice(2, 6))):
        part = table(CONTENTS[rows], CAPTIONS[rows])
        with (
            pyarrow.OSFile(str(place / "train" / name), "wb") as file,
            pyarrow.ipc.new_stream(file, part.schema) as stream,
        ):
            stream.write_table(part)
    (place / "train" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_webdataset(place):
    rows = list(zip(CONTENTS, CAPTIONS))
    write_tar(
        place / "000.tar",
        [
            member
            for number, (content, caption) in enumerate(rows[:3])
            for member in ((f"{number}.png", content), (f"{number}.txt", caption.encode()))
        ],
    )
    write_tar(
        place / "001.tar",
        [
            member
            for number, (content, caption) in enumerate(rows[3:])
            for member in (
                (f"a/{number}.json", json.dumps({"caption": caption, "id": 1}).encode()),
                (f"a/{number}.PNG", content),
            )
        ],
    )


WRITERS = {
    "folder": write_folder,
    "metadata.jsonl": lambda place: write_described(place, "metadata.jsonl"),
    "metadata.csv": lambda place: write_described(place, "metadata.csv"),
    "parquet": write_parquet,
    "saved dataset": write_saved_dataset,
    "webdataset": write_webdataset,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_source_gives_the_same_images_and_captions(kind, tmp_path):
    printed = []
    WRITERS[kind](tmp_path / "place")
    images = choose_images(tmp_path / "place", SIZE, log=printed.append)
    assert [image.caption for image in images] == CAPTIONS
    assert all((read_image(image) == expected).all() for image, expected in zip(images, PICTURES))
    assert printed == [f"images   6 of {tmp_path / 'place'}"]
    assert [image.caption for image in choose_images(tmp_path / "place", SIZE, max_count=2)] == CAPTIONS[:2]


@pytest.mark.parametrize(
    "kind, name", [("parquet", "data/train-00000-of-00002.parquet"), ("webdataset", "001.tar")]
)
def test_a_single_file_is_a_source(kind, name, tmp_path):
    WRITERS[kind](tmp_path / "place")
    assert len(choose_images(tmp_path / "place" / name, SIZE)) in (4, 3)


# ---- images ------------------------------------------------------------------------------------------------


def test_an_image_is_centre_cropped_to_the_nearest_ratio_and_downscaled(tmp_path):
    wide = np.zeros((128, 256, 3), np.uint8)
    wide[:, 64:192] = 255  # the part that a square crop keeps
    (tmp_path / "wide.png").write_bytes(encoded(wide))
    (tmp_path / "wide.txt").write_text("a bar")
    (square,) = choose_images(tmp_path, SIZE)
    assert read_image(square).shape == (64, 64, 3) and read_image(square).min() > 230
    (nearest,) = choose_images(tmp_path, [(64, 64), (48, 80), (96, 48)])
    assert nearest.size == (96, 48) and 0 < read_image(nearest).mean() < 255


RED = Image.new("RGB", (64, 64), (200, 30, 30))


def turned():
    """An image with a red left half, stored rotated by a camera: its top is at the right of the stored
    pixels.
    """
    upright = Image.new("RGB", (64, 80), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 32, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    return upright, encoded(upright.rotate(90, expand=True), "PNG", exif=exif)


def test_an_image_is_rotated_by_its_exif_orientation():
    upright, content = turned()
    assert (np.asarray(decode(content)) == np.asarray(upright)).all()


@pytest.mark.parametrize(
    "mode, kind, expected, near",
    [
        ("CMYK", "JPEG", (200, 30, 30), 12),
        ("P", "PNG", (200, 30, 30), 52),
        ("L", "PNG", (81, 81, 81), 1),
        ("YCbCr", "JPEG", (200, 30, 30), 12),
        ("RGBA", "WEBP", (200, 30, 30), 4),
        ("LA", "PNG", (81, 81, 81), 1),
    ],
)
def test_an_image_of_any_colour_mode_becomes_rgb(mode, kind, expected, near):
    found = np.asarray(decode(encoded(RED.convert(mode), kind)))
    assert found.shape == (64, 64, 3) and np.abs(found.astype(int) - expected).max() <= near


def test_transparency_becomes_white_and_16_bit_grey_becomes_8_bit():
    half = RED.convert("RGBA")
    half.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 32)[None].repeat(64, 0)))
    found = np.asarray(decode(encoded(half)))
    assert (found[:, :32] == 255).all() and (found[:, 32:] == (200, 30, 30)).all()
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (np.asarray(decode(encoded(palette, transparency=0))) == 255).all()
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    assert (np.asarray(decode(encoded(grey)))[..., 0] == grey >> 8).all()


def bomb(width, height):
    """Return the header of a PNG of a size, without pixels."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n\0\0\0\r"
        + chunk
        + zlib.crc32(chunk).to_bytes(4, "big")
        + b"\0\0\0\x10IDAT"
        + bytes(64)
    )


BROKEN = {
    "cut.png": (CONTENTS[0][:-200], "not a complete"),
    "cut.jpg": (encoded(PICTURES[0], "JPEG")[:-300], "not a complete"),
    "none.jpg": (b"", "not a complete"),
    "page.png": (b"<html>not found</html>", "not a complete"),
    "bitmap.png": (encoded(PICTURES[0], "BMP"), "not a complete"),
    "empty.png": (bomb(0, 0), "not a complete"),
    "bomb.png": (bomb(20000, 20000), "more than 89 million pixels"),
    "large.png": (bomb(10000, 10000), "more than 89"),
    "small.png": (encoded(PICTURES[0][:63]), "smaller than 64 x 64"),
}


def test_unusable_images_are_skipped_counted_and_named_at_once(tmp_path):
    write_folder(tmp_path / "place")
    for name, (content, _) in BROKEN.items():
        (tmp_path / "place" / name).write_bytes(content)
        (tmp_path / "place" / name).with_suffix(".txt").write_text("a caption")
    for number, caption in enumerate((b" \n", b"\xff\xfe", None)):
        (tmp_path / "place" / f"words{number}.png").write_bytes(CONTENTS[0])
        if caption is not None:
            (tmp_path / "place" / f"words{number}.txt").write_bytes(caption)
    (tmp_path / "place" / "folder.png").mkdir()
    (tmp_path / "place" / "folder.txt").write_text("a caption")
    (tmp_path / "place" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "place" / "gone.txt").write_text("a caption")
    printed, began = [], time.perf_counter()
    images = choose_images(tmp_path / "place", SIZE, held_out=CAPTIONS[:1], log=printed.append)
    assert time.perf_counter() - began < 2 and [image.caption for image in images] == CAPTIONS[1:]
    assert printed[0].startswith(f"images   5 of {tmp_path / 'place'}; {len(BROKEN) + 6} skipped: ")
    for words in (
        "its caption is a held-out prompt (1: 0.png)",
        "no caption (2: words0.png, words2.png)",
        "a caption that is not UTF-8 (1: words1.png)",
        "smaller than 64 x 64 (1: small.png)",
        "more than 89 million pixels (2: bomb.png, large.png)",
        "no such file (2: folder.png, gone.png)",
    ):
        assert words in printed[0]
    whole = [name for name, (_, reason) in BROKEN.items() if reason == "not a complete"]
    assert (
        f"not a complete JPEG, PNG or WebP ({len(whole)}: {', '.join(sorted(whole)[:MAX_NAMED])}, ...)"
        in printed[0]
    )


def write_files(place, files):
    """Write {name: bytes} as a folder, or as a .tar file if the path is named so."""
    if place.suffix == ".tar":
        return write_tar(place, files.items())
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


@pytest.mark.parametrize("place", ["folder", "some.tar"])
def test_a_captioned_file_of_an_unsupported_format_is_counted_and_named(place, tmp_path):
    others = ["b.bmp", "c.TIFF", "z 1.5/d.gif", "e.heic", "f.svg", "g.mp4", "h.strange", "i"]
    files = {
        "a.png": CONTENTS[0],
        "a.txt": b"a",
        "a.bmp": b"beside",
        "a.npz": b"latents",
        "alone.avif": b"",
        "README.md": b"",
        "notes.txt": b"of nothing",
    } | dict.fromkeys(others, b"content")
    files |= {
        f"{name.rpartition('.')[0] or name}{CAPTION_KINDS[number % 3]}": b'"a caption"'
        for number, name in enumerate(others)
    }
    write_files(tmp_path / place, files)
    printed = []
    assert [image.caption for image in choose_images(tmp_path / place, SIZE, log=printed.append)] == ["a"]
    assert f"; {len(others) + 2} skipped: not a JPEG, PNG or WebP ({len(others) + 2}: " in printed[0]
    named = sorted(image.name.removeprefix("some.tar ") for image in list_images(tmp_path / place))
    assert {*named} - {"a", "a.png"} == {*others, "a.bmp", "alone.avif"}


@pytest.mark.parametrize("place", ["folder", "some.tar"])
def test_jpegs_are_read_under_all_of_their_suffixes(place, tmp_path):
    names = ["a.jpg", "b.JPEG", "c.jpe", "d.jfif", "e.JIF", "f.jfi", "g.pjpeg", "h.pjp"]
    contents = [encoded(PICTURES[0], "JPEG", quality=90 - number) for number in range(len(names))]
    write_files(
        tmp_path / place, dict(zip(names, contents)) | {f"{name[0]}.txt": name.encode() for name in names}
    )
    assert [image.caption for image in choose_images(tmp_path / place, SIZE)] == names


@pytest.mark.parametrize("place", ["folder", "some.tar"])
def test_captions_under_the_names_of_other_trainers_are_read_or_named(place, tmp_path):
    captions = {
        "a.caption": b"one",
        "b.json": b'{"caption": "two"}',
        "c.png.txt": b"three",
        "d.TXT": b"four",
        "e.v2.txt": b"five",
        "f.txt": b"six",
        "f.caption": b"not this",
        "g.tags": b"x",
        "h.caption.md": b"x",
        "i.json": b'{"tags": "x"}',
    }
    images = {f"{name}.png": CONTENTS[0] for name in ("a", "b", "c", "d", "e.v2", *"fghij")}
    write_files(tmp_path / place, images | captions)
    printed = []
    found = choose_images(tmp_path / place, SIZE, log=printed.append)
    assert [image.caption for image in found] == ["one", "two", "three", "four", "five", "six"]
    for reason, name in (
        ("no .txt, .caption or .json but a .tags", "g"),
        ("no .txt, .caption or .json but a .caption.md", "h"),
        ("a caption that cannot be read in its .json", "i"),
        ("no caption", "j"),
    ):
        assert f"{reason} (1: {name}.png)" in printed[0] or f"{reason} (1: some.tar {name})" in printed[0], (
            printed
        )


HIDDEN = (
    "._0.png",
    ".DS_Store",
    ".cache/0.png",
    "__MACOSX/._0.png",
    "z/.thumbs/z/0.png",
    ".0.jpg",
    ".ipynb_checkpoints/0.png",
)


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_hidden_files_are_not_images_of_a_source(kind, tmp_path):
    place = tmp_path / ".hidden" / "place"  # a source may be inside a hidden folder
    WRITERS[kind](place)
    for path in [path for path in place.rglob("*") if path.suffix in (".tar", ".parquet")]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7")
        (path.parent / ".cache").mkdir(exist_ok=True)
        shutil.copy(path, path.parent / ".cache")
    write_files(
        place, dict.fromkeys(HIDDEN, CONTENTS[5]) | {f"{name[:-4]}.txt": b"a caption" for name in HIDDEN}
    )
    printed = []
    assert [image.caption for image in choose_images(place, SIZE, log=printed.append)] == CAPTIONS
    assert printed == [f"images   6 of {place}"]


def test_hidden_members_of_a_tar_are_ignored_and_hidden_rows_are_named(tmp_path):
    write_tar(
        tmp_path / "some.tar",
        [(name, CONTENTS[5]) for name in HIDDEN]
        + [("./._a.txt", b"a"), ("./a.png", CONTENTS[0]), ("./a.txt", b"one"), ("../b.png", CONTENTS[1])],
    )
    assert [image.name for image in list_images(tmp_path / "some.tar")] == ["some.tar ./a", "some.tar ../b"]
    write_described(place := tmp_path / ".place", "metadata.jsonl")
    write_files(place, dict.fromkeys(HIDDEN, CONTENTS[5]))
    names = [*HIDDEN, "./0.png", str(place / "1.png"), "z/../2.png"]
    (place / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in names)
    )
    printed = []
    assert [image.caption for image in choose_images(place, SIZE, log=printed.append)] == names[-3:]
    assert f"a hidden file ({len(HIDDEN)}: ._0.png, .DS_Store, " in printed[0]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_metadata_with_invalid_cells_is_refused_by_row(separator, tmp_path):
    write_files(
        tmp_path,
        {
            "0.png": CONTENTS[0],
            "metadata.csv": separator.join(["file_name", "text\n0.png", "a ring\n"]).encode(),
        },
    )
    assert [image.caption for image in choose_images(tmp_path, SIZE)] == ["a ring"]
    (tmp_path / "metadata.csv").write_text(
        f"file_name{separator}text\n0.png{separator}a ring{separator} on white\n"
    )
    with pytest.raises(
        ValueError, match="metadata.csv: row 2 has 3 cells, the header 2: quote prompts with "
    ):
        list_images(tmp_path)


@pytest.mark.parametrize("kind", ["metadata.jsonl", "parquet", "arrow", "some.tar", "folder"])
def test_a_caption_that_utf8_cannot_encode_is_skipped_and_named(kind, tmp_path):
    half = rb'{"file_name": "0.png", "text": "\ud800 cat"}'
    cells = table(CONTENTS[:1], texts(b"a \xff cat"))
    if kind == "parquet":
        parquet.write_table(cells, tmp_path / "a.parquet")
    elif kind == "arrow":
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
        with (
            pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, cells.schema) as stream,
        ):
            stream.write_table(cells)
    elif kind == "some.tar":
        write_tar(tmp_path / kind, [("0.png", CONTENTS[0]), ("0.json", half)])
    else:
        write_files(tmp_path, {"0.png": CONTENTS[0], "0.json" if kind == "folder" else kind: half})
    with pytest.raises(ValueError, match=r"can be used: a caption that is not UTF-8 \(1: "):
        choose_images(tmp_path, SIZE)


def test_images_that_were_read_once_are_not_decoded_again(tmp_path, monkeypatch):
    write_folder(tmp_path / "place")
    (tmp_path / "place" / "broken.png").write_bytes(CONTENTS[0][:100])
    (tmp_path / "place" / "broken.txt").write_text("a caption")
    settings, printed, decoded = (
        complete(Settings(images=str(tmp_path / "place"), cache_dir=str(tmp_path / "cache"))),
        [],
        [],
    )

    def chosen():
        images = choose_data(settings, image_sizes(settings)[-1], printed.append)[2]
        return [(image.caption, image.sha256, image.size) for image in images]

    monkeypatch.setattr(
        "wanlite.data.images.decode", lambda content: decoded.append(content) or decode(content)
    )
    first = chosen()
    assert len(decoded) == len(CONTENTS) + 1 and chosen() == first and len(decoded) == len(CONTENTS) + 1
    assert printed[0] == printed[1] and "not a complete JPEG, PNG or WebP (1: broken.png)" in printed[1]
    (tmp_path / "place" / "0.png").write_bytes(new := encoded(Image.new("RGB", (80, 64))))
    assert chosen() != first and decoded[len(CONTENTS) + 1 :] == [new]
    for content in ("{", "[1]"):  # an unreadable record: all images are read again
        (tmp_path / "cache/images.json").write_text(content)
        decoded.clear()
        assert len(chosen()) == len(first) and len(decoded) == len(CONTENTS) + 1


def test_a_path_to_outside_of_the_folder_is_not_followed(tmp_path):
    write_described(tmp_path / "place", "metadata.jsonl")
    (tmp_path / "secret.png").write_bytes(CONTENTS[0])
    names = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "0.png",
        "none.png",
        7,
        "a\0.png",
        "\ud800.png",
        "n" * 5000,
    ]
    rows = [json.dumps({"file_name": name, "text": "a"}) for name in names] + [
        json.dumps({"file_name": "1.png"})
    ]
    (tmp_path / "place" / "metadata.jsonl").write_text("\n".join(rows))
    printed = []
    assert len(choose_images(tmp_path / "place", SIZE, log=printed.append)) == 1
    for words in (
        "outside the folder (2: ../secret.png, /",
        "no such file (2: none.png, 7)",
        "no caption (1: 1.png)",
        "an invalid file name (2: ",
        "cannot be read (1: nnnn",
    ):
        assert words in printed[0]
    assert len(printed[0]) < 600


def test_a_broken_cell_of_a_table_or_member_of_a_tar_is_skipped(tmp_path):
    parquet.write_table(table([None, b"no image", CONTENTS[2]], ["a", "b", None]), tmp_path / "some.parquet")
    with pytest.raises(
        ValueError,
        match=r"none of its 3 images can be used: a cell without the image's bytes \(1: some.parquet "
        r"row 1\); not a complete .*parquet row 2\); no caption \(1: some.parquet row 3\)",
    ):
        choose_images(tmp_path / "some.parquet", SIZE)
    write_tar(
        tmp_path / "some.tar",
        [("a.png", CONTENTS[0]), ("a.json", b"{"), ("b.png", CONTENTS[1]), ("c.txt", b"alone")],
    )
    with pytest.raises(
        ValueError, match=r"none of its 2 .*in its .json \(1: some.tar a\); no caption \(1: some.tar b\)"
    ):
        choose_images(tmp_path / "some.tar", SIZE)


def test_an_image_that_changes_under_a_run_is_named(tmp_path):
    write_folder(tmp_path / "place")
    first, *_ = choose_images(tmp_path / "place", SIZE)
    (tmp_path / "place" / "0.png").write_bytes(CONTENTS[1])
    with pytest.raises(OSError, match="0.png: has changed since this run began"):
        read_image(first)


# ---- sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"a caption", "no image found. Expected a folder of images"),
        ("metadata.csv", b"file_name,url\n0.png,x\n", "has the columns file_name, url, expected one called"),
        ("metadata.csv", b"name,text\n0.png,x\n", "row 2 has no file_name"),
        ("metadata.jsonl", b'["0.png"]\n', "row 1 has no file_name"),
        ("metadata.jsonl", b'{"file_name": ', "line 1 is not JSON"),
        ("metadata.jsonl", b"\xff\xfe", "not UTF-8 text"),
        ("metadata.jsonl", b"", "has the columns none, expected"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("a.tar", b"no tar" * 200, "a damaged .tar file"),
        ("state.json", b"[]", "not a JSON object"),
        ("state.json", b"{}", "no image found"),
        ("state.json", b'{"_data_files": [{"filename": "none.arrow"}]}', "cannot be read as an Arrow stream"),
        ("state.json", b'{"_indices_files": [{"filename": "i"}]}', "saved as a selection"),
        ("dataset_dict.json", b'{"splits": ["test", "dev"]}', "has the splits test, dev, but not train"),
    ],
)
def test_a_source_without_captioned_images_is_refused_with_the_expectation(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list_images(tmp_path)


def test_a_table_without_images_or_captions_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "url": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has the columns text, url, but none of images"):
        list_images(tmp_path)
    parquet.write_table(table().drop_columns(["caption"]), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match="has the columns id, image, expected one called prompt, text or caption"
    ):
        list_images(tmp_path)


def test_a_wrong_source_is_refused_before_torch_is_imported(tmp_path):
    printed = read_refusal(
        ROOT / "train_distillation.py", "--output_dir", tmp_path / "run", "--images", tmp_path / "none"
    )
    assert (
        "none: no such file or folder. Expected a folder of images" in printed
        and not (tmp_path / "run").exists()
    )


def test_a_csv_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\n" + "a" * 200_000)
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        complete(Settings(prompts=str(tmp_path / "prompts.csv")))


# ---- training on images ------------------------------------------------------------------------------------


def test_captions_join_the_training_prompts_and_are_never_held_out(tmp_path):
    write_folder(tmp_path / "place")
    (tmp_path / "prompts.txt").write_text("\n".join(["one", CAPTIONS[2], "three", CAPTIONS[0]]))
    settings = complete(Settings(images=str(tmp_path / "place"), prompts=str(tmp_path / "prompts.txt")))
    training, held_out, images = choose_data(settings, image_sizes(settings)[-1], lambda line: None)
    assert held_out == [CAPTIONS[0]] and [image.caption for image in images] == CAPTIONS[1:]
    assert training == ["one", CAPTIONS[2], "three", CAPTIONS[1], *CAPTIONS[3:]]


def test_noised_images_at_all_levels_join_the_states_of_the_trajectories(tmp_path):
    scheduler, images = make_scheduler(3.0), torch.randn(5, 2, 4, 4)
    jobs = [(number, f"{number}", 50 + number, number) for number in range(5)]
    for name in ("noised", "trajectories"):
        (tmp_path / name).mkdir()
    trajectory_generator = TrajectoryGenerator(
        Accelerator(), teacher_for, scheduler, STEPS, basis=torch.eye(4)
    )
    states = trajectory_generator.compute_at_images(
        tmp_path / "noised", jobs, lambda numbers: images[list(numbers)]
    )
    batch = states.__getitems__(range(len(states)))
    assert len(states) == 5 * STEPS and batch["prompt"].tolist() == [
        number for number in range(5) for _ in range(STEPS)
    ]
    assert torch.allclose(batch["noise_level"].view(5, STEPS), scheduler.sigmas[:-1].expand(5, STEPS))
    repeated, level = images.repeat_interleave(STEPS, 0), batch["noise_level"].view(-1, 1, 1, 1)
    noise = (batch["latents"].float() - (1 - level) * repeated) / level
    again = add_noise(repeated, noise, batch["noise_level"])
    assert 0.9 < noise.std() < 1.1 and torch.allclose(again, batch["latents"].float(), atol=1e-5)
    low = batch["noise_level"] < 0.5
    assert (noise[low][1:] - noise[low][:-1]).abs().mean() > 0.5  # with new noise at each level
    velocity = teacher_for([str(number) for number in batch["prompt"].tolist()], False)(
        batch["latents"].float(), batch["timestep"]
    )
    assert (velocity - batch["velocity"]).norm() < 0.01 * velocity.norm()
    trajectories = trajectory_generator.generate(
        tmp_path / "trajectories", [job[:3] for job in jobs[:2]], (2, 4, 4)
    )
    both = trajectories + states
    assert len(both) == 7 * STEPS and len(trajectories) == 2 * STEPS
    parts = [trajectories.__getitems__([3]), states.__getitems__([9])]
    joined = both.__getitems__([3, 2 * STEPS + 9])
    assert all(torch.equal(torch.cat([part[name] for part in parts]), joined[name]) for name in joined)


def test_large_images_are_encoded_in_small_batches_to_the_same_latents():
    autoencoder, pixels = load_autoencoder(TINY_TEACHER), to_pixels(np.stack(PICTURES))
    whole = encode_images(autoencoder, pixels)
    assert torch.allclose(encode_images(autoencoder, pixels, max_pixels=2 * 64 * 64), whole, atol=1e-5)


FLAGS = (
    "--projection",
    "weights",
    "--num_held_out",
    "16",
    "--teacher_steps",
    "4",
    "--validation_steps",
    "6",
    "--few_step_train_steps",
    "1",
    "--matching_steps",
    "0",
    "--max_train_steps",
    "4",
    "--checkpointing_steps",
    "2",
)


@pytest.mark.slow
def test_a_run_on_images_reports_skipped_ones_and_resumes_to_the_same_weights(tmp_path):
    write_folder(tmp_path / "place")
    (tmp_path / "place" / "cut.png").write_bytes(CONTENTS[0][:100])
    (tmp_path / "place" / "cut.txt").write_text("a caption")
    flags = (*FLAGS, "--images", tmp_path / "place")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, printed = train(whole, *flags)
    assert code == 0, printed
    assert printed.startswith(
        f"images   6 of {tmp_path / 'place'}; 1 skipped: not a complete JPEG, PNG or WebP (1: cut.png)\nteacher"
    )
    assert "70 teacher images" in printed  # 64 trajectories and 6 images
    states = Trajectories([*(whole / "cache").glob("images-*/shard-*")])
    assert len(states) == 6 * 4
    latents = encode_images(load_autoencoder(TINY_TEACHER), to_pixels(np.stack(PICTURES)))
    _, clean, _ = states.ends(range(6))
    assert (
        clean - latents
    ).square().mean() < 0.2 * latents.var()  # the teacher is accurate on nearly clean latents
    shutil.copytree(tmp_path / "place", tmp_path / "inverted")
    for path in (
        path for path in (tmp_path / "inverted").rglob("*") if path.suffix in KINDS and path.name != "cut.png"
    ):
        ImageOps.invert(Image.open(path).convert("RGB")).save(path)
    code, printed = train(tmp_path / "inverted_run", *FLAGS, "--images", tmp_path / "inverted")
    assert code == 0 and not have_equal_weights(tmp_path / "inverted_run", whole), (
        printed
    )  # with the same captions: the difference comes from the images
    leave_as_killed(whole, cut, step=2)
    (tmp_path / "place" / "z" / "5.png").rename(tmp_path / "kept.png")
    code, printed = train(cut, *flags)
    assert code == 2 and ("the prompts differ" in printed or "the images differ" in printed)
    shutil.move(tmp_path / "kept.png", tmp_path / "place" / "z" / "5.png")
    code, printed = train(cut, *flags)
    assert code == 0 and "resumed at step 2" in printed and have_equal_weights(cut, whole), printed
    assert read_run(cut)["settings"]["images"] == str(tmp_path / "place")
