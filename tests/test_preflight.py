"""Refusals before torch is imported: numbers out of bounds, steps that do not fit, unsuitable students."""

import json
import math
import shutil
from dataclasses import asdict, fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, SHORT_RUN, WAN_1_3B, read_jobs, run_script, write_sparse_wan
from train_distillation import Settings, WanLiteStudent
from wanlite.phases import (
    MIN_TRAJECTORIES,
    Span,
    choose_validated,
    count_states,
    count_trajectories,
    fill_validation_and_rollout,
    plan_phases,
)
from wanlite.planning.checks import check_batch
from wanlite.planning.defaults import choose_shape
from wanlite.planning.estimate import MemoryEstimator
from wanlite.planning.hardware import fit_to_hardware
from wanlite.planning.resolve import REAL_STEPS, TINY_STEPS, complete
from wanlite.planning.teacher_folder import TeacherFolder
from wanlite.training.run_folder import read_run, seal

TRAIN = ROOT / "train_distillation.py"


def test_phases_follow_each_other_and_the_few_step_phase_has_two_rollouts():
    settings = complete(Settings(max_train_steps=100, few_step_train_steps=40, matching_steps=30))
    assert plan_phases(settings) == [
        Span("velocity", 0, 30),
        Span("few_step", 30, 50),
        Span("few_step", 50, 70),
        Span("matching", 70, 100),
    ]
    assert plan_phases(replace(settings, few_step_train_steps=0, matching_steps=0)) == [
        Span("velocity", 0, 100)
    ]


# ---- few prompts -------------------------------------------------------------------------------------------


def test_few_prompts_have_several_trajectories_unless_their_number_is_given():
    assert [count_trajectories(Settings(), prompts) for prompts in (1, 29, 4000)] == [
        MIN_TRAJECTORIES,
        MIN_TRAJECTORIES,
        4000,
    ]
    assert [count_trajectories(Settings(num_trajectories=given), 29) for given in (1, 29, 5000)] == [
        1,
        29,
        5000,
    ]


@pytest.mark.parametrize("is_large", [False, True])
def test_default_rollout_states_are_at_most_the_trajectories(is_large):
    def rollout_states(num_trajectories, **settings):
        counts = fill_validation_and_rollout(Settings(**settings), is_large, num_trajectories)
        return counts["rollout_states"]

    for num_trajectories in (1, 7, 64, MIN_TRAJECTORIES, 4000, 10**6):
        assert 1 <= rollout_states(num_trajectories) <= min(num_trajectories, 512)
    assert rollout_states(4000) == (500 if is_large else 512)
    assert rollout_states(7, rollout_states=40) == 40


@pytest.fixture(scope="module")
def estimators():
    """{number of buckets: MemoryEstimator} of the tiny teacher."""
    settings = complete(Settings())
    teacher = TeacherFolder(settings.teacher)
    return {
        buckets: MemoryEstimator(
            settings,
            teacher,
            WanLiteStudent,
            choose_shape(settings, teacher.files),
            [[(64, 64)] * (1 + buckets)],
            torch.device("cpu"),
        )
        for buckets in (1, 3)
    }


