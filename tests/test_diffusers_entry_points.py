"""The ways in which diffusers loads, changes and saves a student: each behaves as with a stock Wan."""

import copy
import inspect
import json
import logging
import pickle
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, AutoModel, DiffusionPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from run_inference import read_settings
from tests.conftest import TINY_TEACHER, loud_student, official_name, run_script
from train_distillation import WanLiteStudent
from wanlite.generation.student import StudentPipeline
from wanlite.student.saving import save_student
from wanlite.teacher.checkpoint import open_teacher_files

SMALL = dict(
    hidden_size=32, depth=2, num_heads=2, ffn_dim=64, num_channels=4, text_dim=8, rope_max_seq_len=32
)
STOCK = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    ffn_dim=64,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    rope_max_seq_len=32,
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDED = {"max_shard_size": "200KB"}
PROMPT = "a small red circle at the left on a white background"


@pytest.fixture(scope="module")
def student():
    return loud_student(**SMALL)


@pytest.fixture
def saved(student, tmp_path):
    student.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    return tmp_path / "run"


@pytest.fixture
def warned():
    """The warnings and errors that diffusers logs."""
    found, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    yield found
    logging.getLogger("diffusers").removeHandler(handler)


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def settings_of(config):
    return {name: value for name, value in dict(config).items() if name[0] != "_"}


def pipeline_of(run, transformer=None):
    """Return a stock pipeline of a run, with another transformer if one is given."""
    return WanPipeline.from_pretrained(run, **({} if transformer is None else {"transformer": transformer}))


# ---- the config --------------------------------------------------------------------------------------------


def test_a_students_config_has_every_setting_of_a_stock_one(student, saved):
    stock = WanTransformer3DModel(**STOCK)
    assert settings_of(stock.config).keys() == inspect.signature(WanTransformer3DModel).parameters.keys()
    WanTransformer3DModel.from_pretrained(saved).save_pretrained(saved.parent / "stock")
    made_otherwise = [
        WanLiteStudent.from_pretrained(saved),
        WanLiteStudent.from_pretrained(saved.parent / "stock"),
        WanLiteStudent.from_config(WanLiteStudent.load_config(saved)),
        WanLiteStudent.from_config(stock.config),
    ]
    for made in (student, WanLiteStudent(stock.config), *made_otherwise):
        found = settings_of(made.config)
        assert {name: found[name] for name in settings_of(stock.config)} | {
            "patch_size": (1, 2, 2)
        } == settings_of(stock.config)
        assert (
            found["hidden_size"] == 32
            and found["depth"] == found["num_heads"] == 2
            and found["num_channels"] == 4
        )
    assert WanLiteStudent.from_config(stock.config, eps=1e-5).config.eps == 1e-5


def test_the_config_file_of_a_student_is_the_one_of_a_stock_wan(saved, tmp_path, warned):
    WanTransformer3DModel(**STOCK).save_pretrained(tmp_path / "stock")
    assert (saved / "config.json").read_text() == (tmp_path / "stock/config.json").read_text()
    for load in (WanTransformer3DModel, AutoModel):
        assert type(load.from_pretrained(str(saved))) is WanTransformer3DModel  # AutoModel takes no Path
    assert warned == []


def test_an_older_save_under_both_names_loads(student, tmp_path):
    config = json.dumps(
        {"_class_name": "WanLiteStudent"}
        | {name: value for name, value in settings_of(student.config).items() if value is not None}
    )
    assert "hidden_size" in config and "num_layers" in config
    save_student(tmp_path, config, student.state_dict())
    loaded = WanLiteStudent.from_pretrained(tmp_path)
    assert equal(loaded.state_dict(), student.state_dict()) and loaded.config.image_dim is None


# ---- single files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rename", [str, official_name])
def test_a_single_file_of_weights_loads_in_both_dialects(rename, student, saved, tmp_path):
    save_file(
        {rename(name): tensor for name, tensor in student.state_dict().items()}, tmp_path / "one.safetensors"
    )
    loaded = WanLiteStudent.from_single_file(str(tmp_path / "one.safetensors"), config=saved)
    assert type(loaded) is WanLiteStudent and equal(loaded.state_dict(), student.state_dict())


