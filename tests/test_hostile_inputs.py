"""Hostile files: two inputs of each class of benchmarks/hostile.py, and the rules behind them."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, TINY_TEACHER, run_script
from wanlite.data.text_encoder import MAX_CHARACTERS, load_tokenizer, tokenize
from wanlite.files.atomic import find_corruption, new_folder
from wanlite.files.file_names import RUN, WEIGHTS
from wanlite.files.inside import OutsideError, check_inside, plain_name, resolve_inside
from wanlite.files.json_files import DOWNLOADED, OWN, SAVED, parse_json, shown
from wanlite.pipeline import WanLitePipeline
from wanlite.student.digest import model_digest
from wanlite.student.saving import CONFIG
from wanlite.training.run_folder import MetricsLog


def test_two_inputs_of_each_class_behave_as_promised(finished_run, tmp_path):
    folder, figures = finished_run[0], tmp_path / "figures.json"
    run_script(
        ROOT / "benchmarks/hostile.py", "--model", folder, "--run", folder, "--quick", "--json", figures
    )
    rows = json.loads(figures.read_text())
    assert len({row["class"] for row in rows}) == 11 and len(rows) == 22
    faults = {row["input"]: row["fault"] for row in rows if row["fault"]}
    assert not faults, faults


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [SAVED, DOWNLOADED, OWN])
@pytest.mark.parametrize("number", ["1e400", "-1e999", "9" * 301, f"-{'9' * 400}"])
def test_a_number_that_no_float_holds_is_refused(number, limits):
    with pytest.raises(OSError, match="out of range"):
        parse_json(f'{{"a": [{number}]}}'.encode(), "a.json", limits)
    assert parse_json(b'{"a": 1000000000000000019884624838656, "b": 1e308}', "a.json", limits)["b"] == 1e308


def test_a_name_is_shown_in_at_most_200_characters():
    for name in ("\x1b" * 10**5, "a" * 10**5, "a" * 199 + "\x1b", "\U0001f600\u202e" * 200):
        assert len(shown(name)) <= 200 and shown(name).isprintable()


def test_a_name_that_no_file_system_has_is_refused_before_it_is_opened(tmp_path):
    for name in ("a" * 256, "\u00e9" * 128, "\x1b[2J" * 10**4):
        with pytest.raises(OutsideError):
            resolve_inside(tmp_path, name)
        with pytest.raises(OSError, match="names a file") as refused:
            plain_name(name, "index.json")
        assert len(str(refused.value)) < 500
    assert resolve_inside(tmp_path, "a" * 255) == tmp_path / ("a" * 255)


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "spiece.model"])
def test_every_file_of_a_tokenizer_has_a_bound(name, tmp_path):
    shutil.copytree(TINY_TEACHER / "tokenizer", tmp_path / "tokenizer")
    check_inside(tmp_path, "tokenizer")
    (tmp_path / "tokenizer" / name).touch()
    os.truncate(tmp_path / "tokenizer" / name, 3 * 10**9)
    with pytest.raises(OSError, match=f"{name}: 3,000,000,000 bytes, too large"):
        check_inside(tmp_path, "tokenizer")


def test_a_file_that_a_manifest_does_not_list_is_a_corruption(tmp_path):
    with new_folder(tmp_path / "tokenizer") as partial:
        shutil.copytree(TINY_TEACHER / "tokenizer", partial, dirs_exist_ok=True)
    (tmp_path / "tokenizer/.DS_Store").write_text("of macOS")
    assert find_corruption(tmp_path / "tokenizer") is None
    (tmp_path / "tokenizer/added_tokens.json").write_text('{"ring": 3}')
    assert find_corruption(tmp_path / "tokenizer") == "its manifest does not list added_tokens.json"
    with pytest.raises(OSError, match="does not list added_tokens.json"):
        load_tokenizer(tmp_path / "tokenizer")


def test_a_log_is_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in (".metrics.jsonl.partial", "metrics.jsonl"):
        (tmp_path / "run" / name).symlink_to("../mine")
    MetricsLog(tmp_path / "run/metrics.jsonl", 0).write(step=1)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1}\n'


# ---- text --------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_folder(tmp_path):
    return shutil.copytree(TINY_TEACHER / "tokenizer", tmp_path / "tokenizer")


TOKEN = {"SpecialToken": {"id": "</s>", "type_id": 0}}


@pytest.mark.parametrize(
    "change",
    [
        {"single": [TOKEN] * 10**4},
        {"special_tokens": {"</s>": {"id": "</s>", "ids": [1] * 10**4, "tokens": ["</s>"] * 10**4}}},
        {"special_tokens": None},
        {"type": "Sequence", "processors": []},
        {"single": 7},
    ],
)
def test_a_template_that_makes_a_long_text_of_any_prompt_is_refused(change, tokenizer_folder):
    path = tokenizer_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(OSError, match="has a post_processor") as refused:
        load_tokenizer(tokenizer_folder)
    assert len(str(refused.value)) < 500


def test_the_end_of_a_very_long_prompt_has_no_influence(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    prompt = "a red ring " * (MAX_CHARACTERS // 8)
    tokens = tokenize(
        tokenizer, [prompt, prompt + "blue " * 10**6], truncation=True, max_length=512
    ).input_ids
    assert tokens[0] == tokens[1] and len(tokens[0]) == 512


# ---- pipelines ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(finished_run, tmp_path):
    names = ("cache", "checkpoints", "samples", "logs", "base")
    return shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns(*names))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (path.parent / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}])
def test_a_pinned_pipeline_is_pinned_whole(options, folder):
    digest = model_digest(folder)
    assert WanLitePipeline.from_pretrained(folder, sha256=digest.upper(), **options)
    path = folder / "vae" / WEIGHTS
    tensors = load_file(path)
    next(iter(tensors.values())).add_(0.01)
    save_file(tensors, path)
    (folder / "vae/manifest.json").unlink()
    with pytest.raises(ValueError, match="This is not the pinned model"):
        WanLitePipeline.from_pretrained(folder, sha256=digest, **options)
    with pytest.raises(ValueError, match="transformer is passed"):
        WanLitePipeline.from_pretrained(folder, sha256=digest, transformer=None)


def test_with_a_device_map_no_config_chooses_code_or_sizes(folder):
    evil = {"attn_implementation": "evil/kernel", "auto_map": {"AutoModel": "evil.Evil"}}
    edit(folder / "text_encoder" / CONFIG, **evil, quantization_config={"quant_method": "bitsandbytes"})
    edit(folder / "model_index.json", vae=["evil", "Evil"], evil=["os", "system"])
    (folder / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    loaded = WanLitePipeline.from_pretrained(folder, device_map="cpu")
    stored = load_file(folder / "text_encoder/model.safetensors")
    tensors = loaded.text_encoder.state_dict()
    assert all(tensors[name].equal(stored[name]) for name in stored)
    edit(folder / "text_encoder" / CONFIG, num_layers=10**5)
    with pytest.raises(ValueError, match="num_layers is 100000, expected at most"):
        WanLitePipeline.from_pretrained(folder, device_map="cpu")


def test_a_saved_pipeline_names_no_path(folder, tmp_path):
    edit(
        folder / RUN,
        report={"directory": str(tmp_path)},
        settings={"teacher": str(tmp_path), "aspect_ratios": None},
    )
    WanLitePipeline.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert [path.name for path in files if str(tmp_path).encode() in path.read_bytes()] == []
    assert WanLitePipeline.from_pretrained(tmp_path / "saved").record["resolution"] == 64


@pytest.mark.parametrize("changes", [{"layer_norm_epsilon": 0.1}, {"feed_forward_proj": "gated-silu"}])
def test_a_setting_that_no_tensor_shows_is_refused(changes, folder):
    edit(folder / "text_encoder" / CONFIG, **changes)
    with pytest.raises(OSError, match=f"{next(iter(changes))} is .*, as in every Wan"):
        WanLitePipeline.from_pretrained(folder)
