"""Images that are not square: the values of --resolution and their effects."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from run_inference import read_settings
from tests.conftest import ROOT, TINY_TEACHER, run_script
from tests.test_resuming import have_equal_weights, train
from train_distillation import Settings
from wanlite.data.grids import CELL, locate
from wanlite.phases import MIN_TRAJECTORIES, Span, plan_phases, split_trajectories
from wanlite.planning.resolve import complete
from wanlite.planning.teacher_folder import TeacherFolder
from wanlite.training.checkpoints import checkpoint_path
from wanlite.training.run_folder import check_output_folder, image_size, read_run


@pytest.mark.parametrize(
    "printed, recorded", [(None, 64), (96, 96), ([96], 96), ([96, 96], 96), ([640, 384], [640, 384])]
)
def test_a_square_is_recorded_as_one_number_and_anything_else_as_width_and_height(printed, recorded):
    assert complete(Settings(resolution=printed)).resolution == recorded
    assert image_size(recorded) == ((640, 384) if printed == [640, 384] else (recorded, recorded))


@pytest.mark.parametrize(
    "printed, words",
    [
        ([60], "60 is not divisible by 16; the nearest is 64"),
        ([64, 100], "--resolution 100 is not"),
        ([0], "the nearest is 16"),
        ([64, -64], "the nearest is 16"),
        ([64, 64, 64], "64 64 64: expected one number, for a square, or WIDTH HEIGHT"),
    ],
)
def test_sides_that_do_not_divide_into_tokens_are_refused(printed, words):
    with pytest.raises(ValueError, match=words):
        complete(Settings(resolution=printed))


def test_sides_are_multiples_of_a_token_of_the_teachers_autoencoder(tmp_path):
    assert (
        TeacherFolder(TINY_TEACHER).pixels_per_token == 16 and TeacherFolder(tmp_path).pixels_per_token == 16
    )
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").touch()
    (tmp_path / "Wan2.2_VAE.pth").touch()
    assert TeacherFolder(tmp_path).pixels_per_token == 32
    (tmp_path / "Wan2.1_VAE.pth").touch()  # takes precedence over the other
    assert TeacherFolder(tmp_path).pixels_per_token == 16
    wide = tmp_path / "wide"
    shutil.copytree(TINY_TEACHER, wide, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((wide / "vae/config.json").read_text())
    (wide / "vae/config.json").write_text(json.dumps(config | {"scale_factor_spatial": 16}))
    with pytest.raises(ValueError, match="--resolution 48 is not divisible by 32; the nearest is 64"):
        complete(Settings(teacher=str(wide), resolution=[64, 48]))
    for broken in ("{", "[]", '{"scale_factor_spatial": 0}'):
        (wide / "vae/config.json").write_text(broken)
        with pytest.raises(
            (OSError, ValueError), match="vae.*(not JSON|holds a list|expected the autoencoder's stride)"
        ):
            complete(Settings(teacher=str(wide)))


def test_an_interrupted_run_with_a_one_number_resolution_resumes(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"resolution": 64}, "finished": False}))
    assert (
        check_output_folder(tmp_path, {"resolution": complete(Settings(resolution=[64, 64])).resolution})
        == "resume"
    )
    with pytest.raises(ValueError, match=r"resolution was 64, is \[96, 64\]"):
        check_output_folder(tmp_path, {"resolution": complete(Settings(resolution=[96, 64])).resolution})


def leave_as_killed(whole, interrupted, step):
    """Copy a finished run as if it had been killed after the checkpoint of a step."""
    shutil.copytree(
        whole,
        interrupted,
        ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors", "config.json"),
    )
    for path in (interrupted / "checkpoints").iterdir():
        if path != checkpoint_path(interrupted, step):
            shutil.rmtree(path)
    (interrupted / "run.json").write_text(json.dumps(read_run(whole) | {"finished": False}))


WIDE = (
    "--projection",
    "weights",
    "--resolution",
    "96",
    "64",
    "--aspect_ratios",
    "3:2",
    "1:1",
    "2:3",
    "--num_trajectories",
    "96",
    "--num_held_out",
    "16",
    "--teacher_steps",
    "4",
    "--validation_steps",
    "6",
)


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """A run of a few steps in all phases on wide images of three sizes, and its output."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    code, printed = train(folder, *WIDE)
    assert code == 0, printed
    assert "96 x 64, 80 x 80, 64 x 96" in printed and read_run(folder)["settings"]["aspect_ratios"] == [
        "3:2",
        "1:1",
        "2:3",
    ]
    return folder


