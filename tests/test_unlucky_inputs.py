"""Files and surroundings of bad luck or ill will: deep folders, odd archives, LoRA files, a lost folder, no memory."""

import io
import json
import shutil
import subprocess
import sys

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from benchmarks.hostile_inputs.builders import png, tar_header
from tests.conftest import ROOT, TINY_TEACHER
from wanlite.data.image_sources import list_images
from wanlite.data.image_tables import MAX_ROWS
from wanlite.data.images import read_image_file
from wanlite.data.text_encoder import load_tokenizer
from wanlite.files.atomic import find_corruption, new_folder
from wanlite.files.inside import MAX_LEVELS, check_inside, walk
from wanlite.generation.checks import MAX_IMAGES, check_numbers
from wanlite.generation.settings import Settings
from wanlite.pipeline import WanLitePipeline
from wanlite.pipeline.lora_files import FILE, read_lora
from wanlite.planning.config_files import read_config
from wanlite.planning.teacher_folder import read_teacher_folder
from wanlite.runtime.terminal import print_error

# ---- folders -----------------------------------------------------------------------------------------------


def nested(folder, levels):
    (folder / "/".join("d" * levels)).mkdir(parents=True)


def test_a_walk_yields_every_entry_and_follows_no_link(tmp_path):
    nested(tmp_path, 3)
    (tmp_path / "d/d/file").touch()
    (tmp_path / "d/loop").symlink_to(tmp_path)
    assert sorted(walk(tmp_path)) == sorted(tmp_path.rglob("*"))
    assert [*walk(tmp_path / "missing")] == [*walk(tmp_path / "d/d/file")] == []


def test_folders_that_are_nested_without_an_end_are_refused(tmp_path):
    with new_folder(tmp_path / "vae") as partial:
        (partial / "config.json").write_text("{}")
    nested(tmp_path / "vae", MAX_LEVELS + 2)
    for read in (
        lambda: check_inside(tmp_path, "vae"),
        lambda: find_corruption(tmp_path / "vae"),
        lambda: list_images(tmp_path),
        lambda: read_teacher_folder(tmp_path),
    ):
        with pytest.raises(OSError, match="has folders nested deeper than 32 levels"):
            read()


# ---- images ------------------------------------------------------------------------------------------------


TAR_FAULTS = {
    "2^80 bytes": tar_header("a.png", b"\x80" + b"\x7f" * 11, b"0"),
    "headers of headers": (tar_header("a", b"%011o\0" % 2, b"L") + b"ab".ljust(512, b"\0")) * 2000,
    "a negative size": tar_header("a", b"%011o\0" % 20, b"x")
    + b"20 size=-1000000000\n".ljust(512, b"\0")
    + tar_header("a.png", b"%011o\0" % 0, b"0"),
}


@pytest.mark.parametrize("fault", TAR_FAULTS)
def test_a_tar_with_impossible_headers_is_damaged(fault, tmp_path):
    (tmp_path / "a.tar").write_bytes(TAR_FAULTS[fault] + bytes(1024))
    with pytest.raises(ValueError, match=r"a damaged \.tar file"):
        list_images(tmp_path)


def test_a_table_of_more_rows_than_fit_in_memory_is_refused(tmp_path):
    empty = {"image": pyarrow.binary(), "text": pyarrow.string()}
    rows = {name: pyarrow.nulls(MAX_ROWS + 1, kind) for name, kind in empty.items()}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="4,194,305 rows, expected at most 4,194,304 images"):
        list_images(tmp_path / "a.parquet")


def test_an_image_of_another_size_is_refused_without_its_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png([], (8000, 8000))[:100])
    with pytest.raises(ValueError, match="a.png is 8000 x 8000, expected 64 x 64"):
        read_image_file(tmp_path / "a.png", "--image", (64, 64))
    (tmp_path / "b.png").write_bytes(png([], (64, 64))[:100])
    with pytest.raises(ValueError, match="not a complete JPEG, PNG or WebP"):
        read_image_file(tmp_path / "b.png", "--image", (64, 64))


