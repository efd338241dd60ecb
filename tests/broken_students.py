"""Ways to break the folder of a saved student.

A row of the tables that use them: the fault, a function that breaks the folder (and returns the arguments of
from_pretrained if those are at fault), the error, parts of its message. Weights carry the config that they
were saved with, so rows about config.json alone save weights without it.
"""

import contextlib
import json
import os
import pickle
import shutil
import socket
import types
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Payload, write_sparse
from tests.refusals import EXECUTED, SMALL
from wanlite.student.weights import all_tensor_shapes

HUGE = dict(hidden_size=65536, ffn_dim=65536, depth=64)
STEM = "diffusion_pytorch_model"
WEIGHTS, SECOND = f"{STEM}.safetensors", "diffusion_model.safetensors"
CONFIG, INDEX = "config.json", f"{STEM}.safetensors.index.json"
SHARDS = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46184\n"
LONG, DEEP, MILLION_LETTERS = 10**4000, "[" * 500 + "]" * 500, "a" * 1_000_000
MANY_LISTS = "[" + "[[]]," * 30_000 + "0]"


def raw(header, body=b"", length=None):
    """Return the bytes of a safetensors file; `header` is JSON, or bytes taken as they are."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def both(*ways):
    """Break a folder in several ways; the result has the arguments that one of them returns."""

    def write(folder):
        return next((found for found in [way(folder) for way in ways] if isinstance(found, dict)), None)

    return write


def file(name, content):
    """Replace the content of a file: bytes, text, JSON, or a function of the folder that returns one of them."""

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
    """Write weights whose header describes tensors a, b, ... with these entries, before `body` zero bytes."""
    return weights(raw(dict(zip("ab", descriptions)), bytes(body)))


def without_values(count):
    """Return a file of `count` tensors without values."""
    return raw(
        b"{"
        + b",".join(b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(count))
        + b"}"
    )


def sparse(beginning, size):
    """Extend the weights by zeros that take no disk, to `size` bytes, after replacing their first bytes."""

    def write(folder):
        with open(folder / WEIGHTS, "r+b") as stream:
            stream.write(beginning)
            try:
                stream.truncate(size)
            except OSError:
                pytest.skip("this file system has no files that large")

    return write


def zeros_of(names=None, **changes):
    """Write sparse zeros as the weights of a student with another config, or with other shapes of some tensors."""

    def write(folder):
        try:
            write_sparse(folder / WEIGHTS, all_tensor_shapes(SMALL | changes) | (names or {}))
        except OSError:
            pytest.skip("this file system has no files that large")

    return write


def tensors(change):
    """Change {name: tensor} of the weights and save them without their config."""

    def write(folder):
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return write


def changed(name="proj_out.bias", **how):
    """Change the dtype, the shape or some values of one tensor."""

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
    """Change the header of the weights and keep their bytes."""

    def write(folder):
        length = int.from_bytes(whole(folder)[:8], "little")
        found = json.loads(whole(folder)[8 : 8 + length])
        change(found)
        return raw(found, whole(folder)[8 + length :])

    return weights(write)


def saved_with(config):
    """Write a config into the metadata of the weights."""
    return header(lambda found: found.update(__metadata__={"config": config}))


without_metadata = tensors(lambda found: None)  # weights without a config in their metadata


def config(content):
    return both(without_metadata, file(CONFIG, content))


def settings(**changes):
    """Write config.json with the names of WanLite alone and these changes."""
    return config(SMALL | changes)


def setting_text(name, text):
    """Write config.json with this text as the value of a setting."""
    return config(
        json.dumps({key: value for key, value in SMALL.items() if key != name})[:-1] + f', "{name}": {text}}}'
    )


def added(**changes):
    """Change the saved config.json, which has the names of WanLite and of Wan."""
    return file(CONFIG, lambda folder: json.loads((folder / CONFIG).read_text()) | changes)


def wan_setting(name, value):
    """Write config.json with the names of Wan alone and one change."""
    return config(
        dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4) | {name: value}
    )


def absent(name):
    return lambda folder: (folder / name).unlink()


def instead(name, make):
    """Put something else in place of a file."""

    def replace(folder):
        (folder / name).unlink()
        try:
            make(folder / name)
        except PermissionError:
            pytest.skip("creating a device needs root")

    return replace


def link(name, target):
    return instead(name, lambda path: path.symlink_to(target))


def moved_out(name):
    """Move a file out of the folder and leave a link to it."""

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
    ):  # the address of a socket must be short
        end.bind(path.name)


def save_linked_outside(folder):
    """Change the config, and link to a save under way outside of the folder, whose config fits the weights."""
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
    """Split the weights into two shards with an index and without a config in their metadata."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(sorted(found))}
    for shard in SHARDS:
        save_file({name: found[name] for name in weight_map if weight_map[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def index(content):
    """Split the weights into shards; replace their index, or change it by a function."""

    def write(folder):
        sharded(folder)
        found = json.loads((folder / INDEX).read_text())
        is_change = isinstance(content, types.FunctionType)
        file(INDEX, (content(found) or found) if is_change else content)(folder)

    return write


def mapped(**changes):
    """Change the shards of some tensors in the index."""
    return index(
        lambda found: found["weight_map"].update(
            {name.replace("__", "."): shard for name, shard in changes.items()}
        )
    )


def shard_named(name):
    """Put a tensor into a file of this name in the index; there are shards around the folder as well."""

    def write(folder):
        mapped(proj_out__bias=name)(folder)
        for place in (folder.parent, folder / "sub"):
            place.mkdir(exist_ok=True)
            shutil.copyfile(folder / SHARDS[0], place / "x.safetensors")

    return write


def shards(change):
    """Change the two shards and keep the index."""

    def write(folder):
        sharded(folder)
        change(folder / SHARDS[0], folder / SHARDS[1])

    return write


def resaved(change, **metadata):
    """Save the first shard again, with the tensors that `change` returns for those of both."""
    return shards(lambda one, two: save_file(change(load_file(one), load_file(two)), one, metadata))


PICKLE = pickle.dumps({"proj_out.bias": Payload(EXECUTED)})


def torch_archive(folder, is_zip=True):
    torch.save({"proj_out.bias": Payload(EXECUTED)}, folder / "x", _use_new_zipfile_serialization=is_zip)
    return (folder / "x").read_bytes()


def torch_script(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)).save(str(folder / "x"))
    return (folder / "x").read_bytes()


def called_with(**arguments):
    """Keep the folder and return arguments for from_pretrained; functions are called with the folder."""
    return lambda folder: {
        name: value(folder) if isinstance(value, types.FunctionType) else value
        for name, value in arguments.items()
    }


def at_path(value):
    return called_with(pretrained_model_name_or_path=value)


def made_at(name, make):
    """Make something in the folder and return its path as the argument."""
    return lambda folder: (make(folder / name), {"pretrained_model_name_or_path": folder / name})[1]


def each(sentence, way, values, error, *words):
    """Return a row for every value."""
    return [
        (sentence.format(value if isinstance(value, str) else repr(value)), way(value), error, *words)
        for value in values
    ]


def with_common_words(error, words, ways):
    """Return a row for every {sentence: way}, with words in common; a way may come with words of its own."""
    return [
        (sentence, way[0], error, *words, *way[1:])
        if isinstance(way, tuple)
        else (sentence, way, error, *words)
        for sentence, way in ways.items()
    ]