@pytest.mark.parametrize("rollout_states", [None, 0, 16])
@pytest.mark.parametrize("num_trajectories", [3, 17, 32, 80, MIN_TRAJECTORIES])
@pytest.mark.parametrize("buckets, ranks", [(1, 1), (3, 1), (1, 2)])
def test_the_default_batch_is_at_most_the_states_of_each_phase(
    num_trajectories, rollout_states, buckets, ranks, estimators
):
    settings = complete(Settings(rollout_states=rollout_states, few_step_train_steps=400, matching_steps=100))
    fitted = fit_to_hardware(settings, estimators[buckets], num_trajectories, ranks)
    states = count_states(fitted, num_trajectories, plan_phases(fitted), buckets)
    assert fitted.train_batch_size == min(128, min(states.values()) // ranks)
    assert fitted.gradient_accumulation_steps == 1


def test_a_batch_that_is_too_large_is_refused_with_the_largest_possible_one(estimators):
    settings = complete(Settings(train_batch_size=128, rollout_states=16))
    with pytest.raises(
        ValueError,
        match="has 80 training states, fewer than one batch of 128: lower --train_batch_size to 80, or",
    ):
        fit_to_hardware(settings, estimators[1], 32)
    settings = replace(settings, train_batch_size=80)
    assert fit_to_hardware(settings, estimators[1], 32).train_batch_size == 80
    with pytest.raises(
        ValueError, match="has 3 training states, fewer than one batch of 4: raise --num_trajectories or"
    ):
        check_batch(replace(settings, train_batch_size=1), {"few_step": 3}, 4)


def test_validations_use_training_prompts_if_few_are_held_out():
    training, held_out = (
        [f"trained {number}" for number in range(29)],
        [f"held out {number}" for number in range(400)],
    )
    for count in (16, 20, 400):
        assert choose_validated(training, held_out[:count]) == held_out[:count]
    assert choose_validated(training, held_out[:1]) == [held_out[0], *training[:15]]
    assert choose_validated(["one"], ["one"]) == ["one"] and choose_validated(["one"], ["two"]) == [
        "two",
        "one",
    ]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"few_step_train_steps": 1400}, "leaves no step of stage 1"),
        ({"few_step_train_steps": 1500}, "are more than --max_train_steps 1400"),
        (
            {"few_step_train_steps": 0, "matching_steps": 10},
            "--matching_steps without --few_step_train_steps",
        ),
        ({"few_steps": [3]}, "--few_steps 3 does not divide --teacher_steps 20"),
        ({"few_steps": [1, 2]}, "--num_inference_steps 4 is not one of --few_steps 1 2"),
        ({"matching_steps": 5, "mixed_precision": "fp16"}, "requires --mixed_precision no or bf16"),
    ],
)
def test_steps_that_cannot_be_trained_are_refused_with_a_remedy(changed, words):
    with pytest.raises(ValueError, match=words):
        complete(Settings(**changed))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"few_steps": [0, 4]}, "--few_steps is 0, expected at least 1"),
        ({"few_step_train_steps": -1}, "--few_step_train_steps is -1, expected at least 0"),
        ({"critic_updates": 0}, "--critic_updates is 0, expected at least 1"),
        ({"hidden_size": 0}, "--hidden_size is 0, expected at least 1"),
        ({"num_trajectories": 0}, "--num_trajectories is 0"),
        (
            {"num_trajectories": 10**300},
            r"--num_trajectories is 10+\.\.\., expected .* at most 1,000,000,000",
        ),
        ({"flow_shift": 0.0}, "--flow_shift is 0.0, expected above 0 and at most 100"),
        ({"guidance_scale": math.nan}, "--guidance_scale is nan, expected at least 1"),
        ({"diversity_gain": math.inf}, "--diversity_gain is inf"),
        ({"feature_weight": math.inf}, "--feature_weight is inf, expected at least 0"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm is -1.0, expected above 0"),
        ({"ema_decay": 1.0}, "--ema_decay is 1.0, expected at least 0 and below 1"),
        ({"checkpoints_total_limit": 1}, "--checkpoints_total_limit is 1, expected at least 2"),
        ({"seed": 2**32}, "--seed is 4294967296, expected at least 0 and below 4,294,967,296"),
    ],
)
def test_numbers_that_are_out_of_bounds_or_not_finite_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        complete(Settings(**changed))


