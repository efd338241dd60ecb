"""The stages of a run: what they keep says what it was made of, and nothing that a student is examined on was
learned from.
"""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import ROOT, TINY_TEACHER, run_script
from train_distillation import Settings, WanLiteStudent
from wanlite.data.autoencoder import load_autoencoder
from wanlite.flow import FewSteps, seeded_noise
from wanlite.network import pack_text
from wanlite.planning.defaults import choose_prompts
from wanlite.planning.resolve import complete
from wanlite.planning.run import resolve_run
from wanlite.student.calibration import calibrate, choose_channels, make_frames
from wanlite.student.initialization import (
    METHOD_VERSION,
    compare_experts,
    initialize_student,
    project_into,
    start_folder,
)
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.training import validation as validator
from wanlite.training.run_folder import read_run
from wanlite.training.steps import velocity_in_chunks
from wanlite.training.teacher_data import PromptEmbeddings, TeacherData
from wanlite.training.throughput import Pace


def resolved(cache, prompts, **settings):
    """Return the Run of settings whose training prompts are held out as well."""
    settings = complete(Settings(cache_dir=str(cache), num_held_out=4, num_trajectories=300, **settings))
    run = resolve_run(settings, WanLiteStudent, start=lambda settings: Accelerator())
    shown = settings.validation_prompts or prompts
    return replace(
        run, training=prompts, held_out=prompts, settings=replace(run.settings, validation_prompts=shown)
    )


def kept(folder, kind):
    """Return what the folders of a kind in a run's cache say that they were made of."""
    return [
        json.loads((place / "provenance.json").read_text())
        for place in sorted((folder / "cache").glob(f"{kind}-*"))
    ]


def test_no_walk_that_is_learned_from_has_prompt_or_noise_of_one_that_students_are_examined_on_or_used_at(
    finished_run, tmp_path
):
    pictures = tmp_path / "pictures"
    process = run_script(
        ROOT / "run_inference.py",
        "--model",
        finished_run[0],
        "--prompt",
        "a red ring",
        "--output_dir",
        pictures,
        "--num_images_per_prompt",
        "4",
    )
    assert process.returncode == 0, process.stderr
    walks = sorted((made_of["trajectories"] for made_of in kept(finished_run[0], "trajectories")), key=len)
    (*_, training), examined = walks, [walk for part in walks[:-1] for walk in part]
    assert len(walks) == 3 and len(training) == 64 and len(examined) > 16
    for column in (1, 2):  # prompts, seeds
        assert not {walk[column] for walk in training} & {walk[column] for walk in examined}
    assert len({seed for _, _, seed in training}) == 64
    drawn_with = {int(re.search(r"seed(\d+)", path.name)[1]) for path in pictures.glob("*seed*.png")}
    assert drawn_with == {0, 1, 2, 3} and min(walk[2] for part in walks for walk in part) > 10**9 * max(
        drawn_with
    )


def test_a_cached_start_is_used_again_unless_the_method_version_is_another(tmp_path):
    settings, accelerator = complete(Settings(cache_dir=str(tmp_path), projection="weights")), Accelerator()
    files, student = (
        open_teacher_files(TINY_TEACHER),
        WanLiteStudent(hidden_size=64, depth=4, num_heads=2, text_dim=64),
    )
    words = PromptEmbeddings(accelerator, TINY_TEACHER, tmp_path, ["a red ring"])
    for _ in range(2):
        initialize_student(settings, student, files, words, ["a red ring"], (8, 8), accelerator)
    (folder,) = tmp_path.glob("start-*")
    key = settings, student, files, words.encoder_digest, ["a red ring"], (8, 8)
    assert start_folder(*key) == folder != start_folder(*key, METHOD_VERSION + 1)


