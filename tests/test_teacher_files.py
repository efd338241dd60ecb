"""Opening a Wan folder: every layout, both dialects, fp8, real shapes; and broken ones."""

import json
import os
import re
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import (
    A14B,
    TI2V_5B,
    TINY_TEACHER,
    WAN_1_3B,
    change,
    official_name,
    weights_of,
    write_sparse_wan,
)
from wanlite.teacher import expert_files as expert_files_module
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.keys import diffusers_name


@pytest.fixture(scope="module")
def stock():
    return {
        name: WanTransformer3DModel.from_pretrained(TINY_TEACHER / folder).eval()
        for name, folder in (("high", "transformer"), ("low", "transformer_2"))
    }


def test_every_diffusers_name_survives_the_round_trip_to_the_official_dialect(stock):
    names = list(stock["high"].state_dict())
    official = [official_name(name) for name in names]
    assert len(set(official)) == len(names) == 27 * 4 + 15
    assert [diffusers_name(name) for name in official] == names == [diffusers_name(name) for name in names]
    assert diffusers_name("blocks.3.norm3.weight") == "blocks.3.norm2.weight"
    assert diffusers_name("head.modulation") == "scale_shift_table"


@pytest.mark.parametrize(
    "name, other",
    [
        ("img_emb.proj.0.weight", "image-to-video"),
        ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
        ("condition_embedder.image_embedder.norm1.weight", "image-to-video"),
        ("blocks.0.attn2.add_k_proj.bias", "image-to-video"),
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("audio_injector.injector.0.k.weight", "speech-to-video"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
        ("control_adapter.conv.weight", "Fun Control"),
        ("blocks.0.self_attn.q.lora_A.weight", "LoRA"),
    ],
)
def test_a_tensor_of_another_kind_of_wan_is_refused_with_its_kind(name, other):
    with pytest.raises(ValueError, match=f"{name}.*belongs to .*{other}"):
        diffusers_name(name)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn3.to_q.weight", "xblocks.0.modulation", "img_emb.proj.0.weight", ""]
)
def test_an_unknown_tensor_name_is_an_error(name):
    with pytest.raises(ValueError, match="does not belong to a text-to-video Wan"):
        diffusers_name(name)


def wrap(path, prefix, infix):
    """Rename the tensors of a file as wrappers around the network and around its blocks do."""
    save_file(
        {
            prefix + re.sub(r"^(blocks\.\d+\.)", rf"\g<1>{infix}", name): tensor
            for name, tensor in load_file(path).items()
        },
        path,
    )


