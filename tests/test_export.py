"""The export for ComfyUI: exact round trip, complete metadata, a consistent workflow, refusals of one line."""

import json
import re
import tomllib
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open

from tests.conftest import ROOT, loud_student, official_name
from wanlite.export.__main__ import main
from wanlite.export.comfyui import FP8_MARK, SCALED
from wanlite.flow import make_scheduler
from wanlite.teacher import keys
from wanlite.teacher.checkpoint import open_teacher_files

SHAPE = {"hidden_size": 128, "depth": 2, "num_heads": 1, "ffn_dim": 256}
STEPS = (4, 2, 1)


def save_run(folder, **config):
    """Save a student of few steps as a run; returns it."""
    student = loud_student(**SHAPE | config)
    student.save_pretrained(folder)
    make_scheduler(3.0, STEPS).save_pretrained(folder / "scheduler")
    run = {
        "schedule": {"few_steps": list(STEPS), "flow_shift": 3.0},
        "resolution": [128, 64],
        "num_inference_steps": 4,
        "validation_prompts": ["a red kite"],
    }
    (folder / "run.json").write_text(json.dumps(run))
    return student


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "student"
    return folder, save_run(folder)


needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="needs gguf")


def run_export(folder, output, *flags):
    main([str(folder), "--output", str(output), *flags])
    return json.loads(output.with_suffix(".json").read_text())


def read_expert(output):
    """Return {diffusers' name: tensor} and the config of a single file, by the teacher's reader."""
    expert = open_teacher_files(output.parent).experts["only"]
    return {name: expert.read(name) for name in expert.places}, expert.config


def test_official_names_reverse_the_names_of_diffusers(saved):
    names = saved[1].state_dict().keys()
    assert all(keys.diffusers_name(keys.official_name(name)) == name for name in names)
    assert [keys.official_name(name) for name in names] == [official_name(name) for name in names]
    with pytest.raises(ValueError, match="'blocks.0.attn3.to_q.weight' does not belong"):
        keys.official_name("blocks.0.attn3.to_q.weight")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_exported_student_is_read_back_exactly_by_the_reader_of_teachers(saved, dtype, tmp_path):
    run_export(saved[0], tmp_path / "student.safetensors", "--dtype", dtype)
    tensors, config = read_expert(tmp_path / "student.safetensors")
    expected = saved[1].state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)).to(tensor.dtype)), name
    shared = ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "ffn_dim", "num_layers")
    assert {name: config[name] for name in shared} == {name: saved[1].config[name] for name in shared}


def test_a_float8_export_scales_the_matrices_of_the_blocks_only(saved, tmp_path):
    output = tmp_path / "student.safetensors"
    run_export(saved[0], output, "--dtype", "float8")
    with safe_open(output, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    scaled = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} - {FP8_MARK}
    assert len(scaled) == SHAPE["depth"] * 10 and all(name.endswith(SCALED) for name in scaled)
    tensors, _ = read_expert(output)
    for name, weight in saved[1].state_dict().items():
        error = (tensors[name].float() - weight).abs().max() / weight.abs().max().clamp(min=1e-6)
        assert error < (0.04 if keys.official_name(name) in scaled else 0.004), name


def test_metadata_and_workflow_have_the_noise_levels_of_the_scheduler(saved, tmp_path):
    output = tmp_path / "student.safetensors"
    workflow = run_export(saved[0], output)
    scheduler = make_scheduler(3.0, STEPS)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "wan2.1" and metadata["modelspec.resolution"] == "128x64"
    for count in STEPS:
        scheduler.set_timesteps(count)
        levels = torch.tensor([float(level) for level in metadata[f"wanlite.sigmas.{count}"].split(", ")])
        assert torch.equal(levels, scheduler.sigmas) and levels[-1] == 0
    widgets = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    assert widgets["ManualSigmas"] == [metadata["wanlite.sigmas.4"]]
    assert widgets["UNETLoader"] == ["student.safetensors", "default"]
    assert widgets["EmptyHunyuanLatentVideo"] == [128, 64, 1, 1] and widgets["KSamplerSelect"] == ["euler"]
    assert widgets["CLIPTextEncode"] == ["a red kite"] and widgets["CLIPLoader"][1] == "wan"
    assert all(metadata[f"wanlite.sigmas.{count}"] in widgets["Note"][0] for count in STEPS)


