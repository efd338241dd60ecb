"""Students that are unusual but sound: each loads as it was saved."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.broken_students import (
    CONFIG,
    DEEP,
    INDEX,
    PICKLE,
    SECOND,
    STEM,
    WEIGHTS,
    added,
    at_path,
    both,
    called_with,
    config,
    file,
    index,
    made_at,
    raw,
    settings,
    sharded,
    weights,
    whole,
    without_metadata,
)
from tests.refusals import SMALL, watched
from train_distillation import WanLiteStudent


def saved_again(**arguments):
    """Load the student and save it again."""

    def save(folder):
        student = WanLiteStudent.from_pretrained(folder)
        shutil.rmtree(folder)
        student.save_pretrained(folder, **arguments)

    return save


def another(name):
    """Write other weights of the same config under this name as well."""

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
    """Lay the files out as in the cache of the hub: links to blobs beside the snapshots."""
    blobs, snapshot = Path("models--a--b/blobs").absolute(), Path("models--a--b/snapshots/0").absolute()
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.rename(blobs / path.name).name}")
    return {"pretrained_model_name_or_path": snapshot}


def at_unaligned_addresses(folder):
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
    "trailing slash": at_path(lambda folder: f"{folder}/"),
    "string": at_path(lambda folder: str(folder)),
    "path object": called_with(),
    "relative path": at_path("./student"),
    "relative path without a dot": at_path("student"),
    "path through dots": at_path("student/../student"),
    "path through a subfolder": at_path(lambda folder: folder.parent / "student/."),
    "home": at_path("~/student"),
    "link to the folder": made_at("../link", lambda path: path.symlink_to("student")),
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
    "variant": both(saved_again(variant="fp16"), called_with(variant="fp16")),
    "variant in shards": both(
        saved_again(variant="fp16", max_shard_size="20KB"), called_with(variant="fp16")
    ),
    "variant beside other weights": both(another(f"{STEM}.fp16.safetensors")),
    "subfolder": both(into("transformer"), called_with(subfolder="transformer")),
    "subfolder of a subfolder": both(into("a/b"), called_with(subfolder="a/b")),
    "subfolder as a path object": both(into("a/b"), called_with(subfolder=Path("a") / "b")),
    "subfolder by dots that stay inside": both(into("a/b"), called_with(subfolder="a/../a/b")),
    "no subfolder": called_with(subfolder=""),
    "read into memory": called_with(disable_mmap=True),
    "shards read into memory": both(sharded, called_with(disable_mmap=True)),
    "weights without their config": without_metadata,
    "weights at unaligned addresses": weights(at_unaligned_addresses),
    "config in the names of WanLite alone": settings(),
    "config without the settings that have defaults": config(
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
    "config with names of Wan without values": added(
        image_dim=None, added_kv_proj_dim=None, pos_embed_seq_len=None
    ),
    "config of a stock class": added(_class_name="WanTransformer3DModel"),
    "config without a class": settings(),
    "config of a later version": added(_diffusers_version="99.0.0", _name_or_path="/gone"),
    "teacher_checkpoint_path of None": added(teacher_checkpoint_path=None),
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
    "correct sha256": pinned(False),
    "correct sha256 in capitals": pinned(False, str.upper),
    "correct sha256 by name": pinned(True),
    "correct sha256 of shards": both(sharded, pinned(True)),
    "device cpu": called_with(device="cpu"),
    "device_map cpu": called_with(device_map="cpu"),
    **{
        f"device_map {word}": called_with(device_map=word)
        for word in ("auto", "balanced", "balanced_low_0", "sequential")
    },
    "dtype auto": called_with(dtype="auto"),
    "device_map with one entry": called_with(device_map={"": "cpu"}),
    "device_map with None": called_with(device_map={"": None}),
    "device_map torch.device": called_with(device_map=torch.device("cpu")),
    "device cpu:0": called_with(device_map="cpu:0"),
    "dtype as saved": called_with(dtype="float32"),
    "torch_dtype as saved": called_with(torch_dtype=torch.float32),
    "all arguments of a loader": called_with(
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
        "the shards are read, as in stock diffusers",
    ),
    "quantization_config of None": (added(quantization_config=None), "ignored: quantization_config"),
    "code named by auto_map": (
        added(auto_map={"AutoModel": "x--y.Model"}),
        "a student does not have; they are ignored: auto_map",
    ),
    "unknown settings": (added(x=1, y={"z": [2]}), "ignored: x, y"),
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
def test_an_unusual_but_sound_student_loads(prepare, warning, sound_student, sound_folder):
    arguments = {"pretrained_model_name_or_path": sound_folder} | (prepare(sound_folder) or {})
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
        del loaded  # and the mapping of its file
    expected = sound_student.state_dict()
    assert tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )
    assert not is_training
