"""The broken students that cost most to reject, and those that may not be read."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from tests.broken_students import (
    CONFIG,
    INDEX,
    LONG,
    MANY_LISTS,
    SHARDS,
    WEIGHTS,
    both,
    config,
    described,
    entry,
    index,
    many_saves,
    many_shards,
    raw,
    setting_text,
    sharded,
    weights,
    with_common_words,
    without_metadata,
    without_values,
)
from tests.refusals import check_refused, rows

COSTLY = [
    *with_common_words(
        OSError,
        [WEIGHTS],
        {
            "200 000 tensors without values": (weights(without_values(200_000)), "header has"),
            "a header of empty lists": (
                weights(raw(b'{"a":[' + b"[]," * 1_300_000 + b"0]}")),
                "lists and objects",
            ),
            "a header of nested lists": (
                weights(raw(b'{"a":[' + b"[[]]," * 800_000 + b"0]}")),
                "lists and objects",
            ),
            "a header of objects": (
                weights(raw(b'{"a":[' + b'{"":0},' * 590_000 + b"0]}")),
                "lists and objects",
            ),
            "a header of 65 000 objects": (
                weights(raw(b'{"a":[' + b'{"":[0]},' * 32_000 + b"0]}")),
                "not described by",
            ),
            "a header of 2 000 000 numbers": (
                weights(raw(b'{"a":[' + b"0," * 2_000_000 + b"0]}")),
                "not described by",
            ),
            "a header of 350 000 names": (
                weights(raw({f"{n}": 0 for n in range(330_000)})),
                "0 is not described by",
            ),
            "a header of 4 MB in one string": (
                weights(raw(b'"' + b"\\u0041" * 690_000 + b'"')),
                "holds a str",
            ),
            "a header of 1 000 numbers of 4 000 digits": (
                weights(raw({"a": [LONG] * 1000})),
                "is out of range",
            ),
        },
    ),
    *with_common_words(
        ValueError,
        [],
        {
            "20 000 tensors without values": (weights(without_values(20_000)), WEIGHTS, "unknown: 000000"),
            "a dtype of 60 000 lists": (
                described(entry(dtype=json.loads(MANY_LISTS))),
                WEIGHTS,
                "a is stored as [[[]]",
            ),
            "a config of 20 000 lists": (setting_text("depth", "[" + "[]," * 20_000 + "0]"), "depth is [[]"),
            "a config of 4 000 unknown settings": (
                config({f"{n}": n for n in range(4_000)} | {"depth": 0}),
                "depth is 0",
            ),
            "300 saves under way": (many_saves, CONFIG, "eps is 1e-05, was 1e-06"),
            "an index of 4 MB": (
                index({"weight_map": {f"{n}": SHARDS[0] for n in range(60_000)}}),
                SHARDS[0],
                "its index",
            ),
            "100 shards of 20 000 tensors each": (many_shards, "differs from its index in "),
        },
    ),
    (
        "an index of 90 000 shards",
        index({"weight_map": {f"{n}": f"{n}.safetensors" for n in range(90_000)}}),
        OSError,
        INDEX,
        "names 90,000 shards",
    ),
    (
        "an index of 1 000 shards",
        index({"weight_map": {f"{n}": f"{n % 1000}.safetensors" for n in range(90_000)}}),
        OSError,
        INDEX,
        "0.safetensors that is missing",
    ),
    (
        "a config of 1 GB",
        both(without_metadata, lambda folder: os.truncate(folder / CONFIG, 2**30)),
        OSError,
        CONFIG,
        "too large",
    ),
    (
        "an index of 1 GB",
        both(sharded, lambda folder: os.truncate(folder / INDEX, 2**30)),
        OSError,
        INDEX,
        "too large",
    ),
]


@pytest.mark.parametrize("age", [3600, 0, -3600])
@pytest.mark.parametrize("broken, error, words", rows(COSTLY))
def test_costly_students_are_rejected_at_once_at_any_age_of_the_folder(
    broken, error, words, age, sound_folder
):
    broken(sound_folder)
    os.utime(sound_folder, (time.time() - age,) * 2)
    check_refused({"pretrained_model_name_or_path": sound_folder}, error, words)


@pytest.mark.parametrize("name, error", [(WEIGHTS, OSError), (CONFIG, OSError), ("", PermissionError)])
def test_a_student_without_read_permission_is_rejected(name, error, sound_folder):
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(shutil.copytree(sound_folder, Path(place) / "student"))
        os.chmod(folder / name, 0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # an administrator may read everything
            check_refused({"pretrained_model_name_or_path": folder}, error, [str(folder), "ermission denied"])
        finally:
            os.seteuid(user)
            os.chmod(folder / name, 0o700)
