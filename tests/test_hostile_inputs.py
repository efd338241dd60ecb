"""Hostile files: two inputs of each class of benchmarks/hostile.py, and the rules behind them."""

import json
import os
import shutil
from functools import reduce

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import ROOT, TINY_TEACHER, run_script
from train_distillation import Settings
from wanlite.data.buckets import complete_resolution
from wanlite.data.prompts import read_prompts
from wanlite.data.text_encoder import MAX_CHARACTERS, load_tokenizer, tokenize
from wanlite.files.atomic import find_corruption, new_folder
from wanlite.files.file_names import COMPONENTS, RUN, WEIGHTS
from wanlite.files.inside import OutsideError, check_inside, plain_name, resolve_inside
from wanlite.files.json_files import DOWNLOADED, OWN, SAVED, parse_json, shorten, shown
from wanlite.pipeline import WanLitePipeline
from wanlite.pipeline.loading import load_scheduler
from wanlite.planning.settings import check_bounds
from wanlite.runtime.terminal import MAX_ERROR, error_line
from wanlite.student.adapters import check_lora_fits
from wanlite.student.digest import model_digest
from wanlite.student.saving import CONFIG
from wanlite.teacher.components import convert_components
from wanlite.teacher.headers import read_header
from wanlite.teacher.recognition import recognize
from wanlite.teacher.text_encoder import check_tokenizer
from wanlite.training.run_folder import MetricsLog, prompt_settings
from wanlite.training.sampling_defaults import trained_sizes


@pytest.mark.slow
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


def test_a_file_that_a_manifest_names_often_is_not_read_as_often(tmp_path):
    with new_folder(tmp_path / "vae") as partial:
        (partial / "config.json").write_text("{}")
    manifest = json.loads((tmp_path / "vae/manifest.json").read_text())
    (described,) = manifest["files"].values()
    manifest["files"] = {f"{'./' * number}config.json": described for number in range(3)}
    (tmp_path / "vae/manifest.json").write_text(json.dumps(manifest))
    assert find_corruption(tmp_path / "vae") == "its manifest names ./config.json, expected config.json"