WRAPPERS = [
    ("model.", ""),
    ("module.", ""),
    ("_orig_mod.", ""),
    ("diffusion_model.", ""),
    ("model.diffusion_model.", ""),
    ("transformer.", ""),
    ("pipe.dit.", ""),
    ("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    ("net.", "module."),
    ("module._orig_mod.module.", "_orig_mod."),
    ("", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
    ("blocks.", ""),
]


@pytest.mark.parametrize("prefix, infix", WRAPPERS)
def test_wrapper_prefixes_in_the_names_of_an_expert_are_stripped(prefix, infix, copied, official_copy):
    exact = open_teacher_files(TINY_TEACHER).experts["low"]
    for wan, folder in ((copied, "transformer_2"), (official_copy, "low_noise_model")):
        for path in (wan / folder).glob("*.safetensors"):
            wrap(path, prefix, infix)
        for path in (wan / folder).glob(
            "*.index.json"
        ):  # the index was written by the wrapped network, or is missing
            path.unlink()
        found = open_teacher_files(wan).experts["low"]
        assert found.places.keys() == exact.places.keys()
        assert all(
            torch.equal(found.read(name), exact.read(name))
            for name in ("proj_out.bias", "blocks.2.norm2.weight")
        )


@pytest.mark.parametrize(
    "break_it, words",
    [
        (
            lambda tensors: {
                f"{prefix}.{name}": tensor.clone()
                for name, tensor in tensors.items()
                for prefix in ("model", "ema")
            },
            "transformer: holds 2 networks, under 'ema.', 'model.', expected one. Keep each in a file of its "
            "own",
        ),
        (
            lambda tensors: tensors | {"_orig_mod.proj_out.bias": tensors["proj_out.bias"].clone()},
            "holds proj_out.bias twice, as ",
        ),
        (
            lambda tensors: (
                {f"model.{name}": tensor for name, tensor in tensors.items()}
                | {"vae.conv1.bias": torch.zeros(1)}
            ),
            "'vae.conv1.bias' does not belong to",
        ),
        (
            lambda tensors: {
                f"model.{name}": tensor for name, tensor in tensors.items() if name != "proj_out.bias"
            },
            r"missing \['proj_out.bias'\]",
        ),
    ],
)
def test_names_with_mixed_wrapper_prefixes_are_refused(break_it, words, copied):
    path = weights_of(copied / "transformer")
    save_file(break_it(load_file(path)), path)
    with pytest.raises(ValueError, match=words):
        open_teacher_files(copied)


def hide_files_in(folder):
    """Add the hidden files of macOS, notebooks and the hub to every folder."""
    for place in (folder, *[path for path in folder.rglob("*") if path.is_dir()]):
        for path in [path for path in place.iterdir() if path.is_file()]:
            (place / f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(4092))
        for name in (
            ".DS_Store",
            "._x.incomplete",
            "._x.safetensors.index.json",
            "._models_t5_x.pth",
            "._spiece.model",
            ".ipynb_checkpoints/wan_high_noise.safetensors",
            ".cache/huggingface/download/x.incomplete",
        ):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"<")


def test_hidden_files_are_not_files_of_a_teacher(copied, official_copy):
    for wan in (copied, official_copy):
        before = open_teacher_files(wan).fingerprint
        hide_files_in(wan)
        assert open_teacher_files(wan).fingerprint == before


@pytest.mark.parametrize(
    "extra, words",
    [
        (b"x", "1 byte too long: its tensors end at byte"),
        (bytes(4096), "4,096 bytes too long"),
        (-1, r"not a complete safetensors file .1 byte too short: its tensors end at byte"),
        (-2000, "2,000 bytes too short"),
    ],
)
def test_a_file_that_is_too_long_or_too_short_is_refused_by_how_much(extra, words, copied):
    path = weights_of(copied / "transformer_2")
    path.write_bytes(path.read_bytes() + extra if isinstance(extra, bytes) else path.read_bytes()[:extra])
    with pytest.raises(OSError, match=f"model.safetensors: .*{words}.*Download it again"):
        open_teacher_files(copied)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"GGUF\3", "it is GGUF, .*download the safetensors file"),
        (b"PK\3\4", "it is a pickle, .*download the safetensors file"),
        (b"\x80\2", "it is a pickle"),
        (b"7z\xbc\xaf'\x1c", "it is a 7z archive, .*unpack it"),
        (b"\x1f\x8b\x08", "it is a gzip archive"),
    ],
)
def test_another_format_named_safetensors_is_recognised_by_its_first_bytes(content, words, copied):
    weights_of(copied / "transformer").write_bytes(content + bytes(100))
    with pytest.raises(OSError, match=f"model.safetensors: {words}"):
        open_teacher_files(copied)


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "break_it, error, words",
    [
        (lambda wan: shutil.rmtree(wan), OSError, "no such folder"),
        (lambda wan: shutil.rmtree(wan / "transformer_2"), OSError, "transformer_2/ is missing"),
        (
            lambda wan: [shutil.rmtree(wan / name) for name in ("transformer", "transformer_2")],
            OSError,
            "is missing",
        ),
        (lambda wan: (wan / "transformer/config.json").unlink(), OSError, "config.json: missing"),
        (lambda wan: (wan / "transformer/config.json").write_text("{}"), ValueError, "lacks dim"),
        (lambda wan: weights_of(wan / "transformer").unlink(), OSError, "holds no .safetensors"),
        (
            lambda wan: weights_of(wan / "transformer").rename(wan / "transformer/x.gguf"),
            OSError,
            "found x.gguf: GGUF is not read",
        ),
        (
            lambda wan: weights_of(wan / "transformer").write_bytes(
                weights_of(wan / "transformer").read_bytes()[:5000]
            ),
            OSError,
            "not a complete safetensors",
        ),
        (
            lambda wan: (wan / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"proj_out.bias": "absent.safetensors"}})
            ),
            OSError,
            "absent.safetensors is missing",
        ),
        (
            lambda wan: (wan / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"proj_out.bias": "../x.safetensors"}})
            ),
            ValueError,
            "expected a file beside it",
        ),
        (
            lambda wan: (wan / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(
                '{"weight_map": null}'
            ),
            ValueError,
            "no weight_map",
        ),
        (
            lambda wan: shutil.copy(weights_of(wan / "transformer"), wan / "transformer/stale.safetensors"),
            ValueError,
            "occurs in diffusion_pytorch_model.safetensors and in stale.safetensors",
        ),
        (
            lambda wan: (wan / "model_index.json").write_text('{"boundary_ratio": 875}'),
            ValueError,
            "boundary_ratio is 875",
        ),
        (
            lambda wan: weights_of(wan / "transformer").write_bytes(
                weights_of(wan / "transformer").read_bytes()[:-1]
            ),
            OSError,
            "not a complete safetensors",
        ),
        (
            lambda wan: (wan / "transformer_2/xyz.safetensors.incomplete").touch(),
            OSError,
            "xyz.safetensors.incomplete is an unfinished download",
        ),
        (
            lambda wan: (wan / "transformer_2/xyz.safetensors.aria2").touch(),
            OSError,
            "xyz.safetensors.aria2 is an unfinished download",
        ),
        (
            lambda wan: weights_of(wan / "transformer").rename(
                wan / "transformer/x-00002-of-00003.safetensors"
            ),
            OSError,
            "shard x-00001-of-00003.safetensors is missing.*2 of 3",
        ),
        (
            lambda wan: edit_config(wan / "transformer", in_channels=36),
            ValueError,
            "has 36 channels in and 16 out, as an image-to-video",
        ),
        (
            lambda wan: change(
                wan / "transformer", lambda tensors: tensors.update({"img_emb.proj.0.bias": torch.zeros(8)})
            ),
            ValueError,
            "model.safetensors.*img_emb.proj.0.bias.*image-to-video",
        ),
        *(
            (
                lambda wan, dtype=dtype: change(
                    wan / "transformer",
                    lambda tensors: tensors.update({"proj_out.bias": tensors["proj_out.bias"].to(dtype)}),
                ),
                ValueError,
                f"proj_out.bias is stored as {found}, expected one of",
            )
            for dtype, found in (
                (torch.float64, "F64"),
                (torch.int8, "I8"),
                (torch.uint8, "U8"),
                (torch.bool, "BOOL"),
            )
        ),
    ],
)
def test_a_broken_teacher_folder_is_refused_with_its_reason(copied, break_it, error, words):
    break_it(copied)
    with pytest.raises(error, match=words):
        open_teacher_files(copied)