def test_the_method_version_is_raised_when_the_projected_weights_change():
    student, files = (
        WanLiteStudent(hidden_size=64, depth=2, num_heads=2, text_dim=64),
        open_teacher_files(TINY_TEACHER),
    )
    low = files.experts["low"]
    text = pack_text(
        [torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
    )
    frames = make_frames(low, text, (8, 8))
    report = project_into(student, TINY_TEACHER, "low", channels=choose_channels(low, frames, 64))
    projected = sum(tensor.norm().item() for tensor in student.state_dict().values())
    calibrate(student, low, report, frames)
    calibrated = sum(tensor.norm().item() for tensor in student.state_dict().values())
    assert (projected, calibrated) == pytest.approx((663.905, 1503.842), rel=1e-4), "raise METHOD_VERSION"
    assert METHOD_VERSION == 1  # the version of these two numbers


@pytest.mark.parametrize("content", ["{", "[1]", pytest.param("[" * 10**5, id="deep")])
def test_a_small_record_of_the_cache_that_cannot_be_read_is_made_again(content, tmp_path):
    settings, files = complete(Settings(cache_dir=str(tmp_path))), open_teacher_files(TINY_TEACHER)
    cosines = compare_experts(settings, files, "cpu")
    (record,) = tmp_path.glob("experts-*.json")
    record.write_text(content)
    assert compare_experts(settings, files, "cpu") == cosines == json.loads(
        record.read_text()
    ) and cosines.keys() > {"ffn"}


def test_one_held_out_prompt_is_two_and_one_prompt_is_both_held_out_and_trained_on(tmp_path):
    training, held_out = choose_prompts(complete(Settings(num_held_out=1)))
    assert len(held_out) == 2 and not {*held_out} & {*training}  # of one object and of two
    (tmp_path / "prompts.txt").write_text("a red ring")
    settings, said = complete(Settings(prompts=str(tmp_path / "prompts.txt"))), []
    assert choose_prompts(settings, said.append) == (["a red ring"], ["a red ring"])
    assert said == ["prompts  the only prompt is used for training and for validation"]


def test_what_is_kept_of_a_start_is_what_was_projected(tmp_path):
    settings, accelerator = (
        complete(Settings(cache_dir=str(tmp_path), projection="weights", expert="low")),
        Accelerator(),
    )
    shape = {"hidden_size": 64, "depth": 4, "num_heads": 2, "text_dim": 64}
    files, prompts = open_teacher_files(TINY_TEACHER), ["a red ring", "a blue cross"]
    words = PromptEmbeddings(accelerator, TINY_TEACHER, tmp_path, prompts)
    started, again, expected = (WanLiteStudent(**shape) for _ in range(3))
    reports = [
        initialize_student(settings, student, files, words, prompts, (8, 8), accelerator)
        for student in (started, again)
    ]
    report = project_into(expected, TINY_TEACHER, "low", torch.cat([words[prompt] for prompt in prompts]))
    assert reports[0] == reports[1] and reports[0]["expert_cosines"] == report.cosines
    for found in (started, again):
        assert all(
            torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items()
        )


def test_an_examiner_draws_each_row_and_judges_each_picture_in_as_many_steps_as_it_says(
    finished_run, tmp_path, monkeypatch
):
    prompts, shape = ["a red ring", "a blue cross", "a green square", "a red circle"], (16, 8, 8)
    run = resolved(
        tmp_path,
        prompts,
        teacher_steps=4,
        reference_steps=4,
        validation_trajectories=4,
        feature_directions=16,
        validation_prompts=prompts,
    )
    words = PromptEmbeddings(run.accelerator, TINY_TEACHER, tmp_path, run.prompts)
    teacher_data = TeacherData(run, Teacher(run.files), words, Pace("cpu", 1e9))
    teacher_data.find_basis()
    teacher_data.validation_states = teacher_data.generate_validation()
    few, autoencoder = FewSteps(run.settings.flow_shift, [1, 2, 4], shape, 4), load_autoencoder(TINY_TEACHER)
    found = validator.Validator(run, teacher_data, few, autoencoder)
    student = WanLiteStudent.from_pretrained(finished_run[0])
    drawn = {
        count: validator.generate_images(
            partial(velocity_in_chunks, student),
            autoencoder,
            [words[prompt] for prompt in prompts],
            range(4),
            few.scheduler,
            count,
            shape,
        )
        for count in few.counts
    }
    looks, figures = found.validate(student)
    assert (
        set(looks) == {1, 2, 4}
        and figures["image_error_2"] == looks[2]["image_error"] != looks[4]["image_error"]
    )
    teachers, *rows = found.draw_grid(student, looks).items()
    assert teachers[0] == "teacher 4 steps" and (teachers[1] == found.teacher_drawn).all()
    assert [title.split(",")[0] for title, _ in rows] == [
        "student 4 steps",
        "student 2 steps",
        "student 1 step",
    ]
    for (title, row), count in zip(rows, (4, 2, 1)):
        assert (row == drawn[count]).all() and f"diversity {looks[count]['diversity']:.2f}" in title
    monkeypatch.setattr(
        validator,
        "compare",
        lambda by_teacher, by_student, *_: (
            by_teacher(prompts),
            {count: draw(prompts) for count, draw in by_student.items()},
        ),
    )
    by_teacher, by_student = found.judge(student)
    assert (by_teacher == found.teacher_drawn).all() and all(
        (by_student[count] == drawn[count]).all() for count in drawn
    )
    assert not (drawn[1] == drawn[4]).all()


def test_a_start_is_calibrated_on_a_frame_of_each_prompt(finished_run):
    run = read_run(finished_run[0])
    assert run["projection"]["calibration_frames"] == run["settings"]["num_trajectories"] == 64


def test_the_teacher_is_guided_by_the_settings_and_plain_where_it_is_held_against_a_critic(tmp_path):
    prompts = ["a red ring", "a green square"]
    run = resolved(
        tmp_path, prompts, negative_prompt="a blue cross", guidance_scale=5.0, guidance_scale_2=2.0
    )
    words, teacher = (
        PromptEmbeddings(run.accelerator, TINY_TEACHER, tmp_path, run.prompts),
        Teacher(run.files),
    )
    teacher_data = TeacherData(run, teacher, words, Pace("cpu", 1e9))
    text, unwanted = words.pack(prompts), words.pack(2 * ["a blue cross"])
    latents = seeded_noise((16, 8, 8), [1, 2])
    for timestep in (torch.full((2,), 990.0), torch.full((2,), 100.0)):  # the high and the low expert's
        guided, plain = (
            maker(text)(latents, timestep) for maker in (teacher_data.guided, teacher_data.unguided)
        )
        assert torch.equal(guided, teacher.velocity(latents, timestep, text, unwanted, 5.0, 2.0)[0])
        assert torch.equal(plain, teacher.velocity(latents, timestep, text)[0]) and not torch.allclose(
            guided, plain, atol=0.01
        )
