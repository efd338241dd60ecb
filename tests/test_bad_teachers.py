"""Teachers that cannot be projected: each gives one clear error and leaves the run to overwrite
unchanged.
"""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_TEACHER, write_official
from train_distillation import Settings, train
from wanlite.planning.resolve import complete
from wanlite.runtime.signals import StopSignal

TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
LOW, HIGH = "low_noise_model", "high_noise_model"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def official_pipeline(tmp_path_factory):
    """The tiny teacher with its experts in the official layout, three shards each, beside the components
    of a pipeline.
    """
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
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if not name.startswith(beginning)}, path
    )


@pytest.mark.parametrize(
    "damage, flags, words",
    [
        (lambda wan: shutil.rmtree(wan / HIGH), {}, "high_noise_model"),
        (copy_low, {}, "hold the same weights"),
        (swap, {}, "hold each other's weights"),
        (
            lambda wan: shards(wan, LOW)[1].write_bytes(shards(wan, LOW)[1].read_bytes()[:-100]),
            {},
            "not a complete safetensors",
        ),
        (
            lambda wan: shards(wan, LOW)[1].write_bytes(shards(wan, LOW)[1].read_bytes() + b"12"),
            {},
            ": 2 bytes too long",
        ),
        (
            lambda wan: (wan / TEXT).write_bytes((wan / TEXT).read_bytes() + b"12"),
            {},
            "text_encoder/.*: 2 bytes too long",
        ),
        (lambda wan: shards(wan, LOW)[2].unlink(), {}, "00003-of-00003.safetensors"),
        (
            lambda wan: change(shards(wan, HIGH)[1], lambda tensor: torch.cat([tensor, tensor])),
            {},
            "shard is of another Wan",
        ),
        (promise_more, {}, "blocks.4.ffn.0.weight"),
        (spoil, {}, "holds NaN or infinity"),
        (
            lambda wan: drop(wan / TEXT, "encoder.block.0.layer.0.SelfAttention.q"),
            {},
            "text_encoder: 1 tensors .*Attention.q.weight",
        ),
        (lambda wan: drop(wan / VAE, "decoder.up_blocks.0"), {}, "vae: 16 tensors .*decoder.up_blocks.0"),
        (
            lambda wan: (wan / TEXT).write_text("version https://git-lfs.github.com/spec/v1"),
            {},
            "model.safetensors: .*git lfs pull",
        ),
        (
            lambda wan: None,
            {"hidden_size": 256, "num_heads": 8},
            "--hidden_size 256 is more than the teacher's 128",
        ),
        (lambda wan: None, {"hidden_size": 64, "num_heads": 16}, "16 heads|--num_heads 16"),
        (
            lambda wan: None,
            {"depth": 2, "num_heads": 1, "hidden_size": 34},
            "1 heads of 34 channels cannot be pruned",
        ),
    ],
    ids=[
        "one expert missing",
        "twice the same expert",
        "experts swapped",
        "shard cut short",
        "shard too long",
        "text encoder too long",
        "shard absent",
        "shard of another Wan",
        "index promises more",
        "NaN",
        "text encoder lacks weights",
        "vae lacks weights",
        "text encoder is a pointer",
        "teacher narrower",
        "heads too small",
        "head larger",
    ],
)
def test_a_teacher_that_cannot_be_projected_is_refused_before_any_write(
    damage, flags, words, official_pipeline, finished_run, tmp_path
):
    wan, run = tmp_path / "wan", tmp_path / "run"
    shutil.copytree(official_pipeline, wan), shutil.copytree(finished_run[0], run)
    damage(wan)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    settings = replace(
        Settings(), teacher=str(wan), output_dir=str(run), overwrite=True, report_to="none", **flags
    )
    with pytest.raises((OSError, ValueError), match=words) as refused:
        train(complete(settings), False, StopSignal(()))
    assert (
        "\n" not in str(refused.value)
        and {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    )


# ---- --teacher, before torch: unsupported formats, folders one level away, hub names -----------------------


def refusal_of(teacher):
    """Return the one line that rejects a teacher."""
    with pytest.raises((OSError, ValueError)) as refused:
        complete(replace(Settings(), teacher=str(teacher), report_to="none"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("x_high_noise_Q4.gguf", "GGUF is not read. Take safetensors"),
        ("x.ckpt", "pickles are never opened. Take"),
        ("x.pt", "pickles"),
        ("pytorch_model-00001-of-00002.bin", "pickles"),
        ("x.onnx", "ONNX"),
        ("openvino_model.bin", "OpenVINO"),
        ("x.engine", "TensorRT"),
        ("weights.npz", "MLX"),
        ("x.mlpackage", "CoreML"),
        ("flax_model.msgpack", "Flax"),
        ("x.h5", "HDF5"),
        ("x.zip", "archives are not unpacked. Unpack it there"),
        ("x.tar.gz", "archives"),
        ("x.sft", "only *.safetensors is read"),
    ],
)
def test_an_unsupported_format_is_named_in_every_layout(name, words, tmp_path):
    for number, place in enumerate(("transformer", "low_noise_model", "unet", "diffusion_models/Wan2.2", "")):
        path = tmp_path / str(number) / place / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        assert f"found {name}: " in (printed := refusal_of(tmp_path / str(number))) and words in printed
    assert words in refusal_of(path) or "is a file; " in refusal_of(path)


@pytest.mark.parametrize(
    "key, words",
    [
        ("base_model.model.blocks.0.attn1.to_q.lora_A.weight", "this is a LoRA. Choose a text-to-video Wan"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "this is a LoRA"),
        ("blocks.0.ffn.0.hada_w1_a", "this is a LoRA"),
        ("blocks.0.attn1.to_q.qweight", "weights in 4 or 8 bits"),
        ("blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4", "weights in 4 or 8 bits"),
    ],
)
def test_safetensors_without_a_model_are_named_by_their_keys(key, words, tmp_path):
    for place in ("transformer", "high_noise_model", "diffusion_models", ""):
        (tmp_path / place).mkdir(exist_ok=True)
        save_file({key: torch.zeros(2)}, tmp_path / place / "adapter_model.safetensors")
        assert f"found adapter_model.safetensors: {words}" in refusal_of(tmp_path)
        shutil.rmtree(tmp_path / place) if place else None


@pytest.mark.parametrize(
    "typed",
    [
        ".",
        "wan/transformer",
        "wan/transformer_2",
        "wan/vae",
        "wan/text_encoder",
        "wan/tokenizer",
        "wan/transformer/config.json",
        "wan/" + VAE,
    ],
)
def test_a_teacher_one_folder_away_is_named(typed, copied):
    assert refusal_of(copied.parent / typed).endswith(
        f": not a complete teacher. Did you mean --teacher {copied}?"
    )


@pytest.mark.parametrize("place", ["ComfyUI/models", "models--org--wan/snapshots/0123abc", "a b/c"])
def test_a_teacher_several_folders_below_is_named_despite_links(place, copied):
    folder = copied.parent / "top" / place
    folder.parent.mkdir(parents=True)
    copied.rename(folder)
    (copied.parent / "top" / "loop").symlink_to(copied.parent)
    (copied.parent / "top" / ".hidden").symlink_to(folder)
    assert f"Did you mean --teacher {shlex.quote(str(folder))}?" in refusal_of(copied.parent / "top")


def test_a_folder_without_a_teacher_nearby_is_refused_by_its_own_name(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: no Wan transformer. Expected transformer/" in refusal_of(tmp_path / "empty")
    assert "/no/such/wan: no such folder" in refusal_of("/no/such/wan")
    for typed in ("outputs/wan", "models/Wan2.2-T2V-A14B"):  # a path, and no name on the hub
        assert "no such folder. Expected a Wan checkpoint" in refusal_of(typed)


@pytest.mark.parametrize("place", ["diffusion_models", "unet"])
def test_a_folder_of_experts_without_a_wan_is_described(place, tmp_path):
    deep = tmp_path / place / "a/b/c/d"
    deep.mkdir(parents=True)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / place / "flux.safetensors")
    expected = f"found {place}, and in {place}/ no Wan up to 3 folders deep: a, flux.safetensors."
    assert refusal_of(tmp_path).endswith(expected)


@pytest.fixture
def hub_cache(copied, monkeypatch):
    """The tiny teacher as org/wan in the cache of the hub, its commit under main."""
    cache = copied.parent / "hub" / "models--org--wan"
    (cache / "snapshots").mkdir(parents=True), (cache / "refs").mkdir()
    copied.rename(cache / "snapshots" / "0123abc")
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(copied.parent)
    return cache


@pytest.mark.parametrize(
    "typed",
    [
        "org/wan",
        "org/wan/",
        "https://huggingface.co/org/wan",
        "https://hf.co/org/wan/tree/main",
        "hf://org/wan",
        "hub/models--org--wan",
    ],
)
def test_a_hub_name_resolves_to_the_snapshot_in_the_cache(typed, hub_cache):
    (hub_cache / "snapshots" / "9999fff").mkdir()  # an older one
    assert complete(replace(Settings(), teacher=typed, report_to="none")).teacher == str(
        hub_cache / "snapshots" / "0123abc"
    )


def test_a_hub_name_outside_the_cache_is_refused_with_the_download_command(hub_cache):
    printed = refusal_of("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert (
        "126 GB" in printed
        and "`hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --local-dir ./Wan2.2-T2V-A14B-Diffusers`"
        in printed
    )
    assert "`hf download a/b --local-dir ./b`" in refusal_of(
        "https://huggingface.co/a/b/blob/main/config.json"
    )
    for path in ("./org/none", "hub/none", "/org/wan", "~/wan", "a/b/c"):
        assert "no such folder. Expected" in refusal_of(path)
    assert "is a URL, expected a folder" in refusal_of("https://example.com/wan.zip")


def test_a_hub_cache_with_several_snapshots_is_refused_with_its_branches(hub_cache):
    (hub_cache / "refs" / "main").rename(hub_cache / "refs" / "fp16")
    (hub_cache / "snapshots" / "9999fff").mkdir()
    assert "2 snapshots and no main one: 0123abc (fp16), 9999fff (no branch)" in refusal_of("org/wan")
    shutil.rmtree(hub_cache / "snapshots")
    assert "no snapshot in this folder" in refusal_of("org/wan")
