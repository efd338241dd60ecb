"""Saved students that are broken, hostile or oddly asked for: each refused at once, cheaply and by name; odd
but sound ones load.

A row: what is wrong, what breaks the folder (and returns the arguments of from_pretrained, where those are
wrong), the error, words of its message. Weights carry the config that they were saved with, so rows about
config.json alone save weights without it.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
import types
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import loud_student, write_sparse
from train_distillation import WanLiteStudent
from wanlite.student.weights import all_tensor_shapes

SMALL = dict(
    hidden_size=16,
    depth=1,
    num_heads=2,
    ffn_dim=32,
    num_channels=4,
    text_dim=8,
    freq_dim=256,
    patch_size=[1, 2, 2],
    cross_attn_norm=True,
    eps=1e-6,
    rope_max_seq_len=32,
)
HUGE = dict(hidden_size=65536, ffn_dim=65536, depth=64)
STEM = "diffusion_pytorch_model"
WEIGHTS, SECOND = f"{STEM}.safetensors", "diffusion_model.safetensors"
CONFIG, INDEX = "config.json", f"{STEM}.safetensors.index.json"
SHARDS = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46184\n"
LONG, DEEP, NOVEL = 10**4000, "[" * 500 + "]" * 500, "a" * 1_000_000
PARTS = "[" + "[[]]," * 30_000 + "0]"
EXECUTED = "executed"  # the file that a payload would leave
MAX_SECONDS, MAX_MEGABYTES, MAX_LETTERS = 1, 200, 3000
ALARM = 10  # seconds, after which a load counts as blocked
REFUSED = []  # Cost of each refusal in a test


# ---- ways to break a folder --------------------------------------------------------------------------------


def raw(header, body=b"", length=None):
    """Return the bytes of a safetensors file; `header` is JSON, or bytes taken as they are."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def both(*ways):
    """One way after the other; returns the arguments that one of them returns."""

    def write(folder):
        return next((found for found in [way(folder) for way in ways] if isinstance(found, dict)), None)

    return write


def file(name, content):
    """The file holds these bytes, or this text, or this JSON, or what a function gives that is called with
    the folder.
    """

    def write(folder):
        found = content(folder) if isinstance(content, types.FunctionType | partial) else content
        found = found if isinstance(found, (bytes, str)) else json.dumps(found)
        (folder / name).write_bytes(found if isinstance(found, bytes) else found.encode())

    return write


weights = partial(file, WEIGHTS)


def whole(folder):
    return (folder / WEIGHTS).read_bytes()


def cut(size):
    return weights(lambda folder: whole(folder)[:size])


def described(*descriptions, body=8):
    """The weights are tensors a, b, ... that the header describes so, before so many bytes."""
    return weights(raw(dict(zip("ab", descriptions)), bytes(body)))


def without_values(count):
    """Return a file of so many tensors without values."""
    return raw(
        b"{"
        + b",".join(b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(count))
        + b"}"
    )


def sparse(beginning, size):
    """The weights are these bytes, then zeros that take no disk."""

    def write(folder):
        with open(folder / WEIGHTS, "r+b") as stream:
            stream.write(beginning)
            try:
                stream.truncate(size)
            except OSError:
                pytest.skip("this file system has no files that large")

    return write


def zeros_of(names=None, **changes):
    """The weights are sparse zeros of a student that differs in its config, or in the shapes of some tensors."""

    def write(folder):
        try:
            write_sparse(folder / WEIGHTS, all_tensor_shapes(SMALL | changes) | (names or {}))
        except OSError:
            pytest.skip("this file system has no files that large")

    return write


def tensors(change):
    """The weights are saved again, without their config, with something changed in {name: tensor}."""

    def write(folder):
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return write


def changed(name="proj_out.bias", **how):
    """One tensor is of another dtype or shape, or some of its values are others."""

    def change(found):
        tensor = found[name].to(how.get("dtype", torch.float32)).reshape(how.get("shape", found[name].shape))
        for position, value in enumerate(how.get("values", ())):
            tensor.view(-1)[position + 3] = value
        found[name] = tensor

    return tensors(change)


def more(**added):
    return tensors(
        lambda found: found.update(
            {name.replace("__", "."): torch.zeros(shape) for name, shape in added.items()}
        )
    )


def renamed(old, new, is_kept=False):
    def change(found):
        for name in [name for name in found if name.startswith(old)]:
            found[name.replace(old, new, 1)] = found[name].clone()
            if not is_kept:
                del found[name]

    return tensors(change)


def header(change):
    """The header of the weights is changed; their bytes are not."""

    def write(folder):
        length = int.from_bytes(whole(folder)[:8], "little")
        found = json.loads(whole(folder)[8 : 8 + length])
        change(found)
        return raw(found, whole(folder)[8 + length :])

    return weights(write)


def told(config):
    """The weights say that they were saved with this config."""
    return header(lambda found: found.update(__metadata__={"config": config}))


silent = tensors(lambda found: None)  # the weights do not say what config they were saved with


def config(content):
    return both(silent, file(CONFIG, content))


def settings(**changes):
    """config.json has our names only, with something changed."""
    return config(SMALL | changes)


def setting_text(name, text):
    """config.json is JSON in which a setting stands as this text."""
    return config(
        json.dumps({key: value for key, value in SMALL.items() if key != name})[:-1] + f', "{name}": {text}}}'
    )


def added(**changes):
    """config.json is the one that was saved, with both vocabularies, with something changed."""
    return file(CONFIG, lambda folder: json.loads((folder / CONFIG).read_text()) | changes)


def wan_setting(name, value):
    """config.json has the Wan names only, with something changed."""
    return config(
        dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4) | {name: value}
    )


def absent(name):
    return lambda folder: (folder / name).unlink()


def instead(name, make):
    """Something else lies under a file's name."""

    def replace(folder):
        (folder / name).unlink()
        try:
            make(folder / name)
        except PermissionError:
            pytest.skip("only an administrator makes devices")

    return replace


def link(name, target):
    return instead(name, lambda path: path.symlink_to(target))


def moved_out(name):
    """The file lies outside of the folder, with a link to it inside."""

    def move(folder):
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return move


def device(major, minor):
    return lambda path: os.mknod(path, 0o20666, os.makedev(major, minor))


def listening(path):
    with (
        contextlib.chdir(path.parent),
        socket.socket(socket.AF_UNIX) as end,
    ):  # the address of a socket is short
        end.bind(path.name)


def save_led_out(folder):
    """The only config that fits the weights is of a save that seems to be under way, and lies outside."""
    shutil.copytree(folder, folder.parent / "elsewhere")
    (folder / ".saving-1-0").symlink_to(folder.parent / "elsewhere")
    added(eps=1e-5)(folder)


def many_saves(folder):
    for number in range(300):
        (folder / f".saving-{number}").mkdir()
        (folder / f".saving-{number}" / CONFIG).write_text('{"eps": 1e-5, "x": [' + "[]," * 20_000 + "0]}")
    added(eps=1e-5)(folder)