def test_links_of_the_workflow_join_outputs_and_inputs_of_one_type(saved, tmp_path):
    workflow = run_export(saved[0], tmp_path / "student.safetensors", "--num_inference_steps", "2")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) == workflow["last_node_id"]
    assert len(workflow["links"]) == workflow["last_link_id"] == 11
    for number, source, output, target, slot, kind in workflow["links"]:
        assert (
            number in nodes[source]["outputs"][output]["links"]
            and nodes[target]["inputs"][slot]["link"] == number
        )
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind
    assert all(each["link"] is not None for node in nodes.values() for each in node["inputs"])
    urls = [model["url"] for node in nodes.values() for model in node["properties"].get("models", ())]
    assert len(urls) == 2 and all(url.startswith("https://huggingface.co/Comfy-Org/Wan_2.1") for url in urls)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_heads": 2}, "it has 2 heads of 64 channels, .* train with --num_heads 1"),
        ({"hidden_size": 192}, "its width is 192, .* train with --hidden_size 256 and heads of 128"),
        ({"text_dim": 64}, "embeddings have 64 channels, those of ComfyUI's UMT5-XXL 4096"),
        ({"num_channels": 4}, "its latents have 4 channels"),
        ({"freq_dim": 128}, "its freq_dim is 128, that of every Wan 256"),
        ({"patch_size": (1, 4, 4)}, "its patch_size is .1, 4, 4., that of every Wan .1, 2, 2."),
    ],
)
def test_a_student_that_comfyui_would_run_as_another_is_refused(config, message, tmp_path, capsys):
    save_run(tmp_path / "student", **config)
    refuse(capsys, tmp_path, [tmp_path / "student"], f"ComfyUI cannot run this student: .*{message}")


def test_the_documentation_quotes_the_refusal_of_a_tiny_student(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "outputs/wan_t2i", hidden_size=64, text_dim=64)
    with pytest.raises(SystemExit):
        main(["./outputs/wan_t2i", "--output", "student.safetensors"])
    printed = capsys.readouterr().err.replace(str(tmp_path), ".").strip()
    assert printed in " ".join((ROOT / "docs/export.md").read_text().split())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_inference_steps", "3"], "was trained for 4, 2, 1 steps"),
        (["--num_inference_steps", "2000"], "expected a whole number from 1 to 1000"),
        (["--output", "student.gguf"], "expected a name that ends with .safetensors"),
        (["--output", "missing/student.safetensors"], "no folder .*missing. Create it"),
        (["--output", "taken.safetensors"], "exists. Name another --output, or add --overwrite"),
        (["--format", "onnx"], "invalid choice: 'onnx'"),
    ],
)
def test_wrong_flags_are_refused(saved, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    refuse(capsys, tmp_path, [saved[0], *flags], message)
    assert (tmp_path / "taken.safetensors").read_bytes() == b"precious"


def test_a_missing_folder_is_refused(tmp_path, capsys):
    refuse(capsys, tmp_path, [tmp_path / "nothing"], "no such folder")


def refuse(capsys, folder, arguments, message):
    """Check that a command is refused in one line with exit code 2, and that nothing is written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as refusal:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert refusal.value.code == 2 and error.count("\n") == 1 and error.startswith("wanlite-export: ")
    assert re.search(message, error), error
    assert sorted(folder.rglob("*")) == before


def test_the_command_is_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["wanlite-export"] == "wanlite.commands:export"


# ---- GGUF --------------------------------------------------------------------------------------------------


@needs_gguf
@pytest.mark.parametrize("dtype, most_error, most_size", [("q8_0", 0.02, 0.45), ("q4_0", 0.3, 0.35)])
def test_diffusers_loads_a_gguf_file_with_the_velocity_of_the_student(
    dtype, most_error, most_size, saved, tmp_path, capsys
):
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    folder, student = saved
    output = tmp_path / "student.gguf"
    main([str(folder), "--format", "gguf", "--dtype", dtype, "--output", str(output)])
    assert f"{dtype}), for diffusers' from_single_file" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["student.gguf"]
    loaded = WanTransformer3DModel.from_single_file(
        str(output),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    student.eval()
    channels, text = student.config.in_channels, student.config.text_dim
    inputs = (torch.randn(2, channels, 1, 8, 8), torch.tensor([900.0, 300.0]), torch.randn(2, 512, text))
    with torch.no_grad():
        expected, found = (network(*inputs).sample for network in (student, loaded))
    assert 0 < (found - expected).abs().mean() < most_error * expected.abs().mean()
    quantised = sum(weight.nbytes for name, weight in loaded.named_parameters() if is_block_matrix(name))
    full = sum(weight.nbytes for name, weight in student.named_parameters() if is_block_matrix(name))
    assert quantised < most_size * full


def is_block_matrix(name):
    return name.startswith("blocks.") and "norm" not in name and name.endswith(".weight")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dtype", "q8_0"], "--dtype q8_0: --format comfyui has bfloat16, float32, float8"),
        (["--format", "gguf", "--dtype", "float8"], "--format gguf has q8_0, q5_0, q4_0"),
        (["--format", "gguf", "--output", "a.safetensors"], "ends with .gguf"),
    ],
)
def test_a_dtype_or_a_name_of_another_format_is_refused(flags, words, saved, capsys):
    if words.startswith("ends") and not find_spec("gguf"):
        pytest.skip("needs gguf")
    with pytest.raises(SystemExit) as ended:
        main([str(saved[0]), *flags])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_missing_gguf_package_is_named(saved, capsys, monkeypatch):
    monkeypatch.setattr("wanlite.export.gguf.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main([str(saved[0]), "--format", "gguf"])
    assert ended.value.code == 2 and "pip install gguf" in capsys.readouterr().err