DEEP = "[" * 100_000
LFS, PAGE = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46184\n",
    b"<!DOCTYPE html><html>not found</html>",
)


@pytest.mark.parametrize(
    "layout, name, value, words",
    [
        *(
            ("diffusers", name, value, f"{name} is {found}, expected a whole number from 1 to")
            for name, value, found in (
                ("num_attention_heads", 0, "0"),
                ("num_attention_heads", "4", "'4'"),
                ("ffn_dim", [1], r"\[1\]"),
                ("num_layers", 4.0, "4.0"),
                ("num_layers", 10_000_000, "10000000"),
                ("in_channels", True, "True"),
                ("text_dim", -1, "-1"),
                ("freq_dim", 10**90, "10+"),
                ("rope_max_seq_len", None, "None"),
            )
        ),
        ("diffusers", "patch_size", None, "patch_size is None, expected frames, height and width"),
        ("diffusers", "patch_size", 5, "patch_size is 5, expected frames"),
        ("diffusers", "eps", "x", "eps is 'x', expected a number"),
        ("diffusers", "attention_head_dim", 33, "attention_head_dim is 33, expected an even number"),
        ("diffusers", "qk_norm", None, "qk_norm is None, expected 'rms_norm_across_heads'"),
        ("official", "num_heads", 0, "num_heads is 0, expected a whole number"),
        ("official", "dim", "128", "dim is '128', expected"),
        ("official", "num_heads", 3, "dim is 128, expected a multiple of num_heads .3."),
        ("official", "eps", float("nan"), "eps is nan, expected a number"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(layout, name, value, words, copied, official_copy):
    wan, expert = (copied, "transformer") if layout == "diffusers" else (official_copy, "high_noise_model")
    edit_config(wan / expert, **{name: value})
    with pytest.raises(ValueError, match=f"{expert}/config.json: {words}.*Download it again") as refused:
        open_teacher_files(wan)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["num_layers", "num_attention_heads", "text_dim"])
def test_a_size_missing_in_the_config_is_not_guessed(name, copied):
    path = copied / "transformer/config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: lacks {name},"):
        open_teacher_files(copied)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


SHARD, SHARD_INDEX = (
    "transformer_2/diffusion_pytorch_model.safetensors",
    "transformer/x.safetensors.index.json",
)


@pytest.mark.parametrize(
    "name, how, words",
    [
        *(
            (name, lambda path: path.write_text(DEEP), "not JSON .nested too deeply.. Download it again")
            for name in ("transformer/config.json", "model_index.json", SHARD_INDEX)
        ),
        *(
            (name, lambda path: path.write_bytes(LFS), "it is a git-lfs pointer: run `git lfs pull`")
            for name in (SHARD, "transformer/config.json", SHARD_INDEX)
        ),
        (SHARD, lambda path: path.write_bytes(PAGE), "it is a web page: download the file again"),
        (SHARD, replace_by_pipe, "not a regular file"),
        ("transformer/config.json", replace_by_pipe, "not a regular file"),
        (
            SHARD,
            replace_by_dangling_link,
            "cannot be read .No such file or directory.. Expected a regular file",
        ),
    ],
)
def test_an_incomplete_download_in_place_of_a_file_is_named(name, how, words, copied):
    how(copied / name)
    with pytest.raises(OSError, match=f"{name}: {words}") as refused:
        open_teacher_files(copied)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content, words", [(LFS, "git lfs pull"), (PAGE, "web page"), (b"", "not a complete safetensors file")]
)
def test_a_single_file_of_another_format_is_named_by_its_format(content, words, tmp_path):
    (tmp_path / "diffusion_models").mkdir()
    (tmp_path / "diffusion_models/wan.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=f"wan.safetensors: .*{words}"):
        open_teacher_files(tmp_path)


def test_experts_of_two_sizes_are_refused(copied):
    config = json.loads((copied / "transformer_2/config.json").read_text())
    WanTransformer3DModel(
        **{name: value for name, value in config.items() if not name.startswith("_")} | {"num_layers": 3}
    ).save_pretrained(copied / "transformer_2")
    with pytest.raises(ValueError, match="differ in size"):
        open_teacher_files(copied)


def test_a_shard_of_another_wan_is_refused(copied):
    config = json.loads((copied / "transformer_2/config.json").read_text())
    (copied / "transformer_2/config.json").write_text(json.dumps(config | {"ffn_dim": 64}))
    with pytest.raises(ValueError, match="of another Wan"):
        open_teacher_files(copied)


def test_a_tensor_of_the_index_that_no_shard_has_is_refused_by_name(official_copy):
    path = official_copy / "low_noise_model/diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    shard = official_copy / "low_noise_model" / weight_map["blocks.2.ffn.0.weight"]
    tensors = load_file(shard)
    del tensors["blocks.2.ffn.0.weight"]
    save_file(tensors, shard)
    with pytest.raises(
        ValueError, match=f"index promises blocks.2.ffn.0.weight in {shard.name}, no shard holds it"
    ):
        open_teacher_files(official_copy)


def test_a_tensor_in_another_shard_than_in_the_index_is_found(official_copy):
    path = official_copy / "low_noise_model/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    before = open_teacher_files(official_copy).experts["low"]
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][moved] = second
    path.write_text(json.dumps(index))
    after = open_teacher_files(official_copy).experts["low"]
    assert after.places == before.places and after.places[diffusers_name(moved)][0].name == first