def test_a_run_with_buckets_resumes_to_the_same_weights(wide_run, tmp_path):
    leave_as_killed(wide_run, tmp_path / "cut", step=3)
    code, printed = train(tmp_path / "cut", *WIDE)
    assert code == 0 and "resumed at step 3" in printed and have_equal_weights(tmp_path / "cut", wide_run), (
        printed
    )


def test_every_image_of_a_wide_run_is_wide(wide_run):
    assert read_run(wide_run)["resolution"] == read_run(wide_run)["settings"]["resolution"] == [96, 64]
    grid = Image.open(wide_run / "samples/step-000006.png")
    rows, prompts = json.loads(grid.text["rows"]), json.loads(grid.text["prompts"])
    assert json.loads(grid.text["size"]) == [96, 64] and (len(rows), len(prompts)) == (4, 4)
    right, bottom = locate(4, 4, (3 * 96, 3 * 64))  # the teacher and three numbers of steps, enlarged by 3
    assert grid.width == right and grid.height > bottom  # prompts are below
    card = (wide_run / "README.md").read_text()
    assert "96 x 64 pixels" in card and "height=64, width=96" in card


def test_a_wide_student_generates_wide_images_and_resumes_only_at_its_size(wide_run, tmp_path):
    settings, _ = read_settings(["--model", str(wide_run)])
    assert (settings.width, settings.height) == (96, 64)
    process = run_script(
        ROOT / "run_inference.py", "--model", wide_run, "--output_dir", tmp_path, "--prompt", "a ring"
    )
    assert process.returncode == 0 and Image.open(tmp_path / "0000-a-ring-seed0.png").size == (96, 64), (
        process.stderr
    )
    further = {"student": str(wide_run), "max_train_steps": 6, "few_step_train_steps": 6}
    assert complete(Settings(resolution=[96, 64], **further)).resolution == [96, 64]
    with pytest.raises(
        ValueError, match=r"was trained with resolution \[96, 64\], and this run has \[64, 96\]"
    ):
        complete(Settings(resolution=[64, 96], **further))


# ---- ever larger images ------------------------------------------------------------------------------------

RISING = (
    "--projection",
    "weights",
    "--resolutions",
    "32",
    "64",
    "--max_train_steps",
    "10",
    "--few_step_train_steps",
    "4",
    "--matching_steps",
    "0",
    "--train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "4",
    "--teacher_steps",
    "4",
)  # SHORT_RUN saves at steps 3, 6 and 9; the second resolution begins at step 4


@pytest.fixture(scope="module")
def rising_run(tmp_path_factory):
    """A run on images of 32 and then 64 pixels, and the shapes of its micro-batches by step."""
    folder = tmp_path_factory.mktemp("rising") / "run"
    code, printed = train(folder, *RISING)
    assert code == 0, printed
    assert "64 teacher images of 32 x 32 and 64 of 64 x 64" in printed
    assert "velocity 32 x 32: 4, velocity 64 x 64: 2, few_step 64 x 64: 4" in " ".join(printed.split())
    return folder


def test_phases_share_the_steps_over_the_resolutions_and_small_images_are_more():
    settings = Settings(
        resolutions=[256, 512, 1024], max_train_steps=1000, few_step_train_steps=300, matching_steps=0
    )
    assert plan_phases(settings) == [
        Span("velocity", 0, 400, 0),
        Span("velocity", 400, 600, 1),
        Span("velocity", 600, 700, 2),
        Span("few_step", 700, 850, 2),
        Span("few_step", 850, 1000, 2),
    ]
    assert split_trajectories(settings, 32000) == [32000, 8000, 2000]
    assert split_trajectories(settings, 2000) == [2000, 500, MIN_TRAJECTORIES]
    assert split_trajectories(settings, 100) == [100, 100, 100]
    assert split_trajectories(Settings(), 100) == [100]