def test_a_single_file_without_a_tensor_or_a_config_is_refused(student, saved, tmp_path):
    tensors = {name: tensor for name, tensor in student.state_dict().items() if name != "proj_out.bias"}
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(
        ValueError, match="one.safetensors: lacks tensors of the student that .*student describes"
    ):
        WanLiteStudent.from_single_file(str(tmp_path / "one.safetensors"), config=saved)
    with pytest.raises(ValueError, match="config is missing"):
        WanLiteStudent.from_single_file(str(saved / WEIGHTS))


# ---- pipelines ---------------------------------------------------------------------------------------------


def test_a_pipeline_with_a_student_loads_without_this_package(run, tmp_path, warned):
    pipeline = pipeline_of(run, WanLiteStudent.from_pretrained(run))
    assert warned == [] and type(pipeline.transformer) is WanLiteStudent
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline/model_index.json").read_text())["transformer"] == [
        "diffusers",
        "WanTransformer3DModel",
    ]
    code = (
        "import sys; from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "print(type(pipeline.transformer).__name__, 'train_distillation' in sys.modules)"
    )
    process = run_script("-c", code, tmp_path / "pipeline", cwd="/")
    assert process.returncode == 0 and process.stdout == "WanTransformer3DModel False\n", process.stderr
    assert "not expected" not in process.stderr
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert equal(again.transformer.state_dict(), pipeline.transformer.state_dict())


@pytest.mark.parametrize(
    "put",
    [
        lambda pipeline, student: setattr(pipeline, "transformer", student),
        lambda pipeline, student: pipeline.register_modules(transformer=student),
        lambda pipeline, student: setattr(pipeline, "transformer", torch.compile(student)),
        lambda pipeline, student: setattr(pipeline, "transformer", copy.deepcopy(student)),
    ],
)
def test_a_student_added_to_a_pipeline_is_saved_as_the_stock_class(put, run):
    pipeline = pipeline_of(run)
    put(pipeline, WanLiteStudent.from_pretrained(run))
    assert tuple(pipeline.config.transformer) == ("diffusers", "WanTransformer3DModel")


def test_a_student_that_was_copied_or_pickled_is_a_student(student):
    for made in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):  # noqa: S301
        assert type(made) is WanLiteStudent and equal(made.state_dict(), student.state_dict())


def test_components_load_by_subfolder_as_in_diffusers(run, warned):
    found = AutoencoderKLWan.from_pretrained(run, subfolder="vae").state_dict()
    assert equal(found, load_file(run / "vae" / WEIGHTS)) and warned == []


# ---- run_inference.py loads every folder that from_pretrained accepts --------------------------------------


def louder(run, dtype=torch.float32):
    """Return a run's student as a stock Wan, changed as by a fused LoRA."""
    stock = WanTransformer3DModel.from_pretrained(run, torch_dtype=dtype)
    with torch.no_grad():
        stock.proj_out.weight *= 1.5
    return stock


def into_older_shards(run, target):
    louder(run).save_pretrained(run, **SHARDED)
    WanLiteStudent.from_pretrained(run).save_pretrained(run)
    return run


FORMS = {
    "in place": lambda run, target: louder(run).save_pretrained(run) or run,
    "in half the bytes": lambda run, target: louder(run, torch.bfloat16).save_pretrained(run) or run,
    "in shards beside the older file": lambda run, target: louder(run).save_pretrained(run, **SHARDED) or run,
    "in shards, then by us": into_older_shards,
    "in a pipeline": lambda run, target: pipeline_of(run, louder(run)).save_pretrained(target) or target,
    "in a pipeline, in shards": lambda run, target: (
        pipeline_of(run, louder(run)).save_pretrained(target, **SHARDED) or target
    ),
    "in a pipeline, as our class": lambda run, target: (
        pipeline_of(run, WanLiteStudent.from_pretrained(FORMS["in place"](run, target))).save_pretrained(
            target
        )
        or target
    ),
}


@pytest.mark.filterwarnings("ignore:.*the shards are read")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_saved_by_stock_diffusers_generates_the_same_images(form, run, tmp_path):
    expected = louder(run, torch.bfloat16 if form == "in half the bytes" else torch.float32).state_dict()
    folder = FORMS[form](run, tmp_path / "pipeline")
    settings, prompts = read_settings(
        [
            "--model",
            str(folder),
            "--prompt",
            PROMPT,
            "--num_inference_steps",
            "2",
            "--width",
            "64",
            "--height",
            "64",
        ]
    )
    pipeline = StudentPipeline(settings.model)
    assert equal(
        {name: tensor.to(expected[name].dtype) for name, tensor in pipeline.student.state_dict().items()},
        expected,
    )
    (image,) = pipeline.generate(prompts, [5], 2, 64, 64)
    assert image.shape == (64, 64, 3)