def test_a_wider_shard_among_the_shards_is_refused_by_name(official_copy):
    shard = sorted((official_copy / "high_noise_model").glob("*.safetensors"))[1]
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(ValueError, match=f"{shard.name}: .*The shard is of another Wan"):
        open_teacher_files(official_copy)


def test_teachers_have_different_fingerprints(copied):
    before = open_teacher_files(copied).fingerprint
    assert before == open_teacher_files(TINY_TEACHER).fingerprint
    high, low = copied / "transformer", copied / "transformer_2"
    high.rename(copied / "x"), low.rename(high), (copied / "x").rename(low)
    assert open_teacher_files(copied).fingerprint != before


# ---- rows and fp8 ------------------------------------------------------------------------------------------

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LAYER = "blocks.1.ffn.net.0.proj"


@pytest.mark.parametrize("rows", [slice(3, 7), slice(0, 1), slice(500, 512), slice(None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_read_alone_equal_the_rows_of_the_full_tensor(rows, dtype):
    expert = open_teacher_files(TINY_TEACHER).experts["low"]
    for name in (f"{LAYER}.weight", f"{LAYER}.bias"):
        found = expert.read(name, dtype, rows)
        assert found.dtype == dtype and torch.equal(found, expert.read(name, dtype)[rows])


class Conversions(TorchDispatchMode):
    """Lists the (device, dtype) of tensors that are moved or cast."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten._to_copy:
            self.results.append((found.device.type, found.dtype))
        return found


def test_a_tensor_is_moved_as_it_is_stored_and_cast_on_the_device(monkeypatch):
    expert = open_teacher_files(TINY_TEACHER).experts["low"]
    stored = expert.read(f"{LAYER}.weight", None).dtype
    monkeypatch.setattr(
        expert_files_module, "find_non_finite", lambda tensors: []
    )  # meta tensors have no values
    with Conversions() as conversions:
        expert.read(f"{LAYER}.weight", torch.float64, device="meta")
    assert conversions.results == [("meta", stored), ("meta", torch.float64)]


def test_rows_are_read_without_the_rest_of_the_tensor(monkeypatch):
    expert, opened = open_teacher_files(TINY_TEACHER).experts["low"], expert_files_module.safe_open

    class OnlySlices:
        def __init__(self, *arguments):
            self.file = opened(*arguments)

        def __enter__(self):
            self.get_slice = self.file.__enter__().get_slice
            return self

        def __exit__(self, *arguments):
            return self.file.__exit__(*arguments)

    monkeypatch.setattr(expert_files_module, "safe_open", OnlySlices)
    assert expert.read(f"{LAYER}.weight", rows=slice(3, 5)).shape == (2, 128)


def quantize(tensors, layer, dtype, scale, kind, marks=()):
    """Store a layer's weight in fp8 beside its scale and ComfyUI's other tensors; return the exact value
    weight.float() * scale.
    """
    weight = tensors[f"{layer}.weight"] / (1 if scale is None else scale.reshape(-1, 1))
    tensors[f"{layer}.weight"] = weight.to(dtype)
    if scale is not None:
        tensors[f"{layer}.{kind}"] = scale
    tensors |= {f"{layer}.{mark}": torch.ones(()) for mark in marks if mark != "comfy_quant"}
    if "comfy_quant" in marks:
        tensors[f"{layer}.comfy_quant"] = torch.tensor(
            list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
        )


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(
    "prefix, dialect", [("", "diffusers"), ("", "official"), ("model.diffusion_model.", "official")]
)
@pytest.mark.parametrize(
    "kind, marks, scale",
    [
        (None, (), None),
        ("scale_weight", (), torch.tensor(0.0625)),
        ("scale_weight", ("scale_input",), torch.tensor([0.03])),
        ("scale_weight", (), torch.linspace(0.1, 1, 512)),
        ("scale_weight", (), torch.linspace(0.1, 1, 512)[:, None]),
        ("weight_scale", ("input_scale", "comfy_quant"), torch.tensor(0.03)),
        ("weight_scale", ("comfy_quant",), torch.linspace(0.1, 1, 512)),
    ],
)
def test_a_weight_in_fp8_is_its_stored_value_times_its_scale(
    copied, dtype, prefix, dialect, kind, marks, scale
):
    def store(tensors):
        quantize(tensors, LAYER, dtype, scale, kind, marks)
        if kind == "scale_weight":
            tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
        renamed = {
            prefix + (official_name(name) if dialect == "official" else name): tensor
            for name, tensor in tensors.items()
        }
        wanted.append(tensors[f"{LAYER}.weight"].float() * (1 if scale is None else scale.reshape(-1, 1)))
        tensors.clear(), tensors.update(renamed)

    wanted = []
    change(copied / "transformer_2", store)
    expert = open_teacher_files(copied).experts["low"]
    assert expert.places.keys() == open_teacher_files(TINY_TEACHER).experts["low"].places.keys()
    assert torch.equal(expert.read(f"{LAYER}.weight"), wanted[0])
    assert torch.equal(expert.read(f"{LAYER}.weight", torch.bfloat16, slice(5, 9)), wanted[0][5:9].bfloat16())


def test_shards_may_differ_in_precision_and_separate_a_weight_from_its_scale(official_copy):
    folder = official_copy / "low_noise_model"
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    first, second, third = sorted(folder.glob("*.safetensors"))
    save_file({name: tensor.half() for name, tensor in load_file(first).items()}, first)
    weights = load_file(second)
    name = next(name for name in sorted(weights) if "_attn" in name and weights[name].ndim == 2)
    weights[name] = (weights[name] / 0.01).to(torch.float8_e4m3fn)
    save_file(weights, second)
    save_file(
        {key: tensor.bfloat16() for key, tensor in load_file(third).items()}
        | {name.replace(".weight", ".scale_weight"): torch.tensor(0.01)},
        third,
    )
    found, exact = (
        open_teacher_files(official_copy).experts["low"],
        open_teacher_files(TINY_TEACHER).experts["low"],
    )
    for name in exact.places:
        assert (found.read(name) - exact.read(name)).norm() <= 0.05 * exact.read(name).norm()


@pytest.mark.parametrize(
    "extra, words",
    [
        ({f"{LAYER}.scale_weight": torch.tensor(float("nan"))}, f"scale of {LAYER}.weight holds nan"),
        ({f"{LAYER}.weight_scale": torch.tensor(float("inf"))}, f"scale of {LAYER}.weight holds inf"),
        ({f"{LAYER}.weight_scale": torch.tensor(0.0)}, f"scale of {LAYER}.weight holds 0.0"),
        (
            {f"{LAYER}.weight_scale": torch.ones(512, 4)},
            f"scale of {LAYER}.weight is torch.float32 .512, 4.*one a row .512",
        ),
        (
            {f"{LAYER}.weight_scale": torch.ones(512, dtype=torch.uint8)},
            f"scale of {LAYER}.weight is torch.uint8",
        ),
        (
            {"blocks.9.ffn.2.scale_weight": torch.tensor(1.0)},
            "scale of blocks.9.ffn.net.2.weight but no such weight",
        ),
        ({"blocks.0.ffn.9.scale_weight": torch.tensor(1.0)}, "blocks.0.ffn.9.weight' does not belong to"),
    ],
)
def test_an_impossible_scale_is_refused_by_name(copied, extra, words):
    change(copied / "transformer_2", lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match=words):
        open_teacher_files(copied)


# ---- real shapes -------------------------------------------------------------------------------------------

NONE = [None, None]
MODULE = ["diffusers", "WanTransformer3DModel"]


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize(
    "model, num_experts, num_shards, num_parameters, num_tensors",
    [
        (A14B, 2, {"official": 6, "diffusers": 12}, 14_288_491_584, 1095),
        (A14B, 1, {"official": 6, "diffusers": 12}, 14_288_491_584, 1095),
        (WAN_1_3B, 1, {"official": 1, "diffusers": 2}, 1_418_996_800, 825),
        (TI2V_5B, 1, {"official": 3, "diffusers": 3}, 4_999_787_712, 825),
    ],
    ids=["2.2-A14B", "2.1-14B", "2.1-1.3B", "2.2-5B"],
)
def test_every_wan_opens_at_its_real_shape(
    model, num_experts, num_shards, num_parameters, num_tensors, layout, tmp_path
):
    folders = {
        ("official", 2): ["high_noise_model", "low_noise_model"],
        ("official", 1): ["."],
        ("diffusers", 2): ["transformer", "transformer_2"],
        ("diffusers", 1): ["transformer"],
    }[layout, num_experts]
    for name in folders:
        write_sparse_wan(tmp_path / "wan" / name, model, layout, num_shards[layout])
    if layout == "diffusers":
        (tmp_path / "wan/model_index.json").write_text(
            json.dumps(
                {
                    "_class_name": "WanPipeline",
                    "transformer": MODULE,
                    "transformer_2": MODULE if num_experts == 2 else NONE,
                    "boundary_ratio": 0.875 if num_experts == 2 else None,
                    "expand_timesteps": model is TI2V_5B,
                }
            )
        )
    files = open_teacher_files(tmp_path / "wan")
    assert (files.layout, files.boundary) == (layout, 0.875 if num_experts == 2 else None)
    assert list(files.experts) == (["high", "low"] if num_experts == 2 else ["only"])
    for expert in files.experts.values():
        assert (expert.num_parameters, len(expert.places), expert.width) == (
            num_parameters,
            num_tensors,
            model["width"],
        )
    assert files.config["in_channels"] == model["channels"] and files.config["patch_size"] == (1, 2, 2)
