"""Saved students with other files in place of theirs, or pickles: each is rejected at once and by name."""

import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.broken_students import (
    CONFIG,
    INDEX,
    LFS,
    PICKLE,
    SECOND,
    SHARDS,
    STEM,
    WEIGHTS,
    absent,
    both,
    called_with,
    config,
    cut,
    device,
    each,
    file,
    index,
    instead,
    link,
    listening,
    moved_out,
    save_linked_outside,
    sharded,
    shards,
    torch_archive,
    torch_script,
    weights,
    with_common_words,
    without_metadata,
)
from tests.conftest import Payload
from tests.refusals import EXECUTED, check_broken, rows

BAD_FILES = [
    *with_common_words(
        OSError,
        [WEIGHTS, "not a complete safetensors file"],
        {
            "git-lfs pointer": (weights(LFS), "git lfs pull"),
            "web page": (weights("<!DOCTYPE html><html><body>404</body></html>"), "it is a web page"),
            "web page behind a blank line": (weights("\r\n<html>Sign in</html>"), "it is a web page"),
            "web page with a byte-order mark": (
                weights(b"\xef\xbb\xbf<html>Sign in</html>"),
                "it is a web page",
            ),
            "error of a server": (weights('{"error": "Repository not found"}'), "its header has"),
            "zip": (weights(b"PK\x03\x04" + bytes(1000)), "it is a pickle"),
            "the first of two file names broken": both(
                lambda folder: shutil.copyfile(folder / WEIGHTS, folder / SECOND), cut(-1)
            ),
        },
    ),
    *[
        row
        for name in (WEIGHTS, CONFIG, INDEX)
        for row in with_common_words(
            OSError,
            [name, "regular file"],
            {
                f"{kind} under the name {name}": both(
                    sharded if name == INDEX else without_metadata, instead(name, make)
                )
                for kind, make in {
                    "folder": Path.mkdir,
                    "pipe": os.mkfifo,
                    "endless device": device(1, 5),
                    "terminal": device(5, 0),
                    "missing device": device(240, 9),
                    "socket": listening,
                }.items()
            },
        )
    ],
    *[
        row
        for name in (WEIGHTS, CONFIG, INDEX)
        for row in with_common_words(
            OSError,
            [name, "a link "],
            {
                f"{kind} under the name {name}": both(sharded if name == INDEX else without_metadata, way)
                for kind, way in {
                    "dangling link": link(name, "nowhere"),
                    "link to itself": link(name, name),
                    "link out of the folder": moved_out(name),
                    "link to /proc": link(name, "/proc/self/environ"),
                    "link to a device": link(name, "/dev/zero"),
                    "link of 4 000 characters": link(name, "x/" * 2000),
                }.items()
            },
        )
    ],
    (
        "two links to each other",
        both(link(WEIGHTS, "b"), lambda folder: (folder / "b").symlink_to(WEIGHTS)),
        OSError,
        "a link to a missing file",
    ),
    (
        "link to a pipe in the folder",
        both(lambda folder: os.mkfifo(folder / "b"), link(WEIGHTS, "b")),
        OSError,
        "not a regular file",
    ),
    (
        "a save under way that leads out of the folder",
        save_linked_outside,
        ValueError,
        CONFIG,
        "eps is 1e-05, was 1e-06",
    ),
    (
        "no weights",
        absent(WEIGHTS),
        OSError,
        f"Error no file named {STEM}.bin found in directory",
        f"found {CONFIG}",
    ),
    (
        "weights of a variant only",
        lambda folder: (folder / WEIGHTS).rename(folder / f"{STEM}.fp16.safetensors") and None,
        OSError,
        f"Error no file named {STEM}.bin found in directory",
        f"{STEM}.fp16.safetensors",
    ),
    ("an empty folder", both(absent(WEIGHTS), absent(CONFIG)), OSError, "no config.json", "found none"),
    ("no folder", shutil.rmtree, OSError, "student: no such folder"),
]

BAD_PICKLES = [
    *each(
        "a pickle named {}",
        lambda name: both(absent(WEIGHTS), file(name, PICKLE)),
        (f"{STEM}.bin", f"{STEM}.pt", "pytorch_model.bin", "model.pth", "model.ckpt"),
        OSError,
        "Pickles are never opened",
    ),
    (
        "a pickle requested by use_safetensors=False",
        both(absent(WEIGHTS), file(f"{STEM}.bin", PICKLE), called_with(use_safetensors=False)),
        ValueError,
        "use_safetensors=False",
        "pickles are never opened",
    ),
    (
        "a TorchScript archive",
        both(absent(WEIGHTS), file(f"{STEM}.bin", torch_script)),
        OSError,
        "Pickles are never opened",
    ),
    *with_common_words(
        OSError,
        [WEIGHTS, "it is a pickle"],
        {
            "a pickle renamed .safetensors": weights(PICKLE),
            "a .pth renamed .safetensors": weights(torch_archive),
            "an old .pth renamed .safetensors": weights(partial(torch_archive, is_zip=False)),
            "a TorchScript archive renamed .safetensors": weights(torch_script),
        },
    ),
    (
        "a pickle in ASCII renamed .safetensors",
        weights(pickle.dumps(Payload(EXECUTED), 0)),
        OSError,
        WEIGHTS,
        "not a complete safetensors",
    ),
    (
        "an index of pickles",
        both(sharded, file("x.bin", PICKLE), file(INDEX, {"weight_map": {"a": "x.bin"}})),
        OSError,
        INDEX,
        "names a shard 'x.bin'",
        "Pickles are never opened",
    ),
    (
        "an index of pickles under the name of torch",
        both(
            absent(WEIGHTS),
            file("x.bin", PICKLE),
            file(f"{STEM}.bin.index.json", {"weight_map": {"a": "x.bin"}}),
        ),
        OSError,
        "Pickles are never opened",
    ),
    (
        "a shard that is a pickle",
        shards(lambda one, two: one.write_bytes(PICKLE)),
        OSError,
        SHARDS[0],
        "it is a pickle",
    ),
    ("a config that is a pickle", config(PICKLE), OSError, CONFIG, "not JSON"),
    ("an index that is a pickle", index(PICKLE), OSError, INDEX, "not JSON"),
]


@pytest.mark.parametrize("broken, error, words", rows(BAD_FILES, BAD_PICKLES))
def test_broken_files_and_pickles_are_rejected_at_once_by_name(broken, error, words, sound_folder):
    check_broken(sound_folder, broken, error, words)
