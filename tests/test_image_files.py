"""Images in a folder: every image gets a new name in every kind of collision."""

import errno
import os
import random

import numpy as np
import pytest
from PIL import Image

from tests.conftest import fork
from wanlite.files.image_files import MAX_SLUG, grid_names, image_names, save_image, slug

IMAGE = np.zeros((4, 4, 3), np.uint8)


def save(folder, prompt="a ring", seed=0):
    return save_image(IMAGE, folder, image_names(folder, prompt, seed)).name


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a small red ring", "a-small-red-ring"),
        ("../../etc/passwd\0", "etc-passwd"),
        ("Héllo Straße", "hello-strasse"),
        ("CON", "con"),
        ("🎨 \x1b[2J", "2j"),
        ("一只红色的猫", ""),
        ("?! ...", ""),
        ("\ud800 cat", "cat"),
        ("ﬁne ①", "fine-1"),
        ("x" * 600, "x" * MAX_SLUG),
        ("word " * 600, "word-word-word-word-word-word-word-word"),
    ],
)
def test_a_slug_is_valid_on_every_file_system(prompt, expected):
    assert slug(prompt) == expected


def test_any_prompt_gives_a_valid_file_name(tmp_path):
    draw = random.Random(0)  # noqa: S311
    for number in range(300):
        prompt = "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(1, 80)))
        assert save(tmp_path, prompt, 2**63 - 1).startswith(f"{number:04d}-")


def test_numbering_continues_after_existing_images(tmp_path):
    for name in (
        "0003-seed0.png",
        "0011-A-RING-SEED5.PNG",
        "grid-0012-0019.png",
        "2024-holiday.png",
        "grid.png",
        "notes.txt",
    ):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "0020-link-seed0.png").symlink_to("nowhere")
    assert [save(tmp_path), save(tmp_path, "", 7)] == ["0021-a-ring-seed0.png", "0022-seed7.png"]
    assert (tmp_path / "2024-holiday.png").read_bytes() == b"mine" and (
        tmp_path / "0020-link-seed0.png"
    ).is_symlink()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_created_meanwhile_is_not_overwritten(has_links, tmp_path, monkeypatch):
    if not has_links:
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here"))
        )
    names = image_names(tmp_path, "a ring", 0)
    for name in ("0000-a-ring-seed0.png", "0001-a-ring-seed0.png"):
        (tmp_path / name).write_bytes(b"theirs")
    path = save_image(IMAGE, tmp_path, names)
    assert path.name == "0002-a-ring-seed0.png" and Image.open(path).size == (4, 4)
    assert sorted(tmp_path.iterdir())[0].read_bytes() == b"theirs" and len(list(tmp_path.iterdir())) == 3
    first, last = tmp_path / "0000-a-seed0.png", tmp_path / "0002-a-seed2.png"
    grids = [save_image(IMAGE, tmp_path, grid_names(first, last)).name for _ in range(3)]
    assert grids == ["grid-0000-0002.png", "grid-0000-0002-2.png", "grid-0000-0002-3.png"]


def test_processes_that_save_into_one_folder_keep_all_images(tmp_path):
    def draw():
        children = [os.fork() for _ in range(3)]
        for _ in range(20):
            save(tmp_path)
        for child in filter(None, children):
            os.waitpid(child, 0)

    assert fork(draw) == 0  # eight processes, as each child forks as well
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{number:04d}-a-ring-seed0.png" for number in range(160)]
    assert all(Image.open(tmp_path / name).size == (4, 4) for name in names)


def test_saving_an_image_is_atomic(tmp_path, monkeypatch):
    def write_half(image, file, *arguments, **named):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", write_half)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\). Free some space"):
        save(tmp_path)
    assert not list(tmp_path.iterdir())
