"""Saved students with a broken index or broken shards: each is rejected at once and by name."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.broken_students import (
    CONFIG,
    INDEX,
    LFS,
    MILLION_LETTERS,
    SHARDS,
    STEM,
    both,
    each,
    index,
    instead,
    link,
    mapped,
    moved_out,
    resaved,
    shard_named,
    sharded,
    shards,
    with_common_words,
)
from tests.refusals import check_broken, rows

BAD_INDEX = [
    *each(
        "shard named {:.40}",
        shard_named,
        (
            "../x.safetensors",
            "/abs/x.safetensors",
            "sub/x.safetensors",
            "./x.safetensors",
            "..\\x.safetensors",
            "sub\\x.safetensors",
            "C:\\x.safetensors",
            "C:x.safetensors",
            "//server/x.safetensors",
            "x\0.safetensors",
            "x.safetensors\0",
            "x.safetensors\n",
            "\nx.safetensors",
            "",
            ".",
            "..",
            " ",
            "~/x.safetensors",
            ".safetensors",
            "-x.safetensors",
            "file:///x.safetensors",
            "https://host/x.safetensors",
            "x.safetensors?download=true",
            "\uff0e\uff0e\uff0fx.safetensors",
            "\ud800.safetensors",
            MILLION_LETTERS,
            "x" * 300 + ".safetensors",
            "config.json",
            "x.bin",
            "x.safetensors.bin",
            "x.pt",
            "$HOME.safetensors",
        ),
        OSError,
        INDEX,
        "names a shard",
        "expected safetensors files beside it",
        "Pickles are never opened",
    ),
    (
        "shard named by its absolute path",
        lambda folder: shard_named(str(folder / SHARDS[0]))(folder),
        OSError,
        "names a shard",
    ),
    *each(
        "shard named by {}",
        shard_named,
        (5, 1.5, None, True, ["x"], {"x": "x"}),
        OSError,
        INDEX,
        "no weight_map",
    ),
    *each(
        "weight_map is {}",
        lambda value: index({"weight_map": value}),
        (None, [], {}, "x", 5, True, [["a", SHARDS[0]]]),
        OSError,
        INDEX,
        "no weight_map of tensor names to file names",
    ),
    *with_common_words(
        OSError,
        [INDEX],
        {
            "weight_map missing": (index({"metadata": {}}), "no weight_map"),
            "index empty": (index(b""), "not JSON"),
            "index cut short": (index('{"weight_map": {"proj_out.bias": "diffusion_py'), "not JSON"),
            "index is a list": (index("[]"), "holds a list"),
            "index is null": (index("null"), "holds a NoneType"),
            "index with a key twice": (
                index('{"weight_map": {"a": "a.safetensors", "a": "a.safetensors"}}'),
                "duplicate key a",
            ),
            "index with two maps": (
                index('{"weight_map": {}, "weight_map": {}}'),
                "duplicate key weight_map",
            ),
            "index with a byte-order mark": (
                index(lambda found: b"\xef\xbb\xbf" + json.dumps(found).encode()),
                "BOM",
            ),
            "index in UTF-16": (index(lambda found: json.dumps(found).encode("utf-16")), "utf-8"),
            "index with NaN": (index('{"metadata": {"total_size": NaN}}'), "NaN is not a number"),
            "index nested 60 000 deep": (index('{"weight_map":' * 60_000), "nested too deeply"),
            "index nested 100 000 deep": (index('{"weight_map":' * 100_000), "100,000 lists and objects"),
            "index is a git-lfs pointer": (index(LFS), "git lfs pull"),
            "a shard missing": (shards(lambda one, two: one.unlink()), SHARDS[0], "is missing"),
            "both shards missing": (
                shards(lambda one, two: (one.unlink(), two.unlink())),
                SHARDS[0],
                "is missing",
            ),
            "a shard under another name": (
                mapped(proj_out__bias="other.safetensors"),
                "other.safetensors that is missing",
            ),
        },
    ),
    *with_common_words(
        OSError,
        [SHARDS[0]],
        {
            "a shard cut short": (
                shards(lambda one, two: os.truncate(one, 5000)),
                "not a complete safetensors file",
            ),
            "a shard of no bytes": (shards(lambda one, two: os.truncate(one, 0)), "0 bytes hold no header"),
            "a shard that is a folder": (both(sharded, instead(SHARDS[0], Path.mkdir)), "not a regular file"),
            "a shard that is a pipe": (both(sharded, instead(SHARDS[0], os.mkfifo)), "not a regular file"),
            "a shard that links to outside of the folder": (
                both(sharded, moved_out(SHARDS[0])),
                "leads out of the folder",
            ),
            "a shard that is a dangling link": (
                both(sharded, link(SHARDS[0], "nowhere")),
                "a link to a missing file",
            ),
            "a shard that is a git-lfs pointer": (
                shards(lambda one, two: one.write_text(LFS)),
                "git lfs pull",
            ),
        },
    ),
    *with_common_words(
        ValueError,
        [SHARDS[0], "differs from its index in "],
        {
            "a tensor of the index that is in neither shard": (mapped(teacher=SHARDS[0]), "teacher"),
            "a tensor that the index places in the other shard": (
                mapped(**{"blocks.0.attn1.norm_k.weight": SHARDS[1]}),
                "attn1.norm_k",
            ),
            "a tensor that the index lacks": (
                index(lambda found: found["weight_map"].pop("blocks.0.attn1.norm_k.weight") * 0),
                "blocks.0.attn1.norm_k.weight",
            ),
            "a shard without a tensor of the index": resaved(lambda one, two: dict(list(one.items())[1:])),
            "a tensor in both shards": resaved(lambda one, two: one | dict(list(two.items())[:1])),
            "all tensors in both shards": resaved(lambda one, two: one | two),
            "shards swapped": shards(
                lambda one, two: (one.rename("x"), two.rename(one), Path("x").rename(two))
            ),
            "the same shard twice": shards(lambda one, two: shutil.copyfile(two, one)),
        },
    ),
    (
        "index of one of two shards",
        index(
            lambda found: {
                "weight_map": {
                    name: shard for name, shard in found["weight_map"].items() if shard == SHARDS[0]
                }
            }
        ),
        ValueError,
        CONFIG,
        "Missing: ",
    ),
    (
        "a shard of another save",
        resaved(lambda one, two: one, config="{}"),
        ValueError,
        "were saved with different configs",
    ),
    (
        "a shard with NaN",
        resaved(lambda one, two: {name: tensor / 0 for name, tensor in one.items()}),
        ValueError,
        SHARDS[0],
        "holds NaN or infinity",
    ),
    (
        "a shard in int64",
        resaved(lambda one, two: {name: tensor.long() for name, tensor in one.items()}),
        ValueError,
        SHARDS[0],
        "is stored as I64",
    ),
    (
        "the index of a variant only",
        both(sharded, lambda folder: (folder / INDEX).rename(folder / f"{STEM}.safetensors.index.fp16.json")),
        OSError,
        "Error no file named",
    ),
]


@pytest.mark.parametrize("broken, error, words", rows(BAD_INDEX))
def test_a_broken_index_or_shard_is_rejected_at_once_by_name(broken, error, words, sound_folder):
    check_broken(sound_folder, broken, error, words)
