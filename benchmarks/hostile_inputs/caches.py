"""Cached work that is damaged: it is computed again, or refused by name."""

import json
import os
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.hostile_inputs.builders import header_file
from benchmarks.hostile_inputs.trial import SAME, Input, train


def damaged_caches() -> list[Input]:
    kind = "damaged cache"

    def damage(pattern, change):
        def prepare(place):
            folder = shutil.copytree(place.run / "cache", place.beside / "run/cache")
            for path in sorted(folder.glob(pattern))[:1]:
                change(path)

        return prepare

    def flip(path, name=None):
        content = bytearray(path.read_bytes())
        position = len(content) - 2
        if name:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            position = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
        content[position] ^= 1
        path.write_bytes(content)

    def change(path, how):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        how(tensors)
        save_file(tensors, path, metadata)

    def nan(tensors):
        next(value for value in tensors.values() if value.is_floating_point()).view(-1)[0] = float("nan")

    shard, text_shard = "trajectories-*/shard-*", "text-*/shard-*"
    rows = [
        ("a bit of the velocity", shard, lambda path: flip(path, "velocity")),
        ("noise levels are missing", shard, lambda path: change(path, lambda each: each.pop("noise_level"))),
        ("NaN in the embeddings", text_shard, lambda path: change(path, nan)),
        ("an empty shard", shard, lambda path: path.write_bytes(b"")),
        ("a pipe for a shard", text_shard, lambda path: (path.unlink(), os.mkfifo(path))),
        ("a folder for a shard", shard, lambda path: (path.unlink(), path.mkdir())),
        (
            "a row more in all tensors",
            shard,
            lambda path: change(
                path,
                lambda each: each.update({key: torch.cat([value, value[:1]]) for key, value in each.items()}),
            ),
        ),
        (
            "an older shard for another",
            "trajectories-*",
            lambda folder: shutil.copy(
                *sorted(folder.parent.glob("text-*/shard-*"))[:1], next(folder.glob("shard-*"))
            ),
        ),
        ("a header of 3 GB", text_shard, lambda path: header_file(b"{", 2**63)(path)),
        ("a broken provenance", "text-*/provenance.json", lambda path: path.write_text("[" * 10**6)),
    ]
    return [Input(kind, name, SAME, damage(pattern, how), train, True) for name, pattern, how in rows]