def test_an_image_on_its_side_has_its_upright_size(tmp_path):
    rotated = Image.Exif()
    rotated[274] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg", exif=rotated)
    assert read_image_file(tmp_path / "a.jpg", "--image", (64, 96)).size == (64, 96)
    with pytest.raises(ValueError, match="is 64 x 96, expected 96 x 64"):
        read_image_file(tmp_path / "a.jpg", "--image", (96, 64))


# ---- tokenizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("tokenizer.json", {"dropout": 0.5}, "dropout is 0.5, expected none: tokens would be random"),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": ["x"] * 1001},
            "has 1,001 entries, expected at most",
        ),
        ("special_tokens_map.json", {"additional_special_tokens": ["x"] * 1001}, "has 1,001 entries"),
        ("tokenizer_config.json", {"num_trained_pieces": "x"}, "num_trained_pieces is 'x', expected a whole"),
        ("tokenizer_config.json", {"num_trained_pieces": -1}, "num_trained_pieces is -1, expected a whole"),
    ],
)
def test_a_tokenizer_of_random_tokens_or_of_many_is_refused(name, change, words, tmp_path):
    path = shutil.copytree(TINY_TEACHER / "tokenizer", tmp_path / "tokenizer") / name
    content = json.loads(path.read_text()) if path.exists() else {}
    model = content.get("model")
    if model:
        content["model"] = {**model, "type": "BPE", "merges": []} | change
    path.write_text(json.dumps(content if model else content | change))
    with pytest.raises(OSError, match=words):
        load_tokenizer(tmp_path / "tokenizer")


# ---- LoRA files --------------------------------------------------------------------------------------------

LAYER = "transformer.blocks.0.attn1.to_q"
MATRICES = {f"{LAYER}.lora_A.weight": torch.ones(2, 8), f"{LAYER}.lora_B.weight": torch.ones(8, 2)}
BROKEN = {
    "NaN": {f"{LAYER}.lora_A.weight": torch.full((2, 8), float("nan"))},
    "integers": {f"{LAYER}.lora_A.weight": torch.ones(2, 8, dtype=torch.int32)},
    "rank 0": {f"{LAYER}.lora_A.weight": torch.ones(0, 8), f"{LAYER}.lora_B.weight": torch.ones(8, 0)},
    "two ranks": {f"{LAYER}.lora_B.weight": torch.ones(8, 5)},
    "a lone matrix": {"transformer.blocks.1.attn1.to_q.lora_A.weight": torch.ones(2, 8)},
    "DoRA": {f"{LAYER}.lora_magnitude_vector": torch.ones(8)},
    "another tensor": {"transformer.proj_out.weight": torch.ones(8, 8)},
}


def write_lora(folder, more=None, **settings):
    own = {f"transformer.{name}": value for name, value in settings.items()}
    metadata = {"lora_adapter_metadata": json.dumps(own)} if settings else None
    save_file(MATRICES | (more or {}), folder / FILE, metadata)
    return folder


@pytest.mark.parametrize("fault", BROKEN)
def test_a_lora_of_other_tensors_is_refused_by_name(fault, tmp_path):
    write_lora(tmp_path, BROKEN[fault])
    with pytest.raises(ValueError, match=rf"^{tmp_path}: ") as refused:
        read_lora(WanLitePipeline, tmp_path, {})
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "settings",
    [{"r": 10**9}, {"lora_alpha": float("nan")}, {"lora_alpha": "x"}, {"lora_alpha": 1e308}]
    + [{"lora_alpha": 1, "alpha_pattern": [1]}, {"use_dora": True}, {"lora_alpha": 10**400}],
    ids=str,
)
def test_settings_of_a_lora_that_are_no_scale_are_refused(settings, tmp_path):
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        read_lora(WanLitePipeline, write_lora(tmp_path, **settings), {})


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({}, 1),
        ({"r": 2, "lora_alpha": 2, "target_modules": "(a+)+$"}, 1),
        ({"r": 2, "lora_alpha": 1}, 0.5),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"blocks.0.attn1.to_q": 4, "(a+)+$": 9}}, 2),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"^blocks.0.attn1.to_q": 1}}, 0.5),
        ({"r": 2, "lora_alpha": 2, "use_rslora": True}, 2**0.5),
    ],
)
def test_settings_of_a_lora_decide_its_scale_and_nothing_else(settings, scale, tmp_path):
    found = read_lora(WanLitePipeline, write_lora(tmp_path, **settings), {"weight_name": FILE})
    assert found.keys() == MATRICES.keys()
    product = found[f"{LAYER}.lora_B.weight"] @ found[f"{LAYER}.lora_A.weight"]
    assert torch.allclose(product, torch.full((8, 8), 2.0 * scale))