def test_every_number_has_bounds():
    unbound = [
        field.name
        for field in fields(Settings)
        if not field.metadata["bounds"] and any(kind in str(field.type) for kind in ("int", "float"))
    ]
    assert unbound == ["resolution", "resolutions"]  # sides are checked against the size of a token


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"num_images": 3}, "--num_images is 3, which needs --images"),
        ({"project_only": True, "student": "here"}, "--project_only saves a projected student, and"),
        ({"project_only": True, "projection": "none"}, "--project_only saves a projected student, and"),
        ({"validation_prompts": ["a red cup", "  "]}, "--validation_prompts has an empty prompt"),
        ({"logging_dir": "../elsewhere"}, "--logging_dir ../elsewhere: is not inside --output_dir"),
        ({"logging_dir": "/elsewhere"}, "--logging_dir /elsewhere: is not inside --output_dir"),
        ({"cache_dir": str(TRAIN)}, "is a file, expected a folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        complete(Settings(**changed))


@pytest.mark.parametrize("content", ["{", '{"flow_shift": 12.0}', None])
def test_the_default_shift_depends_on_the_image_size_alone(content, copied):
    path = copied / "scheduler/scheduler_config.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    settings = Settings(teacher=str(copied))
    assert complete(settings).flow_shift == 3.0
    assert complete(replace(settings, resolution=[1280, 720])).flow_shift == 5.0
    assert complete(replace(settings, flow_shift=7.0)).flow_shift == 7.0


@pytest.mark.parametrize("content", ["[]", "{", pytest.param("[" * 10**5, id="deep")])
def test_a_broken_record_of_a_tiny_teacher_is_named(content, copied):
    (copied / "training.json").write_text(content)
    with pytest.raises(ValueError, match="training.json: not a JSON object"):
        complete(Settings(teacher=str(copied)))


def test_an_image_larger_than_the_rotary_table_is_refused(tmp_path):
    process = run_script(TRAIN, "--output_dir", tmp_path / "run", "--resolution", "64", "1040", "--dry_run")
    assert (
        process.returncode == 2
        and "a side of 1,040 pixels is more than this teacher supports" in process.stderr
    )
    assert "Traceback" not in process.stderr


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    process = run_script(TRAIN, "--output_dir", tmp_path / "file" / "run")
    assert (
        process.returncode == 2
        and "Traceback" not in process.stderr
        and str(tmp_path / "file") in process.stderr
    )


# ---- training a saved student further ----------------------------------------------------------------------


@pytest.fixture
def saved(finished_run, tmp_path):
    """A function that changes the run.json of a saved student and returns its folder."""
    folder = tmp_path / "student"
    shutil.copytree(finished_run[0], folder, ignore=shutil.ignore_patterns("cache", "checkpoints"))

    def change(**what):
        run = read_run(folder)
        (folder / "run.json").write_text(
            json.dumps(seal({name: value for name, value in (run | what).items() if value is not None}))
        )
        return folder

    return change


def test_the_default_steps_are_more_for_a_real_teacher(tmp_path):
    write_sparse_wan(tmp_path / "wan", WAN_1_3B, "official", 1)
    for part in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / "wan" / part).touch()
    (tmp_path / "wan/google/umt5-xxl").mkdir(parents=True)
    assert [
        complete(Settings(teacher=teacher, max_train_steps=steps)).max_train_steps
        for teacher in (None, str(tmp_path / "wan"))
        for steps in (None, 30)
    ] == [TINY_STEPS, 30, REAL_STEPS, 30]
    assert REAL_STEPS > TINY_STEPS


STAGE_TWO = {"max_train_steps": 6, "few_step_train_steps": 6, "flow_shift": 3.0, "resolution": 64}


@pytest.mark.parametrize(
    "what, words",
    [
        ({"finished": False}, "holds no finished run"),
        (
            {"finished": False, "projected_only": True},
            "holds a projected initialization that was not trained",
        ),
        ({"schedule": None}, "was saved by an older version"),
        ({"schedule": [1]}, "its run.json has no valid schedule"),
        ({"schedule": {"phases": [1]}}, "has no valid phases in its schedule"),
        (
            {"teacher": None, "student": {}, "settings": [1]},
            "has no valid teacher, student, settings. Copy the folder again",
        ),
        ({"schedule": {"phases": {"velocity": 0, "few_step": 3}}}, "was not trained in stage 1"),
        (
            {"settings": asdict(Settings(flow_shift=5.0, resolution=64))},
            "was trained with flow_shift 5.0, and this run has 3.0",
        ),
        (
            {"settings": asdict(Settings(flow_shift=3.0, resolution=64, guidance_scale=7.0))},
            "was trained with guidance_scale 7.0",
        ),
    ],
)
def test_an_unsuitable_student_is_refused_with_a_remedy(what, words, saved):
    with pytest.raises(ValueError, match=words):
        complete(Settings(student=str(saved(**what)), **STAGE_TWO))


