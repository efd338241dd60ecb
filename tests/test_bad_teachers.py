"""A teacher that cannot be projected: one clear error each, and the run that it was to replace stays as it was."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_TEACHER, write_official
from train_distillation import Settings, train
from wanlite.stages.complete import complete
from wanlite.stopping import StopSignal

TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
LOW, HIGH = "low_noise_model", "high_noise_model"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def official_pipeline(tmp_path_factory):
    """The tiny teacher with its experts in the official layout, three shards each, beside the parts of a pipeline."""
    folder = tmp_path_factory.mktemp("wan") / "wan"
    shutil.copytree(TINY_TEACHER, folder, ignore=shutil.ignore_patterns("transformer*", "model_index.json"))
    write_official(TINY_TEACHER, folder, 3)
    return folder


def shards(wan, expert):
    return sorted((wan / expert).glob("*.safetensors"))


def change(path, how):
    tensors = load_file(path)
    save_file({name: how(tensor) for name, tensor in tensors.items()}, path)


def swap(wan):
    (wan / LOW).rename(wan / "x"), (wan / HIGH).rename(wan / LOW), (wan / "x").rename(wan / HIGH)


def copy_low(wan):
    shutil.rmtree(wan / HIGH)
    shutil.copytree(wan / LOW, wan / HIGH)


def promise_more(wan):
    index = json.loads((wan / LOW / INDEX).read_text())
    index["weight_map"]["blocks.4.ffn.0.weight"] = shards(wan, LOW)[0].name
    (wan / LOW / INDEX).write_text(json.dumps(index))


def spoil(wan):
    change(shards(wan, LOW)[1], lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("nan")))


def drop(path, beginning):
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith(beginning)}, path)


@pytest.mark.parametrize("spoilt, flags, words", [
    (lambda wan: shutil.rmtree(wan / HIGH), {}, "high_noise_model"),
    (copy_low, {}, "hold the same weights"),
    (swap, {}, "hold each other's weights"),
    (lambda wan: shards(wan, LOW)[1].write_bytes(shards(wan, LOW)[1].read_bytes()[:-100]), {}, "not a whole safetensors"),
    (lambda wan: shards(wan, LOW)[2].unlink(), {}, "00003-of-00003.safetensors"),
    (lambda wan: change(shards(wan, HIGH)[1], lambda tensor: torch.cat([tensor, tensor])), {}, "shard is of another Wan"),
    (promise_more, {}, "blocks.4.ffn.0.weight"),
    (spoil, {}, "holds NaN or infinity"),
    (lambda wan: drop(wan / TEXT, "encoder.block.0.layer.0.SelfAttention.q"), {}, "text_encoder: 1 tensors .*Attention.q.weight"),
    (lambda wan: drop(wan / VAE, "decoder.up_blocks.0"), {}, "vae: 16 tensors .*decoder.up_blocks.0"),
    (lambda wan: (wan / TEXT).write_text("version https://git-lfs.github.com/spec/v1"), {}, "model.safetensors: .*git lfs pull"),
    (lambda wan: None, {"hidden_size": 256, "num_heads": 8}, "--hidden_size 256 is more than the teacher's 128"),
    (lambda wan: None, {"hidden_size": 64, "num_heads": 16}, "16 heads|--num_heads 16"),
    (lambda wan: None, {"depth": 2, "num_heads": 1, "hidden_size": 34}, "1 heads of 34 channels cannot be cut")],
    ids=["one expert missing", "twice the same expert", "experts swapped", "shard cut short", "shard absent",
         "shard of another Wan", "index promises more", "NaN", "text encoder lacks weights", "vae lacks weights",
         "text encoder is a pointer", "teacher narrower", "heads too small", "head larger"])
def test_what_cannot_be_projected_is_refused_before_anything_is_written(spoilt, flags, words, official_pipeline, finished_run,
                                                                        tmp_path):
    wan, run = tmp_path / "wan", tmp_path / "run"
    shutil.copytree(official_pipeline, wan), shutil.copytree(finished_run[0], run)
    spoilt(wan)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    settings = replace(Settings(), teacher=str(wan), output_dir=str(run), overwrite=True, report_to="none", **flags)
    with pytest.raises((OSError, ValueError), match=words) as refused:
        train(complete(settings), False, StopSignal(()))
    assert "\n" not in str(refused.value) and {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