def many_shards(folder):
    names = [f"{number}.safetensors" for number in range(100)]
    for name in names:
        (folder / name).write_bytes(without_values(20_000))
    (folder / WEIGHTS).rename(folder / names[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: name for name in names}}))


def sharded(folder):
    """The weights lie in two shards with an index, and do not say what config they were saved with."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(sorted(found))}
    for shard in SHARDS:
        save_file({name: found[name] for name in weight_map if weight_map[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def index(content):
    """The weights lie in shards with this for an index, or with theirs after a function has changed it."""

    def write(folder):
        sharded(folder)
        found = json.loads((folder / INDEX).read_text())
        is_change = isinstance(content, types.FunctionType)
        file(INDEX, (content(found) or found) if is_change else content)(folder)

    return write


def mapped(**changes):
    """The index says of some tensors that they lie elsewhere."""
    return index(
        lambda found: found["weight_map"].update(
            {name.replace("__", "."): shard for name, shard in changes.items()}
        )
    )


def shard_named(name):
    """The index says that a tensor lies in a file of this name; shards lie around the folder as well."""

    def write(folder):
        mapped(proj_out__bias=name)(folder)
        for place in (folder.parent, folder / "sub"):
            place.mkdir(exist_ok=True)
            shutil.copyfile(folder / SHARDS[0], place / "x.safetensors")

    return write


def shards(change):
    """Something is done to the two shards; the index stays."""

    def write(folder):
        sharded(folder)
        change(folder / SHARDS[0], folder / SHARDS[1])

    return write


def resaved(change, **metadata):
    """The first shard is saved again: `change` turns the tensors of both into its own."""
    return shards(lambda one, two: save_file(change(load_file(one), load_file(two)), one, metadata))


class Payload:
    """Creates a file where it is unpickled."""

    def __reduce__(self):
        return open, (EXECUTED, "w")


PICKLE = pickle.dumps({"proj_out.bias": Payload()})


def torch_archive(folder, is_zip=True):
    torch.save({"proj_out.bias": Payload()}, folder / "x", _use_new_zipfile_serialization=is_zip)
    return (folder / "x").read_bytes()


def torch_script(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)).save(str(folder / "x"))
    return (folder / "x").read_bytes()


def asked(**arguments):
    """The folder is sound; what is wrong is how it is asked for. A function is called with the folder."""
    return lambda folder: {
        name: value(folder) if isinstance(value, types.FunctionType) else value
        for name, value in arguments.items()
    }


def path(value):
    return asked(pretrained_model_name_or_path=value)


def at(name, make):
    """The path leads to something in the folder that was made there."""
    return lambda folder: (make(folder / name), {"pretrained_model_name_or_path": folder / name})[1]


def each(sentence, way, values, error, *words):
    """Return a row for every value."""
    return [
        (sentence.format(value if isinstance(value, str) else repr(value)), way(value), error, *words)
        for value in values
    ]


def same(error, words, ways):
    """Return a row for every {sentence: way}, with words in common; a way may come with words of its own."""
    return [
        (sentence, way[0], error, *words, *way[1:])
        if isinstance(way, tuple)
        else (sentence, way, error, *words)
        for sentence, way in ways.items()
    ]


# ---- what is wrong with the weights ------------------------------------------------------------------------

BAD_HEADERS = [
    *same(
        OSError,
        [WEIGHTS, "not a complete safetensors file"],
        {
            "no bytes": (weights(b""), "0 bytes hold no header"),
            "7 bytes": (weights(b"1234567"), "7 bytes hold no header"),
            "8 bytes": (weights(raw(b"", length=2)), "8 bytes hold no header"),
            "header of length 0": (weights(bytes(100)), "header has 0 bytes"),
            "header of length 1": (weights(raw(b"{", bytes(90))), "header has 1 bytes"),
            "header of length 2^63": (
                weights(raw({}, bytes(90), 2**63)),
                "header has 9,223,372,036,854,775,808 bytes",
            ),
            "header of length 2^64 - 1": (
                weights(raw({}, bytes(90), 2**64 - 1)),
                "header has 18,446,744,073,709,551,615 bytes",
            ),
            "header past the end": (
                weights(raw({"a": entry()}, length=1000)),
                "header has 1,000 bytes, expected 2 to 61",
            ),
            "header one byte past the end": (
                weights(raw({}, length=3)),
                "header has 3 bytes, expected 2 to 2",
            ),
            "header of 128 MB": (sparse(raw(b"{}", length=2**27), 2**28), "header has 134,217,728 bytes"),
            "header of 4 MB and a byte": (
                sparse(raw(b"{}", length=2**22 + 1), 2**23),
                "header has 4,194,305 bytes",
            ),
            "1 TB of zeros": (sparse(bytes(8), 2**40), "header has 0 bytes"),
            "1 TB of zeros behind a header": (
                sparse(b"", 2**40),
                "its tensors end at byte",
                "1,099,511,627,776",
            ),
        },
    ),
    *same(
        OSError,
        [WEIGHTS, "header"],
        {
            "header of zeros": (weights(raw(bytes(100))), "not JSON"),
            "header of spaces": (weights(raw(b" " * 100)), "not JSON"),
            "header that is not JSON": (weights(raw(b"{weights}")), "not JSON"),
            "header cut short": (weights(raw(b'{"a":{"dtype":"F32"')), "not JSON"),
            "header overwritten with zeros": (
                weights(lambda folder: whole(folder)[:2000] + bytes(9000)),
                "not JSON",
            ),
            "header with more behind it": (weights(raw(b"{}{}")), "not JSON (Extra data"),
            "header with NaN": (weights(raw(b'{"a":NaN}')), "NaN is not a number"),
            "header in bad UTF-8": (weights(raw(b'{"\xff":1}')), "utf-8"),
            "header in UTF-16": (weights(raw("{}".encode("utf-16"))), "utf-8"),
            "header with a byte-order mark": (weights(raw(b"\xef\xbb\xbf{}")), "BOM"),
            "header is a list": (weights(raw([])), "holds a list"),
            "header is a string": (weights(raw("weights")), "holds a str"),
            "header is null": (weights(raw(None)), "holds a NoneType"),
            "header nested 60 000 deep": (weights(raw(b'{"a":' + b"[" * 60_000)), "nested too deeply"),
            "header nested 100 000 deep": (
                weights(raw(b'{"a":' + b"[" * 100_000)),
                "100,001 lists and objects",
            ),
            "a tensor twice, differing": (
                weights(raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":5}', bytes(8))),
                "duplicate key a",
            ),
            "a tensor twice, identical": (
                weights(raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8))),
                "duplicate key a",
            ),
            "a dtype twice": (
                weights(
                    raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))
                ),
                "duplicate key dtype",
            ),
            "a novel of a key twice": (
                weights(raw(f'{{"{NOVEL}":1,"{NOVEL}":1}}'.encode())),
                "duplicate key",
            ),
        },
    ),
    *same(
        OSError,
        [WEIGHTS, "a is not described by dtype, shape and data_offsets"],
        {
            "tensor described by a number": described(5),
            "tensor described by null": described(None),
            "tensor described by a list 500 deep": described(json.loads(DEEP)),
            "tensor without a dtype": described({"shape": [2], "data_offsets": [0, 8]}),
            "tensor without a shape": described({"dtype": "F32", "data_offsets": [0, 8]}),
            "tensor without offsets": described({"dtype": "F32", "shape": [2]}),
            "tensor with a word too many": described(entry() | {"url": "x"}),
        },
    ),
    *same(
        OSError,
        [WEIGHTS, "a lacks a shape of at most 8 possible sizes"],
        {
            "shape of strings": described(entry(["2"])),
            "shape of booleans": described(entry([True, 2])),
            "shape with a fraction": described(entry([2.0])),
            "shape with a negative size": described(entry([-2])),
            "two negative sizes whose product fits": described(entry([-1, -2])),
            "shape is null": described(entry(None)),
            "shape is a number": described(entry(2)),
            "rank 9": described(entry([1] * 8 + [2])),
            "rank 10 000": described(entry([1] * 9999 + [2])),
            "rank 1 000 000": described(entry([1] * 999_999 + [2])),
            "sizes whose product overflows": described(entry([2**32, 2**32, 2])),
            "sizes whose product overflows but for a zero": described(
                entry([0, 2**40, 2**40], (0, 0)), body=0
            ),
            "size whose bytes wrap to what fits": described(entry([2**62 + 2])),
            "size of 4 000 digits": described(entry([LONG])),
            "sizes of 4 000 digits and no bytes": described(entry([0] + [LONG] * 7, (0, 0)), body=0),
        },
    ),
    *same(
        OSError,
        [WEIGHTS, "a has offsets that do not fit its shape"],
        {
            "offsets of 4 300 digits": described(entry([0], [10**4300 - 1] * 2)),
            "offsets reversed": described(entry(offsets=(8, 0))),
            "offsets negative": described(entry(offsets=(-8, 0))),
            "three offsets": described(entry(offsets=(0, 8, 8))),
            "one offset": described(entry(offsets=(8,))),
            "offsets are null": described(entry(offsets=None)),
            "offsets are fractions": described(entry(offsets=(0.0, 8.0))),
            "offsets for fewer values": described(entry([3])),
            "offsets for a wider dtype": described(entry(dtype="BF16")),
        },
    ),
    *same(
        OSError,
        [WEIGHTS],
        {
            "tensors overlap": (
                described(entry(), entry(offsets=(4, 12)), body=12),
                "b begins at byte",
                "overlap",
            ),
            "two tensors of the same bytes": (described(entry(), entry()), "b begins at byte", "overlap"),
            "tensors leave a gap": (
                described(entry(), entry(offsets=(12, 20)), body=20),
                "b begins at byte",
                "gap",
            ),
            "gap before the first tensor": (
                described(entry(offsets=(8, 16)), body=16),
                "a begins at byte",
                "gap",
            ),
            "novel of a name out of place": (
                weights(raw({NOVEL: entry(offsets=(8, 16))}, bytes(16))),
                "aaa begins at byte",
            ),
            "offsets past the end": (
                described(entry([2000], (0, 8000))),
                "its tensors end at byte",
                "the file at",
            ),
            "bytes behind the last tensor": (
                weights(lambda folder: whole(folder) + b"x"),
                "1 byte too long: its tensors end at byte",
            ),
            "metadata is a list": (
                header(lambda found: found.update(__metadata__=[])),
                "metadata are not strings",
            ),
            "metadata with a number": (
                header(lambda found: found.update(__metadata__={"a": 1})),
                "metadata are not strings",
            ),
        },
    ),
    *same(
        OSError,
        ["config in the weights"],
        {
            "config in the weights is empty": (told(""), "not JSON"),
            "config in the weights is a list": (told("[]"), "holds a list"),
            "config in the weights is deep": (told("[" * 60_000), "nested too deeply"),
            "config in the weights with half a letter": (told('{"a": "\ud800"}'), "utf-8"),
            "config in the weights of a novel": (told(json.dumps({"a": NOVEL})), "more than 65,536 bytes"),
        },
    ),
    *same(
        ValueError,
        [CONFIG],
        {
            "config in the weights with a nameless key": (told('{"": 1}'), " is None, was 1"),
            "config in the weights nested 500 deep": (
                told('{"num_layers":' + DEEP + "}"),
                "num_layers is 1, was [[[",
            ),
            "config in the weights with a long name": (told(json.dumps({NOVEL[:60_000]: 1})), "aaa"),
            "config in the weights with an escape": (told('{"\\u001b[2J": 1}'), r"\x1b[2J"),
        },
    ),
    *each(
        "dtype {}",
        lambda dtype: described(entry(dtype=dtype)),
        ("F31", "f32", "", "\x1b[2J", 32, None, ["F32"], "F" * 100_000),
        ValueError,
        WEIGHTS,
        "a is stored as ",
        "expected F32, F16, BF16",
    ),
    *[
        (
            f"weights in {stored}",
            changed(dtype=dtype),
            ValueError,
            WEIGHTS,
            f"proj_out.bias is stored as {stored},",
        )
        for stored, dtype in {
            "I64": torch.int64,
            "I8": torch.int8,
            "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
            "F64": torch.float64,
        }.items()
    ],
    *each(
        "weights cut short after {} bytes",
        cut,
        (9, 100, *range(4096, 46_000, 4096), -1),
        OSError,
        WEIGHTS,
        "not a complete",
    ),
]

BAD_TENSORS = [
    *same(
        ValueError,
        [WEIGHTS, "proj_out.bias holds NaN or infinity"],
        {
            "NaN": changed(values=[math.nan]),
            "infinity": changed(values=[math.inf]),
            "minus infinity": changed(values=[-math.inf]),
            "plus and minus infinity": changed(values=[math.inf, -math.inf]),
            "NaN in bfloat16": changed(dtype=torch.bfloat16, values=[math.nan]),
            "infinity in float16": changed(dtype=torch.float16, values=[math.inf]),
            "NaN that is read and not mapped": both(changed(values=[math.nan]), asked(disable_mmap=True)),
        },
    ),
    *same(
        ValueError,
        [WEIGHTS, CONFIG, "keys differ"],
        {
            "no tensors": (weights(raw({})), "Missing: patch_embedding.weight"),
            "one key missing": (
                tensors(lambda found: found.pop("proj_out.bias")),
                "Missing: proj_out.bias; unknown: none",
            ),
            "one block missing": (renamed("blocks.0.", "."), "Missing: blocks.0.", "and more"),
            "one key more": (more(teacher__weight=(1,)), "Missing: none; unknown: teacher.weight"),
            "one key more, without values": (more(empty=(0,)), "unknown: empty"),
            "one key more, without a name": (
                tensors(lambda found: found.update({"": torch.zeros(1)})),
                "unknown: ",
            ),
            "one block more": (renamed("blocks.0.", "blocks.1.", is_kept=True), "unknown: blocks.1."),
            "one block under two numbers": (
                renamed("blocks.0.", "blocks.00.", is_kept=True),
                "unknown: blocks.00.",
            ),
            "a block of a large number": (
                renamed("blocks.0.", f"blocks.{10**30}."),
                f"unknown: blocks.{10**30}.",
            ),
            "an adapter among the weights": (
                more(proj_out__lora_A__default__weight=(1,)),
                "unknown: proj_out.lora_A.default",
            ),
            "key of a million letters": (weights(raw({NOVEL: entry()}, bytes(8))), "unknown: aaa"),
            "key that clears the terminal": (
                weights(raw({"\x1b[2J": entry()}, bytes(8))),
                r"unknown: '\x1b[2J'",
            ),
            "key that is half a letter": (weights(raw({"\ud800": entry()}, bytes(8))), r"unknown: '\ud800'"),
            "1 TB in the header, not in the config": (
                zeros_of(hidden_size=65536, ffn_dim=65536, depth=4),
                "unknown: blocks.1.",
            ),
        },
    ),
    *each(
        "keys renamed with {}",
        partial(renamed, ""),
        ("module.", "_orig_mod.", "ema.", "model.", "transformer."),
        ValueError,
        WEIGHTS,
        CONFIG,
        "keys differ",
        "Missing: patch_embedding.weight",
        "Only the prefixes of a wrapper differ: save the model inside",
    ),
    (
        "keys renamed inside a block",
        renamed("blocks.0.", "blocks.0._orig_mod."),
        ValueError,
        WEIGHTS,
        "Only the prefixes of a wrapper differ",
    ),
    (
        "keys renamed and one missing",
        both(tensors(lambda found: found.pop("proj_out.bias")), renamed("", "module.")),
        ValueError,
        WEIGHTS,
        "belong to another model or were renamed",
    ),
    *same(
        ValueError,
        [WEIGHTS, f"{CONFIG} implies"],
        {
            "wrong shape": (zeros_of({"proj_out.bias": (15,)}), "proj_out.bias is (15,)", "implies (16,)"),
            "a matrix turned": (
                changed("blocks.0.ffn.net.0.proj.weight", shape=(16, 32)),
                "implies (32, 16)",
            ),
            "a dimension more": (changed(shape=(1, 16)), "proj_out.bias is (1, 16)"),
            "a scalar": (zeros_of({"proj_out.bias": ()}), "proj_out.bias is ()"),
            "no values": (zeros_of({"proj_out.bias": (0,)}), "proj_out.bias is (0,)"),
            "one tensor of 1 TB": (zeros_of({"proj_out.bias": (2**38,)}), "proj_out.bias is (274877906944,)"),
        },
    ),
    *same(
        OSError,
        [WEIGHTS, "holds 11,", "this machine has"],
        {
            "11 TB that the config agrees with": both(settings(**HUGE), zeros_of(**HUGE)),
            "11 TB that the config agrees with, pinned": both(
                settings(**HUGE), zeros_of(**HUGE), asked(sha256="0" * 64)
            ),
        },
    ),
]

BAD_FILES = [
    *same(
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
        for row in same(
            OSError,
            [name, "regular file"],
            {
                f"{what} under the name {name}": both(
                    sharded if name == INDEX else silent, instead(name, make)
                )
                for what, make in {
                    "folder": Path.mkdir,
                    "pipe": os.mkfifo,
                    "endless device": device(1, 5),
                    "terminal": device(5, 0),
                    "no device": device(240, 9),
                    "socket": listening,
                }.items()
            },
        )
    ],
    *[
        row
        for name in (WEIGHTS, CONFIG, INDEX)
        for row in same(
            OSError,
            [name, "a link "],
            {
                f"{what} under the name {name}": both(sharded if name == INDEX else silent, way)
                for what, way in {
                    "dangling link": link(name, "nowhere"),
                    "link to itself": link(name, name),
                    "link out of the folder": moved_out(name),
                    "link to /proc": link(name, "/proc/self/environ"),
                    "link to a device": link(name, "/dev/zero"),
                    "link of 4 000 letters": link(name, "x/" * 2000),
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
        save_led_out,
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
        "a pickle that is asked for",
        both(absent(WEIGHTS), file(f"{STEM}.bin", PICKLE), asked(use_safetensors=False)),
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
    *same(
        OSError,
        [WEIGHTS, "it is a pickle"],
        {
            "a pickle renamed .safetensors": weights(PICKLE),
            "a .pth renamed .safetensors": weights(torch_archive),
            "a .pth of old renamed .safetensors": weights(partial(torch_archive, is_zip=False)),
            "a TorchScript archive renamed .safetensors": weights(torch_script),
        },
    ),
    (
        "a pickle in letters renamed .safetensors",
        weights(pickle.dumps(Payload(), 0)),
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
        "an index of pickles under their name for it",
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


# ---- what is wrong with the index --------------------------------------------------------------------------

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
            NOVEL,
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
    *same(
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
            "a shard that has another name": (
                mapped(proj_out__bias="other.safetensors"),
                "other.safetensors that is missing",
            ),
        },
    ),
    *same(
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
            "a shard that leads out of the folder": (
                both(sharded, moved_out(SHARDS[0])),
                "leads out of the folder",
            ),
            "a shard that leads nowhere": (
                both(sharded, link(SHARDS[0], "nowhere")),
                "a link to a missing file",
            ),
            "a shard that is a git-lfs pointer": (
                shards(lambda one, two: one.write_text(LFS)),
                "git lfs pull",
            ),
        },
    ),
    *same(
        ValueError,
        [SHARDS[0], "differs from its index in "],
        {
            "a promised tensor that no shard holds": (mapped(teacher=SHARDS[0]), "teacher"),
            "a tensor that is said to be in the other shard": (
                mapped(**{"blocks.0.attn1.norm_k.weight": SHARDS[1]}),
                "attn1.norm_k",
            ),
            "a tensor that the index lacks": (
                index(lambda found: found["weight_map"].pop("blocks.0.attn1.norm_k.weight") * 0),
                "blocks.0.attn1.norm_k.weight",
            ),
            "a shard without a promised tensor": resaved(lambda one, two: dict(list(one.items())[1:])),
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


# ---- what is wrong with the config -------------------------------------------------------------------------

SIZES = (
    "hidden_size",
    "depth",
    "num_heads",
    "ffn_dim",
    "num_channels",
    "text_dim",
    "freq_dim",
    "rope_max_seq_len",
)
NO_SIZES = (
    "0",
    "-1",
    "65537",
    "10000000",
    str(2**64),
    '"4"',
    "4.5",
    "4.0",
    "1e400",
    "true",
    "[16]",
    "{}",
    str(LONG),
    DEEP,
)
BAD_CONFIG = [
    ("config missing", absent(CONFIG), OSError, "no config.json", f"found {WEIGHTS}"),
    *same(
        OSError,
        [CONFIG],
        {
            "config empty": (config(b""), "not JSON"),
            "config of blanks": (config(b" \n"), "not JSON"),
            "config cut short": (config('{"hidden_size":'), "not JSON"),
            "config in Python": (config("{'depth': 1}"), "not JSON"),
            "config with a comment": (config('{"depth": 1} // of ours'), "not JSON"),
            "config that is the weights": (config(whole), "not JSON"),
            "config with a byte-order mark": (config(b"\xef\xbb\xbf{}"), "BOM"),
            "config in bad UTF-8": (config(b'{"\xff": 1}'), "utf-8"),
            "config in UTF-16": (config("{}".encode("utf-16")), "utf-8"),
            "config of 70 000 bytes": (config(b" " * 70_000), "more than 65,536 bytes"),
            "config with a key twice, differing": (config('{"depth": 1, "depth": 2}'), "duplicate key depth"),
            "config with a key twice, identical": (config('{"depth": 1, "depth": 1}'), "duplicate key depth"),
            "config nested 60 000 deep": (config("[" * 60_000), "nested too deeply"),
            "config nested 100 000 deep": (config("[" * 100_000), "more than 65,536 bytes"),
            "config of objects nested 10 000 deep": (config('{"a":' * 10_000), "nested too deeply"),
            "a size of 5 000 digits": (setting_text("depth", "9" * 5000), "4300 digits"),
        },
    ),
    *[
        (f"config is {text}", config(text), OSError, CONFIG, f"holds a {kind}")
        for text, kind in (
            ("[]", "list"),
            ('"organisation/model"', "str"),
            ("5", "int"),
            ("5.5", "float"),
            ("null", "NoneType"),
            ("true", "bool"),
        )
    ],
    *each(
        "a setting that is {}",
        lambda text: setting_text("eps", text),
        ("NaN", "Infinity", "-Infinity"),
        OSError,
        CONFIG,
        "is not a number",
    ),
    *[
        row
        for name in SIZES
        for row in each(
            f"{name} is {{:.40}}",
            partial(setting_text, name),
            NO_SIZES,
            ValueError,
            f"{name} is ",
            "expected a whole number from 1 to 65536",
        )
    ],
    *each(
        "{} is null",
        lambda name: setting_text(name, "null"),
        [name for name in SIZES if name != "ffn_dim"],
        ValueError,
        " is None",
        "whole number",
    ),
    *[
        (f"{name} is {value!r}", wan_setting(name, value), ValueError, f"{said} is {value!r}")
        for name, value, said in (
            ("num_attention_heads", 0, "num_attention_heads"),
            ("attention_head_dim", "8", "attention_head_dim"),
            ("attention_head_dim", 10**7, "attention_head_dim"),
            ("num_layers", 10**6, "depth"),
            ("num_layers", [1], "depth"),
            ("in_channels", True, "num_channels"),
        )
    ],
    *same(
        ValueError,
        [],
        {
            "depth of 10^6 under both names": (settings(depth=10**6, num_layers=10**6), "depth is 1000000"),
            "width that heads do not divide": (
                settings(num_heads=3),
                "hidden_size 16 over 3 heads",
                "--num_heads",
            ),
            "heads of an odd size": (settings(num_heads=16), "1 channels a head", "rotary"),
            "more heads than channels": (settings(num_heads=32), "hidden_size 16 over 32 heads"),
            "freq_dim odd": (settings(freq_dim=255), "freq_dim is 255"),
            "rope_max_seq_len of 65 536": (
                settings(rope_max_seq_len=65536),
                "rope_max_seq_len is 65536",
                "16384",
            ),
            "ffn_dim left to a width of 65 536": (
                settings(hidden_size=65536, ffn_dim=None),
                "ffn_dim is 262144",
            ),
        },
    ),
    *each(
        "patch_size is {}",
        lambda value: settings(patch_size=value),
        (
            [2, 2, 2],
            [1, 2],
            [1, 2, 2, 2],
            [1, 0, 2],
            [1, -2, 2],
            [1, 2.0, 2],
            [True, 2, 2],
            [1, "2", 2],
            2,
            "1,2,2",
            None,
            {},
            [],
            [1, 10**7, 10**7],
            [1, [2], 2],
        ),
        ValueError,
        "patch_size",
    ),
    *each(
        "eps is {}",
        lambda value: settings(eps=value),
        (0, 0.0, -1e-6, 1, 1.5, "1e-6", None, True, [], 1e300),
        ValueError,
        "eps is ",
        "expected a small positive number",
    ),
    *each(
        "cross_attn_norm is {}",
        lambda value: settings(cross_attn_norm=value),
        (0, 1, None, "true", []),
        ValueError,
        "cross_attn_norm is ",
    ),
    *each(
        "qk_norm is {}",
        lambda value: settings(qk_norm=value),
        (None, "layer_norm", True, 5, []),
        ValueError,
        "qk_norm ",
    ),
    *each(
        "_class_name is {:.40}",
        lambda value: settings(_class_name=value),
        (
            "UNet2DConditionModel",
            "wanlitestudent",
            "",
            "os.system",
            "\x1b[2J",
            "x" * 60_000,
            None,
            5,
            ["WanLiteStudent"],
            {"a": 1},
        ),
        ValueError,
        CONFIG,
        "is the config of a ",
        "expected WanLiteStudent or WanTransformer3DModel",
    ),
    *each(
        "quantization_config is {}",
        lambda value: settings(quantization_config=value),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quant_method": "os.system"},
            {},
            [],
            "int8",
            False,
        ),
        ValueError,
        CONFIG,
        "has a quantization_config",
        "Quantise",
    ),
    (
        "quantization_config that was added",
        added(quantization_config={"quant_method": "gguf"}),
        ValueError,
        CONFIG,
        "Quantise",
    ),
    *[
        (
            f"the config says {name} {value}, the weights do not",
            settings(**{name: value}),
            ValueError,
            WEIGHTS,
            CONFIG,
            "implies",
        )
        for name, value in (
            ("hidden_size", 32),
            ("hidden_size", 65536),
            ("depth", 2),
            ("depth", 65536),
            ("num_channels", 8),
            ("num_channels", 65536),
            ("text_dim", 16),
            ("freq_dim", 128),
            ("ffn_dim", 64),
            ("ffn_dim", None),
            ("patch_size", [1, 4, 4]),
            ("patch_size", [1, 1, 4]),
            ("patch_size", [1, 65536, 65536]),
            ("cross_attn_norm", False),
        )
    ],
    ("the config says nothing", config("{}"), ValueError, WEIGHTS, CONFIG, "Missing: "),
    *[
        (
            f"the weights were saved with another {name}",
            added(**{name: value}),
            ValueError,
            CONFIG,
            f"{name} is {value}, was ",
        )
        for name, value in {
            "num_attention_heads": 4,
            "eps": 1e-05,
            "rope_max_seq_len": 64,
            "num_layers": 60000,
            "attention_head_dim": 32,
        }.items()
    ],
    *[
        (
            f"{ours} is said twice, differently",
            both(silent, added(**changes)),
            ValueError,
            f"{ours} is ",
            "but under its Wan names",
        )
        for ours, changes in {
            "depth": {"depth": 2},
            "num_heads": {"num_heads": 4},
            "hidden_size": {"hidden_size": 8},
            "num_channels": {"in_channels": 8},
        }.items()
    ],
    (
        "channels in and out differ",
        both(silent, added(out_channels=8)),
        ValueError,
        "num_channels is 4, but under its Wan names 8",
    ),
]


# ---- what is wrong with the question -----------------------------------------------------------------------

BAD_ARGUMENTS = [
    *each(
        "path is {}",
        path,
        (None, "", " ", "\n", "student\0", "\0", 5, 0, True, 1.5, [], {}, b"student", ["student"]),
        OSError,
        "is not the name of a folder",
    ),
    *same(
        OSError,
        ["no config.json"],
        {
            "path is home": path("~"),
            "path is here": path("."),
            "path is above": path(".."),
            "path is the root": path("/"),
        },
    ),
    *same(
        OSError,
        ["not a folder"],
        {
            "path is the config": (path(lambda folder: folder / CONFIG), CONFIG),
            "path is the weights": (path(lambda folder: str(folder / WEIGHTS)), WEIGHTS),
            "path is a pipe": (at("pipe", os.mkfifo), "pipe"),
            "path is a device": (path("/dev/zero"), "/dev/zero"),
        },
    ),
    *same(
        OSError,
        ["no such folder"],
        {
            "path that does not exist": path("./nowhere"),
            "path through a file": path(lambda folder: folder / CONFIG / "x"),
            "path is a dangling link": at("link", lambda path: path.symlink_to("nowhere")),
            "path with a newline": (path("./stu\ndent"), r"stu\ndent"),
            "path with an escape": (path("./\x1b[2J"), r"\x1b[2J"),
            "path of emoji": (path("./\U0001f600"), "\U0001f600"),
            "path of spaces and dots": path("./. . ."),
            "path like a name on the hub": path("organisation/.."),
            "path of a variable": path("$HOME/student"),
            "path with a wildcard": path("./stud*"),
            "path of Windows": path("C:\\student"),
            "path is the home of nobody": path("~nobody-of-this-name"),
        },
    ),
    *same(
        OSError,
        ["cannot be read"],
        {
            "path is a link to itself": (at("loop", lambda path: path.symlink_to("loop")), "loop"),
            "path of 300 letters": path("x" * 300),
            "path of 100 000 letters": path("x/" * 50_000),
            "path with half a letter": (path("./\ud800"), r"\ud800"),
        },
    ),
    *each(
        "path is {}",
        path,
        (
            "https://huggingface.co/organisation/model",
            "http://localhost/x",
            "file:///etc",
            "s3://bucket/x",
            "hf://organisation/model",
            "x://",
        ),
        OSError,
        "is a URL",
    ),
    *each(
        "path is {:.30}, which the hub's cache has not",
        lambda name: asked(pretrained_model_name_or_path=name, local_files_only=True),
        ("organisation/model", "a/b.", "x" * 200 + "/model"),
        OSError,
        "not available on the hub",
    ),
    *each(
        "subfolder is {}",
        lambda value: asked(subfolder=value),
        ("..", "../..", "../../etc", "/etc", "/", "a/../../..", "./.."),
        ValueError,
        "subfolder ",
        "leads out of",
        "student",
    ),
    *each(
        "subfolder is {}",
        lambda value: asked(subfolder=value),
        ("a\0b", 5, 1.5, True, ["x"], b"x"),
        ValueError,
        "subfolder ",
        "is not the name of a folder",
    ),
    (
        "subfolder that leads out by a link",
        both(lambda folder: (folder / "out").symlink_to("/etc"), asked(subfolder="out")),
        ValueError,
        "subfolder 'out' leads out of",
    ),
    (
        "subfolder that does not exist",
        asked(subfolder="transformer"),
        OSError,
        "student/transformer: no such folder",
    ),
    ("subfolder is a file", asked(subfolder=CONFIG), OSError, CONFIG, "not a folder"),
    *each(
        "subfolder is {:.40}",
        lambda value: asked(subfolder=value),
        ("\ud800", "x" * 300),
        OSError,
        "cannot be read",
    ),
    *each(
        "variant is {:.40}",
        lambda value: asked(variant=value),
        (
            "../x",
            "/x",
            "",
            ".",
            "..",
            "a/b",
            "a\\b",
            "fp16\0",
            "fp16\n",
            " ",
            "x" * 33,
            "\ud800",
            "*",
            "\x1b[2J",
            5,
            True,
            ["fp16"],
            b"fp16",
        ),
        ValueError,
        "variant ",
        "cannot be part of a file name",
    ),
    (
        "variant that is not there",
        asked(variant="fp16"),
        OSError,
        "Error no file named",
        f"{STEM}.fp16.safetensors",
    ),
    *each(
        "device_map is {:.60}",
        lambda value: asked(device_map=value),
        (
            "gpu",
            "disk",
            "meta",
            "",
            "cpu\0",
            "cuda:-1",
            "cuda:99",
            "cuda:256",
            "cuda:999",
            f"cuda:{10**20}",
            "cpu,cuda",
            "CPU",
            "opengl",
            "fpga",
            "xpu",
            "\x1b[2J",
            -1,
            99,
            256,
            10**30,
            1.5,
            math.nan,
            b"cpu",
            [],
            ["cpu"],
            {},
            {"blocks": "cpu"},
            {"": "cpu", "blocks": "cpu"},
            {"": "gpu"},
            {"": "meta"},
            {"": {"": "cpu"}},
            torch.device("meta"),
            torch.device("cuda", 99),
            object,
        ),
        ValueError,
        "device ",
    ),
    (
        "device is garbage",
        asked(device="gpu7"),
        ValueError,
        "device 'gpu7' is unknown, expected cpu, cuda or cuda:N",
    ),
    *each(
        "dtype is {:.40}",
        lambda value: asked(dtype=value),
        (
            "int8",
            "float64",
            "float8_e4m3fn",
            "nn",
            "",
            "bf16\0",
            "Auto",
            "__name__",
            "\ud800",
            16,
            True,
            [],
            {},
            b"float32",
            float,
            torch.float64,
            torch.int64,
            torch.float8_e4m3fn,
            torch.nn,
        ),
        ValueError,
        "dtype ",
        "expected float32, float16 or bfloat16",
    ),
    ("torch_dtype is garbage", asked(torch_dtype="half a float"), ValueError, "dtype 'half a float'"),
    *each(
        "use_safetensors is {}",
        lambda value: asked(use_safetensors=value),
        (False,),
        ValueError,
        "use_safetensors=False",
    ),
    *each(
        "unknown keyword {}",
        lambda name: asked(**{name: None}),
        (
            "local_file_only",
            "trust_remote_code",
            "quantization_config",
            "hidden_size",
            "from_flax",
            "strict",
            "weights_only",
            "ignore_mismatched_sizes",
            "custom_revision",
            "config",
            "projection",
            "teacher_checkpoint_path",
            "",
        ),
        TypeError,
        "does not take ",
        "it takes subfolder, variant, dtype",
        "never projects",
    ),
    *[
        (f"{name} of stock", asked(**{name: value}), TypeError, f"does not take {name};")
        for name, value in {
            "max_memory": {0: "1GB"},
            "offload_folder": "x",
            "offload_state_dict": True,
            "use_flashpack": True,
        }.items()
    ],
    *each(
        "sha256 is {:.40}",
        lambda value: asked(sha256=value),
        (
            "0" * 64,
            "",
            "nonsense",
            "\ud800",
            NOVEL,
            5,
            True,
            [],
            {},
            {"other.safetensors": "0" * 64},
            {WEIGHTS: "0" * 64},
            {WEIGHTS: None},
            {NOVEL: NOVEL},
        ),
        ValueError,
        "sha256",
        WEIGHTS,
    ),
    *each(
        "sha256 of two shards is {:.40}",
        lambda value: both(sharded, asked(sha256=value)),
        ("0" * 64, {SHARDS[0]: "0" * 64}, dict.fromkeys(SHARDS, "0" * 64)),
        ValueError,
        "sha256",
        SHARDS[0],
    ),
]


# ---- what takes longest to refuse --------------------------------------------------------------------------

COSTLY = [
    *same(
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
                "not described by",
            ),
        },
    ),
    *same(
        ValueError,
        [],
        {
            "20 000 tensors without values": (weights(without_values(20_000)), WEIGHTS, "unknown: 000000"),
            "a dtype of 60 000 lists": (
                described(entry(dtype=json.loads(PARTS))),
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
        both(silent, lambda folder: os.truncate(folder / CONFIG, 2**30)),
        OSError,
        CONFIG,
        "more than",
    ),
    (
        "an index of 1 GB",
        both(sharded, lambda folder: os.truncate(folder / INDEX, 2**30)),
        OSError,
        INDEX,
        "more than",
    ),
]


# ---- what a refusal may cost -------------------------------------------------------------------------------


class Blocked(BaseException):
    """A load did not come back."""


class Cost(NamedTuple):
    seconds: float
    busy: float  # of them, with work of our own: a machine that is busy with other work makes no refusal slow
    megabytes: float


def memory(name):
    """Return a line of /proc/self/status in MB."""
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def state():
    """Return what a load may not change: torch's settings, threads and open files."""
    counted = [
        len(os.listdir(folder)) for folder in ("/proc/self/task", "/proc/self/fd") if os.path.isdir(folder)
    ]
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        threading.active_count(),
        *counted,
    )


