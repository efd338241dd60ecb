"""Initialization, caches and validation of a run: caches record their provenance, and validation data are
never trained on.
"""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import ROOT, TINY_TEACHER, read_jobs, run_script
from train_distillation import Settings, WanLiteStudent
from wanlite.data.autoencoder import load_autoencoder
from wanlite.files.cache import read_record
from wanlite.flow import FewSteps, seeded_noise
from wanlite.network import pack_text
from wanlite.planning.defaults import choose_prompts
from wanlite.planning.resolve import complete
from wanlite.planning.run import resolve_run
from wanlite.student.calibration import calibrate, choose_channels, make_frames
from wanlite.student.initialization import (
    METHOD_VERSION,
    compare_experts,
    initialization_folder,
    initialize_student,
    project_into,
)
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.training import validation
from wanlite.training.run_folder import read_run
from wanlite.training.steps import velocity_in_chunks
from wanlite.training.teacher_data import PromptEmbeddings, TeacherData
from wanlite.training.throughput import Pace


def resolved(cache, prompts, **settings):
    """Return a Run whose training prompts are held out as well."""
    settings = complete(Settings(cache_dir=str(cache), num_held_out=4, num_trajectories=300, **settings))
    run = resolve_run(settings, WanLiteStudent, start=lambda settings: Accelerator())
    shown = settings.validation_prompts or prompts
    return replace(
        run, training=prompts, held_out=prompts, settings=replace(run.settings, validation_prompts=shown)
    )


def test_training_trajectories_share_no_prompt_or_noise_with_validation(finished_run, tmp_path):
    images = tmp_path / "images"
    process = run_script(
        ROOT / "run_inference.py",
        "--model",
        finished_run[0],
        "--prompt",
        "a red ring",
        "--output_dir",
        images,
        "--num_images_per_prompt",
        "4",
    )
    assert process.returncode == 0, process.stderr
    trajectories = sorted(read_jobs(finished_run[0], "trajectories"), key=len)
    (*_, training), validated = (
        trajectories,
        [trajectory for part in trajectories[:-1] for trajectory in part],
    )
    assert len(trajectories) == 3 and len(training) == 64 and len(validated) > 16
    for column in (1, 2):  # prompts, seeds
        assert not {trajectory[column] for trajectory in training} & {
            trajectory[column] for trajectory in validated
        }
    assert len({seed for _, _, seed in training}) == 64
    inference_seeds = {int(re.search(r"seed(\d+)", path.name)[1]) for path in images.glob("*seed*.png")}
    assert inference_seeds == {0, 1, 2, 3} and min(
        trajectory[2] for part in trajectories for trajectory in part
    ) > 10**9 * max(inference_seeds)


def test_a_cached_initialization_is_reused_by_the_same_method_version(tmp_path):
    settings, accelerator = complete(Settings(cache_dir=str(tmp_path), projection="weights")), Accelerator()
    files, student = (
        open_teacher_files(TINY_TEACHER),
        WanLiteStudent(hidden_size=64, depth=4, num_heads=2, text_dim=64),
    )
    embeddings = PromptEmbeddings(accelerator, TINY_TEACHER, tmp_path, ["a red ring"])
    for _ in range(2):
        initialize_student(settings, student, files, embeddings, ["a red ring"], (8, 8), accelerator)
    (folder,) = tmp_path.glob("start-*")
    key = settings, student, files, embeddings.encoder_digest, ["a red ring"], (8, 8)
    assert initialization_folder(*key) == folder != initialization_folder(*key, METHOD_VERSION + 1)


def test_the_method_version_changes_with_the_projected_weights():
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
    assert METHOD_VERSION == 1  # update both numbers together with METHOD_VERSION


@pytest.mark.parametrize("content", ["{", "[1]", pytest.param("[" * 10**5, id="deep")])
def test_an_unreadable_record_of_the_cache_is_computed_again(content, tmp_path):
    settings, files = complete(Settings(cache_dir=str(tmp_path))), open_teacher_files(TINY_TEACHER)
    cosines = compare_experts(settings, files, "cpu")
    (record,) = tmp_path.glob("experts-*.json")
    record.write_text(content)
    assert compare_experts(settings, files, "cpu") == cosines == read_record(record) and cosines.keys() > {
        "ffn"
    }


def test_one_held_out_prompt_counts_as_two_and_a_single_prompt_is_also_trained(tmp_path):
    training, held_out = choose_prompts(complete(Settings(num_held_out=1)))
    assert len(held_out) == 2 and not {*held_out} & {*training}  # with one object and with two
    (tmp_path / "prompts.txt").write_text("a red ring")
    settings, printed = complete(Settings(prompts=str(tmp_path / "prompts.txt"))), []
    assert choose_prompts(settings, printed.append) == (["a red ring"], ["a red ring"])
    assert printed == ["prompts  the only prompt is used for training and for validation"]