def test_a_folder_that_links_to_itself_is_copied_once(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    for name in ("a", "b", "c"):
        (tmp_path / "tokenizer" / name).symlink_to(".")
    found = dict.fromkeys(COMPONENTS, tmp_path / "tokenizer")
    convert_components(found, tmp_path / "converted")
    assert len([*(tmp_path / "converted/tokenizer").rglob("*")]) == 2  # with its manifest


def test_a_header_of_too_many_tensors_is_refused(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{number}": empty for number in range(10**5)}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(OSError, match="a.safetensors: its header has .* expected at most"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "shapes",
    [
        {"patch_embedding.weight": (8, 4, 0, 2, 2), "head.head.weight": (8, 8)},
        {"patch_embedding.weight": (8, 4, 1, 2, 2), "head.head.weight": ()},
        {"decoder.middle.0.residual.0.gamma": (1,), "conv2.weight": ()},
    ],
)
def test_a_network_of_impossible_shapes_is_not_recognized(shapes, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "wan.safetensors")
    assert recognize(tmp_path / "wan.safetensors") is None


@pytest.mark.parametrize("record", [{"step": "3"}, {"step": None}, {"step": 1, "seconds": "x"}])
def test_a_record_of_another_type_is_left_out_of_a_log(record, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{json.dumps(record)}\n{{"step": 2}}\n')
    MetricsLog(path, 3)
    assert path.read_text() == '{"step": 2}\n'


# ---- values ------------------------------------------------------------------------------------------------

DEEP = reduce(lambda inner, _: [inner], range(900), 1)
LARGE = [
    10**299,
    "x" * 10**6,
    "\x1b" * 10**5,
    {"a": "b" * 10**6},
    [["a"]] * 10**5,
    DEEP,
    "\udcff",
    None,
    True,
]


@pytest.mark.parametrize("value", LARGE, ids=range(len(LARGE)))
def test_a_value_of_any_size_makes_a_short_message(value):
    assert len(shorten(value)) <= 80 and shorten(value).isprintable()
    for run in ({"resolution": value}, {"resolution": 64, "settings": {"aspect_ratios": [value]}}):
        with pytest.raises(ValueError, match="^run.json: ") as refused:
            trained_sizes(run, 16, "run.json")
        assert len(str(refused.value)) < 500
    with pytest.raises(ValueError, match="--resolution") as refused:
        complete_resolution(value)
    assert len(str(refused.value)) < 500
    if value is not None:
        with pytest.raises(ValueError, match="^run.json: seed is"):
            prompt_settings({"settings": {"seed": [value]}}, "run.json")


def test_an_error_of_any_length_keeps_its_beginning_and_its_remedy():
    for middle in ("x" * 10**6, "\x1b" * 10**6, "a\nb" * 10**5):
        line = error_line(f"a.json: {middle}\r\nCopy it again.")
        assert len(line) <= MAX_ERROR <= 500 and line.isprintable()
        assert line.startswith("a.json: ") and line.endswith("Copy it again.")
    assert error_line("a  b\n c") == "a  b c"


def test_a_number_that_no_float_holds_is_out_of_bounds():
    with pytest.raises(ValueError, match=r"--seed is 10+\.\.\., expected"):
        check_bounds(Settings(seed=10**400))


@pytest.mark.parametrize("settings", [{"num_train_timesteps": 10**10}, {"shift": "x"}, {"shift": 1e308}])
def test_another_scheduler_makes_no_large_tables(settings, tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(OSError, match="scheduler: cannot be loaded"):
        load_scheduler(tmp_path, {})


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_lora_without_matrices_is_refused(shape):
    layer = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="expected a matrix"):
        check_lora_fits({"transformer.to_q.lora_A.weight": torch.zeros(shape)}, layer)


# ---- text --------------------------------------------------------------------------------------------------


def test_a_text_of_many_rows_of_a_table_is_held_once(tmp_path):
    texts = pyarrow.table({"prompt": ["x" * 2**19, None] * 3000 + ["y"]})
    parquet.write_table(texts, tmp_path / "a.parquet")
    prompts = read_prompts(tmp_path / "a.parquet")
    assert len(prompts) == 3001 and len({*map(id, prompts)}) < 20
    for cell in ([["a"]], [{"a": "b"}], [1]):
        parquet.write_table(pyarrow.table({"prompt": cell}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="holds no prompt"):
            read_prompts(tmp_path / "a.parquet")


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


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fast_tokenizer_files": ["tokenizer.1.0.json"]}, "fast_tokenizer_files is"),
        ({"fast_tokenizer_files": ["../../tokenizer.1.0.json"]}, "fast_tokenizer_files is"),
        ({"extra_ids": 10**9}, "extra_ids is 1000000000, expected at most"),
    ],
)
def test_a_tokenizer_is_that_of_the_checked_file(settings, words, tokenizer_folder):
    path = tokenizer_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(OSError, match=words):
        load_tokenizer(tokenizer_folder)


@pytest.mark.parametrize("pattern", [{"String": ""}, {"Regex": ""}, {"Regex": "(a+)+$"}, {"String": 7}, 7])
def test_a_pattern_that_makes_texts_long_or_slow_is_refused(pattern, tokenizer_folder):
    path = tokenizer_folder / "tokenizer.json"
    part = {"type": "Replace", "pattern": pattern, "content": "a"}
    for each in (part, {"type": "Prepend", "prepend": "a" * 10**6}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": each}))
        with pytest.raises(OSError, match="tokenizer.json: has a part "):
            load_tokenizer(tokenizer_folder)


def test_a_tokenizer_of_deeply_nested_parts_is_refused(tokenizer_folder):
    path = tokenizer_folder / "tokenizer.json"
    part = reduce(
        lambda inner, _: {"type": "Sequence", "normalizers": [inner]}, range(400), {"type": "Sequence"}
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": part}))
    with pytest.raises(OSError, match="tokenizer.json: has 40. parts, expected at most"):
        check_tokenizer(tokenizer_folder)


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