@contextlib.contextmanager
def watched(costs):
    """Add what happens inside to `costs`; fails where it blocks, or leaves anything behind."""

    def ring(*_):
        raise Blocked

    before, resident = state(), None
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the peak of what follows
        resident = memory("VmRSS:")
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, ALARM)
    start, work = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds, busy = time.perf_counter() - start, time.process_time() - work
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert state() == before
    costs.append(Cost(seconds, busy, 0 if resident is None else memory("VmHWM:") - resident))


def check_refused(arguments, error, words):
    costs = []
    with watched(costs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            WanLiteStudent.from_pretrained(**arguments)
        except (OSError, ValueError, TypeError) as refused:
            raised, message = type(refused), str(refused)
        else:
            pytest.fail("it was loaded")
    assert raised is error, message  # none of the library's own kinds: they say too little
    assert [word for word in words if word not in message] == [], message
    assert len(message) < MAX_LETTERS and message.isprintable(), message[:MAX_LETTERS]
    assert costs[0].busy < MAX_SECONDS and costs[0].megabytes < MAX_MEGABYTES, costs[0]
    REFUSED.extend(costs)


@pytest.fixture(scope="module")
def student():
    return loud_student(**SMALL)


@pytest.fixture(scope="module")
def template(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    student.save_pretrained(folder)
    WanLiteStudent.from_pretrained(folder)  # what is imported at the first load is no row's cost
    return folder


@pytest.fixture
def saved(template, tmp_path, monkeypatch, record_property):
    """A sound student's folder in a home of its own; nothing is asked of the network, no payload is run."""
    shutil.copytree(template, tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    asked_for = []
    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, lambda *address, **_: asked_for.append(address) or 1)
    yield tmp_path / "student"
    assert asked_for == [] and list(tmp_path.rglob(EXECUTED)) == []
    record_property(
        "refused", [(cost.seconds, cost.megabytes) for cost in REFUSED]
    )  # told at the end, see conftest
    REFUSED.clear()


def rows(*tables):
    """Return parameters that pytest names by their sentences."""
    return [
        pytest.param(broken, error, words, id=sentence.encode("unicode_escape").decode()[:120])
        for table in tables
        for sentence, broken, error, *words in table
    ]


@pytest.mark.parametrize(
    "broken, error, words",
    rows(
        BAD_HEADERS,
        BAD_TENSORS,
        BAD_FILES,
        BAD_PICKLES,
        BAD_INDEX,
        [(*row, CONFIG) for row in BAD_CONFIG],
        BAD_ARGUMENTS,
    ),
)
def test_what_is_wrong_is_refused_at_once_by_name(broken, error, words, saved):
    arguments = broken(saved) or {}
    if saved.exists():
        os.utime(saved, (0, 0))  # nobody is saving there, so nothing is looked at again
    check_refused({"pretrained_model_name_or_path": saved} | arguments, error, words)


@pytest.mark.parametrize("age", [3600, 0, -3600])
@pytest.mark.parametrize("broken, error, words", rows(COSTLY))
def test_what_is_costly_is_refused_at_once_whatever_the_age_of_its_folder(broken, error, words, age, saved):
    broken(saved)
    os.utime(saved, (time.time() - age,) * 2)
    check_refused({"pretrained_model_name_or_path": saved}, error, words)


@pytest.mark.parametrize("name, error", [(WEIGHTS, OSError), (CONFIG, OSError), ("", PermissionError)])
def test_what_may_not_be_read_is_refused(name, error, saved):
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(shutil.copytree(saved, Path(place) / "student"))
        os.chmod(folder / name, 0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # an administrator may read everything
            check_refused({"pretrained_model_name_or_path": folder}, error, [str(folder), "ermission denied"])
        finally:
            os.seteuid(user)
            os.chmod(folder / name, 0o700)


# ---- what is odd but sound ---------------------------------------------------------------------------------


def saved_again(**arguments):
    """The folder is saved anew, by the student itself."""

    def save(folder):
        student = WanLiteStudent.from_pretrained(folder)
        shutil.rmtree(folder)
        student.save_pretrained(folder, **arguments)

    return save


def another(name):
    """Other weights of the same config lie under this name as well."""

    def write(folder):
        save_file({key: tensor + 1 for key, tensor in load_file(folder / WEIGHTS).items()}, folder / name)

    return write


def into(subfolder):
    return lambda folder: (
        folder.rename("moved"),
        (folder / subfolder).parent.mkdir(parents=True),
        Path("moved").rename(folder / subfolder),
    )


def in_the_cache(folder):
    """The files lie as the hub's cache has them: links to blobs beside the snapshots."""
    blobs, snapshot = Path("models--a--b/blobs").absolute(), Path("models--a--b/snapshots/0").absolute()
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.rename(blobs / path.name).name}")
    return {"pretrained_model_name_or_path": snapshot}


def at_odd_addresses(folder):
    length = int.from_bytes(whole(folder)[:8], "little")
    return raw(whole(folder)[8 : 8 + length] + b" " * (1 + -length % 4), whole(folder)[8 + length :])


def read_only(folder):
    for path in (*folder.iterdir(), folder):
        path.chmod(0o500)


def pinned(is_dict, letters=str.lower):
    def pin(folder):
        digests = {
            path.name: letters(hashlib.sha256(path.read_bytes()).hexdigest())
            for path in folder.glob("*.safetensors")
        }
        return {"sha256": digests if is_dict else digests[WEIGHTS]}

    return pin


ODD = {
    "trailing slash": path(lambda folder: f"{folder}/"),
    "string": path(lambda folder: str(folder)),
    "path object": asked(),
    "relative path": path("./student"),
    "relative path without a dot": path("student"),
    "path through dots": path("student/../student"),
    "path through a subfolder": path(lambda folder: folder.parent / "student/."),
    "home": path("~/student"),
    "link to the folder": at("../link", lambda path: path.symlink_to("student")),
    "newline and emoji in the path": lambda folder: {
        "pretrained_model_name_or_path": folder.rename("a\n\U0001f600")
    },
    "two file names, the first wins": another(SECOND),
    "the second file name alone": lambda folder: (folder / WEIGHTS).rename(folder / SECOND) and None,
    "broken index beside a single file": file(INDEX, "[]"),
    "shards": sharded,
    "shards as they are saved": saved_again(max_shard_size="20KB"),
    "index without metadata": index(lambda found: found.pop("metadata") and None),
    "index with more settings": index(lambda found: found.update(auto_map={"AutoModel": "x.py"})),
    "variant": both(saved_again(variant="fp16"), asked(variant="fp16")),
    "variant in shards": both(saved_again(variant="fp16", max_shard_size="20KB"), asked(variant="fp16")),
    "variant beside other weights": both(another(f"{STEM}.fp16.safetensors")),
    "subfolder": both(into("transformer"), asked(subfolder="transformer")),
    "subfolder of a subfolder": both(into("a/b"), asked(subfolder="a/b")),
    "subfolder as a path object": both(into("a/b"), asked(subfolder=Path("a") / "b")),
    "subfolder by dots that stay inside": both(into("a/b"), asked(subfolder="a/../a/b")),
    "no subfolder": asked(subfolder=""),
    "read into memory": asked(disable_mmap=True),
    "shards read into memory": both(sharded, asked(disable_mmap=True)),
    "weights without their config": silent,
    "weights at odd addresses": weights(at_odd_addresses),
    "config in our names alone": settings(),
    "config without what has a default": config(
        {
            key: value
            for key, value in SMALL.items()
            if key not in ("freq_dim", "patch_size", "cross_attn_norm", "eps")
        }
    ),
    "config in the Wan names alone": config(
        lambda folder: {
            key: value
            for key, value in json.loads((folder / CONFIG).read_text()).items()
            if key not in ("hidden_size", "depth", "num_heads", "num_channels")
        }
    ),
    "config with names of Wan that say nothing": added(
        image_dim=None, added_kv_proj_dim=None, pos_embed_seq_len=None
    ),
    "config of a stock class": added(_class_name="WanTransformer3DModel"),
    "config without a class": settings(),
    "config of a later version": added(_diffusers_version="99.0.0", _name_or_path="/gone"),
    "teacher of nothing": added(teacher_checkpoint_path=None),
    "files of macOS": both(
        file(f"._{WEIGHTS}", PICKLE), file(f"._{CONFIG}", PICKLE), file(".DS_Store", PICKLE)
    ),
    "pickle beside the weights": file(f"{STEM}.bin", PICKLE),
    "code beside the weights": file("modeling.py", "raise SystemExit"),
    "links inside the folder": both(
        lambda folder: (folder / WEIGHTS).rename(folder / "b") and None,
        lambda folder: (folder / WEIGHTS).symlink_to("b"),
    ),
    "the hub's cache": in_the_cache,
    "read-only folder": read_only,
    "leftovers of a save": lambda folder: (folder / ".saving-1-0").mkdir(),
    "right sha256": pinned(False),
    "right sha256 in capitals": pinned(False, str.upper),
    "right sha256 by name": pinned(True),
    "right sha256 of shards": both(sharded, pinned(True)),
    "device cpu": asked(device="cpu"),
    "device_map cpu": asked(device_map="cpu"),
    **{
        f"device_map {word}": asked(device_map=word)
        for word in ("auto", "balanced", "balanced_low_0", "sequential")
    },
    "dtype auto": asked(dtype="auto"),
    "device_map of one": asked(device_map={"": "cpu"}),
    "device_map of nothing": asked(device_map={"": None}),
    "device_map torch.device": asked(device_map=torch.device("cpu")),
    "device cpu:0": asked(device_map="cpu:0"),
    "dtype as saved": asked(dtype="float32"),
    "torch_dtype as saved": asked(torch_dtype=torch.float32),
    "whatever a loader is told": asked(
        low_cpu_mem_usage=False,
        use_safetensors=None,
        local_files_only=True,
        revision="main",
        token=None,
        cache_dir="cache",
        force_download=False,
        max_memory=None,
        offload_folder=None,
        offload_state_dict=False,
        use_flashpack=False,
    ),
}
ODD_WITH_WARNING = {
    "shards as stock names them beside a single file": (
        both(
            lambda folder: shutil.copyfile(folder / WEIGHTS, "whole"),
            sharded,
            lambda folder: Path("whole").rename(folder / WEIGHTS) and None,
        ),
        "the shards are read, as stock diffusers does",
    ),
    "quantization_config of nothing": (added(quantization_config=None), "ignored: quantization_config"),
    "code that is to be run": (
        added(auto_map={"AutoModel": "x--y.Model"}),
        "a student does not have; they are ignored: auto_map",
    ),
    "settings of nobody": (added(x=1, y={"z": [2]}), "ignored: x, y"),
    "a name that clears the terminal": (added(**{"\x1b[2J": 1}), r"ignored: '\\x1b"),
    "a teacher to project": (added(teacher_checkpoint_path="/no/such/teacher"), "never projects"),
    "a setting nested 500 deep": (added(x=json.loads(DEEP)), "ignored: x"),
}


@pytest.mark.parametrize(
    "prepare, warning",
    [
        *[pytest.param(prepare, None, id=sentence) for sentence, prepare in ODD.items()],
        *[pytest.param(*row, id=sentence) for sentence, row in ODD_WITH_WARNING.items()],
    ],
)
def test_what_is_odd_but_sound_loads(prepare, warning, student, saved):
    arguments = {"pretrained_model_name_or_path": saved} | (prepare(saved) or {})
    with (
        watched([]),
        warnings.catch_warnings() if warning is None else pytest.warns(UserWarning, match=warning),
    ):
        if warning is None:
            warnings.simplefilter("error")
        loaded = WanLiteStudent.from_pretrained(**arguments)
        tensors, is_training = (
            {name: tensor.clone() for name, tensor in loaded.state_dict().items()},
            loaded.training,
        )
        del loaded  # and the map of its file
    expected = student.state_dict()
    assert tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )
    assert not is_training