def test_a_cached_initialization_equals_the_projection(tmp_path):
    settings, accelerator = (
        complete(Settings(cache_dir=str(tmp_path), projection="weights", expert="low")),
        Accelerator(),
    )
    shape = {"hidden_size": 64, "depth": 4, "num_heads": 2, "text_dim": 64}
    files, prompts = open_teacher_files(TINY_TEACHER), ["a red ring", "a blue cross"]
    embeddings = PromptEmbeddings(accelerator, TINY_TEACHER, tmp_path, prompts)
    started, again, expected = (WanLiteStudent(**shape) for _ in range(3))
    reports = [
        initialize_student(settings, student, files, embeddings, prompts, (8, 8), accelerator)
        for student in (started, again)
    ]
    report = project_into(
        expected, TINY_TEACHER, "low", torch.cat([embeddings[prompt] for prompt in prompts])
    )
    assert reports[0] == reports[1] and reports[0]["expert_cosines"] == report.cosines
    for found in (started, again):
        assert all(
            torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items()
        )


class Drawing(validation.Validator):
    """Returns the images that it would judge, by teacher and by student."""

    @staticmethod
    def compare(by_teacher, by_student, num_steps, captions, world):
        return by_teacher(captions), {count: draw(captions) for count, draw in by_student.items()}


def make_validator(folder, prompts, shape):
    """Return a validator on the data of a short run, and the FewSteps of its student."""
    run = resolved(
        folder,
        prompts,
        teacher_steps=4,
        reference_steps=4,
        validation_trajectories=4,
        feature_directions=16,
        validation_prompts=prompts,
    )
    embeddings = PromptEmbeddings(run.accelerator, TINY_TEACHER, folder, run.prompts)
    teacher_data = TeacherData(run, Teacher(run.files), embeddings, Pace("cpu", 1e9))
    teacher_data.find_basis()
    teacher_data.validation_states = [teacher_data.generate_validation(0)]
    few = FewSteps(run.settings.flow_shift, [1, 2, 4], shape, 4)
    return Drawing(run, teacher_data, few, load_autoencoder(TINY_TEACHER)), few


def test_a_validator_samples_each_row_and_judges_each_image_at_its_own_steps(finished_run, tmp_path):
    prompts, shape = ["a red ring", "a blue cross", "a green square", "a red circle"], (16, 8, 8)
    found, few = make_validator(tmp_path, prompts, shape)
    student = WanLiteStudent.from_pretrained(finished_run[0])
    generated = {
        count: validation.generate_images(
            partial(velocity_in_chunks, student),
            [found.teacher_data.prompt_embeddings[prompt] for prompt in prompts],
            range(4),
            count,
            found.sampler,
        )
        for count in few.counts
    }
    validations, figures = found.validate(student)
    assert (
        set(validations) == {1, 2, 4}
        and figures["image_error_2"] == validations[2]["image_error"] != validations[4]["image_error"]
    )
    grid = found.make_grid(student, validations)
    assert grid.prompts == prompts and grid.seeds == [0, 1, 2, 3]
    teachers, *rows = grid.rows.items()
    assert teachers[0] == "teacher 4 steps" and (teachers[1] == found.teacher_grid).all()
    counts = {"student 4 steps": 4, "student 2 steps": 2, "student 1 step": 1}
    assert [title.split(",")[0] for title, _ in rows] == list(counts)
    for (title, row), count in zip(rows, counts.values()):
        assert (row == generated[count]).all() and f"diversity {validations[count]['diversity']:.2f}" in title
    by_teacher, by_student = found.judge(student)
    assert (by_teacher == found.teacher_grid).all() and all(
        (by_student[count] == generated[count]).all() for count in generated
    )
    assert not (generated[1] == generated[4]).all()


def test_an_initialization_is_calibrated_on_one_frame_of_each_prompt(finished_run):
    run = read_run(finished_run[0])
    assert run["projection"]["calibration_frames"] == run["settings"]["num_trajectories"] == 64


def test_the_teacher_is_guided_by_the_settings_and_unguided_beside_a_critic(tmp_path):
    prompts = ["a red ring", "a green square"]
    run = resolved(
        tmp_path, prompts, negative_prompt="a blue cross", guidance_scale=5.0, guidance_scale_2=2.0
    )
    embeddings, teacher = (
        PromptEmbeddings(run.accelerator, TINY_TEACHER, tmp_path, run.prompts),
        Teacher(run.files),
    )
    teacher_data = TeacherData(run, teacher, embeddings, Pace("cpu", 1e9))
    text, unwanted = embeddings.pack(prompts), embeddings.pack(2 * ["a blue cross"])
    latents = seeded_noise((16, 8, 8), [1, 2])
    for timestep in (torch.full((2,), 990.0), torch.full((2,), 100.0)):  # the high and the low expert's
        guided, plain = (
            maker(text)(latents, timestep) for maker in (teacher_data.guided, teacher_data.unguided)
        )
        assert torch.equal(guided, teacher.velocity(latents, timestep, text, unwanted, 5.0, 2.0)[0])
        assert torch.equal(plain, teacher.velocity(latents, timestep, text)[0]) and not torch.allclose(
            guided, plain, atol=0.01
        )