def test_stock_shards_beside_an_older_file_are_reported(run):
    older = load_file(run / WEIGHTS)
    louder(run).save_pretrained(run, **SHARDED)
    with pytest.warns(
        UserWarning, match=f"holds {WEIGHTS} beside . shards; the shards are read, as in stock diffusers"
    ):
        assert not equal(WanLiteStudent.from_pretrained(run).state_dict(), older)
    next(run.glob("*-00001-of-*.safetensors")).unlink()  # an index of missing shards is ignored
    assert equal(WanLiteStudent.from_pretrained(run).state_dict(), older)


def test_of_two_precisions_the_default_is_used_and_a_lone_variant_is_named(run, capsys):
    plain = load_file(run / WEIGHTS)
    louder(run, torch.float16).save_pretrained(run, variant="fp16")
    assert equal(StudentPipeline(run).student.state_dict(), plain)
    (run / WEIGHTS).unlink()
    assert WanLiteStudent.from_pretrained(run, variant="fp16").dtype == torch.float16
    with pytest.raises(SystemExit):
        read_settings(["--model", str(run)])
    assert (
        "Variants exist: name one of fp16, or rename it to diffusion_pytorch_model.safetensors."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_of_two_precisions_of_a_teacher_the_default_is_read(shards, copied):
    expected = open_teacher_files(TINY_TEACHER).fingerprint
    stock = WanTransformer3DModel.from_pretrained(copied / "transformer")
    stock.half().save_pretrained(
        copied / "transformer", variant="fp16", max_shard_size="10GB" if shards == 1 else "2MB"
    )
    with pytest.warns(
        UserWarning,
        match="diffusion_pytorch_model.safetensors is read; left out: diffusion_pytorch_model.fp16",
    ):
        assert open_teacher_files(copied).fingerprint == expected
    (copied / "transformer" / WEIGHTS).unlink()
    assert open_teacher_files(copied).fingerprint != expected  # only the variant is read


def test_a_pipeline_of_two_experts_is_not_a_student(capsys):
    with pytest.raises(SystemExit):
        read_settings(["--model", str(TINY_TEACHER)])
    assert "holds a pipeline of two experts, expected a student" in capsys.readouterr().err


def test_a_transformer_link_to_outside_of_a_pipeline_is_not_followed(run, tmp_path):
    pipeline_of(run).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline/transformer").rename(tmp_path / "elsewhere")
    (tmp_path / "pipeline/transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no config.json"):
        WanLiteStudent.from_pretrained(tmp_path / "pipeline")


def test_missing_components_of_a_student_are_named(saved, capsys):
    with pytest.raises(SystemExit):
        read_settings(["--model", str(saved), "--prompt", PROMPT])
    assert "put those of its run" in capsys.readouterr().err


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 4, 66, 8), "latents are 66 high, expected a multiple of 2 up to 64"),
        ((1, 4, 8, 66), "66 wide"),
        ((1, 4, 1, 8, 66), "66 wide"),
        ((2, 4, 7, 8), "7 high"),
        ((2, 4, 8, 1), "1 wide"),
        ((1, 4, 1, 1000, 8), "1000 high"),
    ],
)
def test_a_size_beyond_the_position_embedding_is_refused_by_the_model(shape, words, student):
    with pytest.raises(ValueError, match=f"{words}.* Choose another height or width"):
        student(
            torch.zeros(shape),
            torch.zeros(len(torch.zeros(shape))),
            torch.zeros(len(torch.zeros(shape)), 3, 8),
        )


def test_the_largest_size_is_generated(student):
    assert student(torch.zeros(1, 4, 64, 2), torch.zeros(1), torch.zeros(1, 3, 8)).sample.shape == (
        1,
        4,
        64,
        2,
    )
    with pytest.raises(ValueError, match="66 high"):
        loud_student(**SMALL | {"patch_size": (1, 1, 1), "rope_max_seq_len": 65})(
            torch.zeros(1, 4, 66, 65), torch.zeros(1), torch.zeros(1, 3, 8)
        )