@pytest.mark.parametrize("name", ["none", "none/at all", "file"])
def test_a_student_that_does_not_exist_is_named(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"--student {tmp_path / name}: no such folder"):
        complete(Settings(student=str(tmp_path / name)))


def test_distribution_matching_needs_a_student_of_few_steps(saved):
    folder = saved(schedule={"phases": {"velocity": 3, "few_step": 0}})
    with pytest.raises(ValueError, match="was not trained to sample in few steps"):
        complete(Settings(student=str(folder), max_train_steps=6, few_step_train_steps=0, matching_steps=6))


def test_a_shape_other_than_the_students_is_refused(saved):
    with pytest.raises(ValueError, match="has hidden_size 64, and --hidden_size is 32. Leave the flag out"):
        complete(Settings(student=str(saved()), hidden_size=32, **STAGE_TWO))


def test_stage_two_starts_from_a_saved_student_and_adds_up_its_phases(finished_run, saved, tmp_path):
    flags = [*SHORT_RUN, "--student", saved(), "--few_step_train_steps", "6", "--matching_steps", "0"]
    shared = ["--cache_dir", finished_run[0] / "cache"]
    process = run_script(TRAIN, "--output_dir", tmp_path / "run", *flags, *shared)
    assert process.returncode == 0, process.stderr
    assert "a saved student" in process.stdout and "projected" not in process.stdout
    run = read_run(tmp_path / "run")
    assert run["schedule"] == {
        "flow_shift": 3.0,
        "few_steps": [1, 2, 4],
        "phases": {"velocity": 2, "few_step": 8, "matching": 2},
    }
    saved(teacher="0" * 64)
    process = run_script(TRAIN, "--output_dir", tmp_path / "other", *flags, *shared)
    assert process.returncode == 2 and "was distilled from another teacher" in process.stderr


def test_runs_share_a_cache_but_not_their_rollouts(finished_run, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(finished_run[0] / "cache", cache)
    before = {path.name for path in cache.iterdir()}
    process = run_script(TRAIN, "--output_dir", tmp_path / "run", *SHORT_RUN, "--cache_dir", cache)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in cache.iterdir()} == before
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "run/cache").glob("[!.]*")} == {"rollouts"}


def test_another_text_encoder_does_not_share_projection_and_trajectories(finished_run, tmp_path):
    shutil.copytree(finished_run[0] / "cache", tmp_path / "cache")
    before = {path.name for path in (tmp_path / "cache").iterdir()}
    shutil.copytree(ROOT / "tiny_teacher", tmp_path / "teacher")
    path = tmp_path / "teacher/text_encoder/model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: tensor * 1.1 if "final_layer_norm" in name else tensor for name, tensor in tensors.items()},
        path,
    )
    process = run_script(
        TRAIN,
        "--teacher",
        tmp_path / "teacher",
        "--output_dir",
        tmp_path / "run",
        *SHORT_RUN,
        "--cache_dir",
        tmp_path / "cache",
    )
    assert process.returncode == 0, process.stderr
    made = {
        path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir() if path.name not in before
    }
    assert made == {"basis", "grid", "start", "text", "trajectories"}


def test_a_file_of_three_prompts_trains_to_the_end(tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "\n".join(
            (
                "a small red circle at the left on a white background",
                "a large green cross left of a small cyan square on a grey background",
                "at the top, a large blue ring on black",
            )
        )
    )
    process = run_script(
        TRAIN, "--output_dir", tmp_path / "run", *SHORT_RUN, "--prompts", tmp_path / "prompts.txt"
    )
    assert process.returncode == 0, process.stderr
    assert "held-out captions drawn right (1):" in process.stdout and read_run(tmp_path / "run")["finished"]
    assert (
        process.stdout.count(" of 1, too few to judge\n") == 4
        and "%" not in process.stdout.split("drawn right (1):")[1]
    )
    trajectories = max(read_jobs(tmp_path / "run", "trajectories"), key=len)
    assert len(trajectories) == len({seed for _, _, seed in trajectories}) == 64
    assert [sum(number == each for each, *_ in trajectories) for number in (0, 1)] == [32, 32]