def test_a_lora_is_never_a_pickle_and_does_not_change_with_its_file(tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(OSError, match="has 0 safetensors files, expected .*pickles are never opened"):
        read_lora(WanLitePipeline, tmp_path, {})
    found = read_lora(WanLitePipeline, write_lora(tmp_path) / FILE, {})
    with open(tmp_path / FILE, "r+b") as file:
        file.write(b"\xff" * (tmp_path / FILE).stat().st_size)
    assert all(found[name].equal(matrix) for name, matrix in MATRICES.items())


@pytest.mark.parametrize("text", ["[" * 10**5, "[1]", "x"])
def test_settings_of_a_lora_that_cannot_be_read_are_refused(text, tmp_path):
    save_file(MATRICES, tmp_path / FILE, {"lora_adapter_metadata": text})
    with pytest.raises(OSError, match="lora_adapter_metadata: "):
        read_lora(WanLitePipeline, tmp_path, {})


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        ("\n".join("a." * 900 + f"b{number}=1" for number in range(50)), "many lines of hundreds"),
        (f"seed=0x{'f' * 10**5}", "seed has more than 300 digits"),
    ],
)
def test_a_file_of_settings_that_takes_long_is_refused_by_name(content, words, tmp_path):
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.toml: .*{words}"):
        read_config(tmp_path / "c.toml")


def test_more_images_than_a_command_can_record_are_refused():
    with pytest.raises(ValueError, match="--num_images_per_prompt 1000000000: .* at most 1,000,000"):
        check_numbers(Settings(num_inference_steps=4, num_images_per_prompt=10**9), 1)
    check_numbers(Settings(num_inference_steps=4, num_images_per_prompt=MAX_IMAGES), 1)


# ---- surroundings ------------------------------------------------------------------------------------------


def run(command, folder):
    found = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True)
    return found.returncode, found.stdout + found.stderr


@pytest.mark.parametrize("script", ["train_distillation.py --dry_run", "run_inference.py", "-m wanlite.lora"])
def test_a_deleted_current_folder_is_named(script, tmp_path):
    place = script if script.startswith("-m") else f"{ROOT}/{script}"
    command = f"mkdir gone; cd gone; rmdir ../gone; PYTHONPATH={ROOT} exec {sys.executable} {place}"
    code, printed = run(command, tmp_path)
    assert code == 2 and "the current folder does not exist any more" in printed, printed
    assert len(printed.strip().splitlines()) == 1


def test_a_refusal_by_the_system_names_its_file_and_what_to_do(tmp_path):
    command = f"exec {sys.executable} {ROOT}/run_inference.py --model {'a/' * 3000}"
    assert run(command, tmp_path)[0] == 2
    for dry in ("", "--dry_run"):
        command = f"exec {sys.executable} {ROOT}/train_distillation.py {dry} --output_dir {'a' * 300}"
        code, printed = run(command, tmp_path)
        assert code == 2 and "Errno" not in printed and "Choose a" in printed, printed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 256000000000 bytes."
        ),
    ],
    ids=str,
)
def test_a_lack_of_memory_is_no_fault_of_the_program(error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    print_error("run_inference.py", error)
    printed = sys.stderr.getvalue()
    assert printed.startswith("run_inference.py: the machine's memory is not sufficient (")
    assert "traceback" not in printed and printed.count("\n") == 1