@pytest.mark.parametrize("at, step", [(4, 4), (5, 4), (9, 5)])
def test_a_run_stopped_where_the_resolution_changes_ends_with_the_same_weights(
    at, step, rising_run, tmp_path
):
    """The first resolution has one micro-batch of 16 states a step, the second four of 4."""
    shutil.copytree(rising_run / "cache", tmp_path / "cut/cache")
    code, printed = train(tmp_path / "cut", *RISING, at={at: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert code == 3 and f"stopped at step {step} of 10" in printed, printed
    code, printed = train(tmp_path / "cut", *RISING)
    assert (
        code == 0
        and f"resumed at step {step}" in printed
        and have_equal_weights(tmp_path / "cut", rising_run)
    ), printed


def has_blocks(path, size):
    """Whether the first image of a grid consists of blocks of one colour, `size` pixels wide and high."""
    left, top = locate(0, 0, (CELL, CELL))
    image = np.asarray(Image.open(path))[top : top + CELL, left : left + CELL]
    return (image[::size, ::size].repeat(size, 0).repeat(size, 1) == image).all()


def test_each_resolution_is_validated_on_its_own_images(rising_run):
    sizes = {
        path.name: json.loads(Image.open(path).text["size"])
        for path in sorted((rising_run / "samples").glob("step-*.png"))
    }
    assert sizes == {
        "step-000000.png": [32, 32],
        "step-000003.png": [32, 32],
        "step-000006.png": [64, 64],
        "step-000009.png": [64, 64],
        "step-000010.png": [64, 64],
    }
    assert [has_blocks(rising_run / "samples" / name, 8) for name in sizes] == [
        True,
        True,
        False,
        False,
        False,
    ]
    run = read_run(rising_run)
    assert run["resolution"] == 64 and run["chosen"]["step"] >= 6


def test_only_the_first_resolution_has_hidden_states(rising_run):
    losses = {
        record["step"]: "feature_loss" in record
        for record in map(json.loads, (rising_run / "metrics.jsonl").read_text().splitlines())
        if "velocity_loss" in record
    }
    assert losses == {4: True, 6: False}
    states = [load_file(path) for path in (rising_run / "cache").glob("trajectories-*/shard-*.safetensors")]
    assert {(shard["latents"].shape[-1], "features" in shard) for shard in states} == {(4, True), (8, False)}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"resolutions": [64, 32]}, "--resolutions 64 32: expected ever larger sizes, for example 256 512"),
        ({"resolutions": [64, 64]}, "expected ever larger"),
        ({"resolutions": [24, 64]}, "24 is not divisible by 16; the nearest is 32"),
        ({"resolutions": [0, 64]}, "0 is not divisible by 16"),
        ({"resolutions": [32, 64], "resolution": 96}, "end at 64, but --resolution is 96. Leave"),
        ({"resolutions": [32, 64], "resolution": [64, 32]}, "Leave --resolution out"),
        (
            {"resolutions": [32, 48, 64], "max_train_steps": 6, "few_step_train_steps": 4},
            "32 48 64 share the 2 steps of the velocity phase, expected at least one for each",
        ),
    ],
)
def test_resolutions_that_cannot_be_trained_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        complete(Settings(**settings))
    assert complete(Settings(resolutions=[32, 64], resolution=64)).resolution == 64
    assert complete(Settings(resolutions=[32])).resolution == 32


def test_a_resolution_beyond_the_positions_of_the_teacher_is_refused():
    process = run_script(ROOT / "train_distillation.py", "--dry_run", "--resolutions", 64, 32768)
    assert process.returncode == 2 and "a side of 32,768 pixels is more than this teacher" in process.stderr
