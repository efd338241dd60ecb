"""The pickles of an official folder convert exactly to the components of diffusers or are refused; runs
on them are the same.
"""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, TINY_TEACHER, Payload, run_script, write_official
from tests.test_resuming import train
from wanlite.data.text_encoder import load_text_encoder
from wanlite.teacher.components import (
    check_components,
    convert_components,
    find_components,
    is_converted,
    pixels_per_token,
)

TEACHER = {"in_channels": 16, "text_dim": 64}  # sizes shared with the tiny teacher's experts
SMALL = {"base_dim": 8, "num_res_blocks": 1, "z_dim": 16}
AUTOENCODERS = {  # all sizes differ, so that none can be confused
    "Wan2.1_VAE.pth": {"base_dim": 6, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "Wan2.2_VAE.pth": {
        "base_dim": 10,
        "decoder_base_dim": 16,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}


RESIDUAL_LAYERS = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
AUTOENCODER_MODULES = (  # replaced in this order
    ("down_blocks.", "downsamples."),
    ("mid_block.attentions.0", "middle.1"),
    ("mid_block.resnets.0", "middle.0"),
    ("mid_block.resnets.1", "middle.2"),
    ("norm_out", "head.0"),
    ("conv_out", "head.2"),
    ("conv_in", "conv1"),
    ("post_quant_conv", "conv2"),
    ("quant_conv", "conv1"),
)


def official_autoencoder_name(name, config):
    """Translate a diffusers name of an autoencoder's tensor to the dialect of Wan's own repository."""
    blocks, is_residual = config["num_res_blocks"], config.get("is_residual", False)

    def up(match):
        level, rest = int(match[1]), match[2]
        index = int(rest.split(".")[1]) if rest.startswith("resnets") else blocks + 1
        return (
            f"upsamples.{level}.upsamples.{index}."
            if is_residual
            else f"upsamples.{level * (blocks + 2) + index}."
        )

    name = re.sub(
        rf"({'|'.join(RESIDUAL_LAYERS)})\.(gamma|weight|bias)$",
        lambda match: f"{RESIDUAL_LAYERS[match[1]]}.{match[2]}",
        name,
    )
    name = re.sub(r"up_blocks\.(\d+)\.(resnets\.\d+|upsamplers\.0|upsampler)\.", up, name)
    if is_residual:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"downsamples.\1.downsamples.\2.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsampler\.", rf"downsamples.\1.downsamples.{blocks}.", name)
    for ours, theirs in AUTOENCODER_MODULES:
        name = name.replace(ours, theirs)
    return name


def official_text_encoder_name(name):
    for ours, theirs in (
        ("shared", "token_embedding"),
        ("encoder.final_layer_norm", "norm"),
        ("encoder.block", "blocks"),
        ("layer.0.layer_norm", "norm1"),
        ("layer.1.layer_norm", "norm2"),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention", "attn"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
        ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ):
        name = name.replace(ours, theirs)
    return name


def write_autoencoder(path, autoencoder):
    """Write an autoencoder as in the official folders; the 2.1 kind numbers the modules of a decoder
    consecutively.
    """
    torch.save(
        {
            official_autoencoder_name(name, autoencoder.config): tensor
            for name, tensor in autoencoder.state_dict().items()
        },
        path,
    )


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """One teacher in two layouts: that of diffusers and that of Wan's own repository with its pickles.

    It has the tiny teacher's experts and text encoder, and an autoencoder of Wan2.1's kind, whose statistics
    are missing in official files.
    """
    theirs, ours = (
        tmp_path_factory.mktemp("wan") / "Wan2.2-T2V-A14B",
        tmp_path_factory.mktemp("wan") / "diffusers",
    )
    torch.manual_seed(0)
    autoencoder = AutoencoderKLWan(**SMALL)
    shutil.copytree(TINY_TEACHER, ours)
    shutil.rmtree(ours / "vae")
    autoencoder.save_pretrained(ours / "vae")
    config = (
        ours / "text_encoder" / "config.json"
    )  # fixed at 128 in Wan's encoder and missing in the official files
    config.write_text(json.dumps(json.loads(config.read_text()) | {"relative_attention_max_distance": 128}))
    write_official(TINY_TEACHER, theirs)
    write_autoencoder(theirs / "Wan2.1_VAE.pth", autoencoder)
    text = load_file(TINY_TEACHER / "text_encoder" / "model.safetensors")
    torch.save(
        {
            official_text_encoder_name(name): tensor
            for name, tensor in text.items()
            if "embed_tokens" not in name
        },
        theirs / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    shutil.copytree(TINY_TEACHER / "tokenizer", theirs / "google" / "umt5-xxl")
    shutil.copyfile(TINY_TEACHER / "training.json", theirs / "training.json")
    return ours, theirs


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_official_autoencoder_converts_to_diffusers_tensor_by_tensor(name, tmp_path, layouts):
    torch.manual_seed(0)
    autoencoder = AutoencoderKLWan(**AUTOENCODERS[name])
    folder = tmp_path / "wan"
    folder.mkdir()
    write_autoencoder(folder / name, autoencoder)
    shutil.copytree(TINY_TEACHER / "tokenizer", folder / "tokenizer")
    shutil.copytree(TINY_TEACHER / "text_encoder", folder / "text_encoder")
    found = find_components(folder)
    assert [is_converted(found, part) for part in ("tokenizer", "text_encoder", "vae")] == [True, True, False]
    convert_components(found, tmp_path / "parts", lambda _: None)
    converted = AutoencoderKLWan.from_pretrained(tmp_path / "parts" / "vae")
    expected, held = autoencoder.state_dict(), converted.state_dict()
    assert expected.keys() == held.keys() and all(
        torch.equal(tensor, held[name]) for name, tensor in expected.items()
    )
    compared = {
        "base_dim",
        "z_dim",
        "dim_mult",
        "num_res_blocks",
        "is_residual",
        "in_channels",
        "out_channels",
        "patch_size",
        "temperal_downsample",
        "scale_factor_spatial",
        "scale_factor_temporal",
    }
    assert {key: converted.config[key] for key in compared} == {
        key: autoencoder.config[key] for key in compared
    }
    assert (
        len(converted.config.latents_mean) == len(converted.config.latents_std) == AUTOENCODERS[name]["z_dim"]
    )


def test_the_official_text_encoder_gives_the_embeddings_of_diffusers(layouts, tmp_path):
    ours, theirs = layouts
    convert_components(find_components(theirs), tmp_path, lambda _: None)
    (tokenizer, expected), (own_tokenizer, encoder) = (
        load_text_encoder(folder) for folder in (ours, tmp_path)
    )
    words = tokenizer(["a small red circle", "something"], padding=True, return_tensors="pt")
    assert torch.equal(
        words.input_ids,
        own_tokenizer(["a small red circle", "something"], padding=True, return_tensors="pt").input_ids,
    )
    assert torch.equal(expected(**words).last_hidden_state, encoder(**words).last_hidden_state)


@pytest.mark.slow
def test_an_official_folder_alone_trains_bitwise_the_same_student(layouts, tmp_path):
    for name, folder in zip(("ours", "theirs"), layouts):
        assert train(tmp_path / name, "--teacher", folder, "--flow_shift", "5")[0] == 0
    ours, theirs = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("ours", "theirs")
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        expected, held = load_file(tmp_path / "ours" / part), load_file(tmp_path / "theirs" / part)
        assert held.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
    assert json.loads((tmp_path / "theirs" / "run.json").read_text())["finished"]


def test_conversion_happens_once_and_again_after_a_damaged_file(layouts, tmp_path):
    printed, found = [], find_components(layouts[1])
    convert_components(found, tmp_path, printed.append)
    assert len(printed) == 2
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    convert_components(found, tmp_path, printed.append)
    assert len(printed) == 3 and "VAE" in printed[-1]


def _half(path):
    path.write_bytes(path.read_bytes()[:-5000])


def _payload(path):
    torch.save({"weight": Payload(path.parent / "executed")}, path)


def _rename(path):
    tensors = torch.load(path, weights_only=True)
    torch.save({f"x{name}": tensor for name, tensor in tensors.items()}, path)


def _one_less(path):
    tensors = torch.load(path, weights_only=True)
    tensors.pop(next(name for name in tensors if "1.norm2" in name or "middle.2.residual.0" in name))
    torch.save(tensors, path)


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
@pytest.mark.parametrize("damage", [_half, _payload, _rename, _one_less])
def test_a_broken_or_foreign_pickle_is_refused_and_never_run(damage, name, layouts, tmp_path):
    shutil.copytree(layouts[1], tmp_path / "wan")
    damage(tmp_path / "wan" / name)
    with pytest.raises((OSError, ValueError), match=f"{name}.*Download it again"):
        convert_components(find_components(tmp_path / "wan"), tmp_path / "parts", lambda _: None)
    assert not (tmp_path / "wan" / "executed").exists()


LFS, PAGE = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46184\n",
    b"\n<html>not found</html>",
)


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
@pytest.mark.parametrize(
    "content, words",
    [
        (LFS, "it is a git-lfs pointer: run `git lfs pull`"),
        (PAGE, "it is a web page: download the file again"),
    ],
)
def test_an_incomplete_download_in_place_of_a_pickle_is_named(content, words, name, layouts, tmp_path):
    shutil.copytree(layouts[1], tmp_path / "wan")
    (tmp_path / "wan" / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name}: {words}"):
        convert_components(find_components(tmp_path / "wan"), tmp_path / "parts", lambda _: None)


@pytest.mark.parametrize(
    "content, words",
    [
        (LFS, "vae/config.json: it is a git-lfs pointer"),
        (b"[" * 100_000, "vae/config.json: not JSON .nested too deeply.. Download it again"),
    ],
)
def test_an_unreadable_config_is_named(content, words, copied):
    (copied / "vae/config.json").write_bytes(content)
    with pytest.raises(OSError, match=words):
        pixels_per_token(copied / "vae")


TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"


def shard(wan):
    """Store the text encoder in two shards with an index."""
    tensors = load_file(wan / TEXT)
    (wan / TEXT).unlink()
    weight_map = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        save_file(part, wan / "text_encoder" / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (wan / "text_encoder/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def without(path, beginning):
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if not name.startswith(beginning)}, path
    )


def test_complete_components_match_their_teacher(copied):
    for _ in ("one file", "shards"):
        check_components(find_components(copied), TEACHER)
        assert load_text_encoder(copied)
        shard(copied) if (copied / TEXT).exists() else None


@pytest.mark.parametrize(
    "damage, words",
    [
        *(
            (
                lambda wan, name=name: (wan / name).write_bytes(LFS),
                f"{name}: it is a git-lfs pointer: run `git lfs pull`",
            )
            for name in (
                TEXT,
                VAE,
                "tokenizer/tokenizer.json",
                "tokenizer/tokenizer_config.json",
                "text_encoder/config.json",
            )
        ),
        *(
            (
                lambda wan, name=name: _half(wan / name),
                f"{name}: not a complete safetensors file .*Download it again",
            )
            for name in (TEXT, VAE)
        ),
        (lambda wan: (wan / VAE).write_bytes(PAGE), f"{VAE}: it is a web page: download the file again"),
        (
            lambda wan: (shard(wan), (wan / "text_encoder/model-00002-of-00002.safetensors").unlink()),
            "text_encoder: shard model-00002-of-00002.safetensors is missing, model.safetensors.index.json "
            "promises it .1 of 2",
        ),
        (
            lambda wan: (shard(wan), _half(wan / "text_encoder/model-00002-of-00002.safetensors")),
            "model-00002-of-00002.safetensors: not a complete safetensors file",
        ),
        (
            lambda wan: (
                shard(wan),
                edit(wan / "text_encoder/model.safetensors.index.json", weight_map={"x": "../x"}),
            ),
            "model.safetensors.index.json: has no weight_map of tensors and files beside it",
        ),
        (
            lambda wan: (wan / TEXT).rename(wan / "text_encoder/model.fp16.safetensors"),
            "text_encoder: lacks model.safetensors; found model.fp16.safetensors. Download it; one in "
            "another precision",
        ),
        (
            lambda wan: (wan / VAE).unlink(),
            "vae: lacks diffusion_pytorch_model.safetensors; found no weights",
        ),
        (
            lambda wan: (wan / VAE).rename(wan / "vae/diffusion_pytorch_model.fp16.safetensors"),
            "found diffusion_pytorch_model.fp16",
        ),
        (lambda wan: (wan / "tokenizer/tokenizer.json").unlink(), "tokenizer: lacks tokenizer.json"),
        (
            lambda wan: (
                (wan / "tokenizer/tokenizer.json").unlink(),
                (wan / "tokenizer/spiece.model").write_bytes(LFS),
            ),
            "spiece.model: it is a git-lfs pointer",
        ),
        (
            lambda wan: without(wan / VAE, "decoder.up_blocks.0."),
            "vae: 16 tensors differ from those that its sizes imply, first decoder.up",
        ),
        (
            lambda wan: without(wan / TEXT, "encoder.block.1.layer.0.SelfAttention.q"),
            "text_encoder: 1 tensors .*Attention.q.weight",
        ),
        (
            lambda wan: edit(wan / "text_encoder/config.json", num_layers=10**7),
            "text_encoder/config.json: num_layers is 10000000",
        ),
        (
            lambda wan: edit(wan / "text_encoder/config.json", num_heads=0),
            "text_encoder/config.json: does not describe a Wan's text_encoder",
        ),
        (
            lambda wan: (wan / "tokenizer/tokenizer.json").write_text("{}"),
            "tokenizer/tokenizer.json: has no model",
        ),
        *(
            (
                lambda wan, name=name, values=values: edit(wan / "vae/config.json", **{name: values}),
                f"vae/config.json: {name} is .*, expected 16 finite numbers.*, one for each latent channel. "
                f"Download it again",
            )
            for name, values in (
                ("latents_mean", ["x"] * 16),
                ("latents_mean", [0.0] * 15),
                ("latents_mean", [float("nan")] * 16),
                ("latents_std", [0] * 16),
                ("latents_std", None),
            )
        ),
        (
            lambda wan: edit(wan / "vae/config.json", dim_mult="x"),
            "vae/config.json: does not describe a Wan's vae",
        ),
    ],
)
def test_an_incomplete_component_is_refused_before_a_run_with_its_file(damage, words, copied):
    damage(copied)
    with pytest.raises((OSError, ValueError), match=words) as refused:
        check_components(find_components(copied), TEACHER)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "damage", [_half, lambda path: path.write_bytes(LFS), lambda path: path.write_bytes(b"")]
)
def test_an_incomplete_pickled_text_encoder_is_refused_before_a_run(damage, layouts, tmp_path):
    shutil.copytree(layouts[1], tmp_path / "wan")
    check_components(find_components(tmp_path / "wan"), TEACHER)
    damage(tmp_path / "wan/models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(
        OSError, match="models_t5_umt5-xxl-enc-bf16.pth: (not a complete file|it is a git-lfs pointer)"
    ):
        check_components(find_components(tmp_path / "wan"), TEACHER)


def test_a_dry_run_reports_an_incomplete_component(copied):
    (copied / TEXT).write_bytes(LFS)
    process = run_script(
        ROOT / "train_distillation.py", "--dry_run", "--teacher", copied, "--output_dir", copied / "run"
    )
    assert process.returncode == 2 and f"{TEXT}: it is a git-lfs pointer" in process.stderr, process.stderr
    assert "Traceback" not in process.stderr


def test_all_missing_components_are_named_at_once(layouts, tmp_path):
    shutil.copytree(layouts[1], tmp_path / "wan")
    (tmp_path / "wan" / "Wan2.1_VAE.pth").unlink()
    shutil.rmtree(tmp_path / "wan" / "google")
    with pytest.raises(OSError, match="tokenizer.*google.*vae.*Wan2.1_VAE.pth"):
        find_components(tmp_path / "wan")
