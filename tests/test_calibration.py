"""Calibration: exact if nothing was pruned, closer to the teacher otherwise, and deterministic."""

import pytest
import torch

from tests.conftest import TINY_TEACHER
from train_distillation import WanLiteStudent
from wanlite.network import one_frame_velocity, pack_text
from wanlite.student.calibration import _best_columns, calibrate, choose_channels, make_frames
from wanlite.student.initialization import project_into
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import stream_expert

TEXT = {"num_channels": 16, "text_dim": 64, "rope_max_seq_len": 64}
PRUNED = {"hidden_size": 64, "depth": 4, "num_heads": 2} | TEXT


@torch.no_grad()
def velocity_error(student, teacher, expert, text):
    """Return a student's squared velocity error relative to its expert's power, on frames outside the
    calibration.
    """
    frames = make_frames(open_teacher_files(TINY_TEACHER).experts[expert], text, (8, 8), seed=99)
    found, wanted = (
        one_frame_velocity(network, frames.latents, frames.timestep, *text)[0]
        for network in (student, teacher.expert(expert))
    )
    return ((found - wanted).square().mean() / wanted.square().mean()).item()


@pytest.fixture(scope="module")
def many_embeddings(prompt_embeddings):
    """Prompts for 64 frames."""
    prompts = [tokens[bias == 0] for tokens, bias in zip(*prompt_embeddings[0])]
    return pack_text(prompts * 16)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_calibration_leaves_a_student_of_the_teachers_shape_unchanged(expert, teacher, many_embeddings):
    config, files = teacher.config, teacher.files.experts[expert]
    student = WanLiteStudent(hidden_size=128, depth=4, num_heads=4, ffn_dim=config["ffn_dim"], **TEXT)
    frames = make_frames(files, many_embeddings, (8, 8))
    channels = choose_channels(files, frames, 128)
    assert torch.equal(channels, torch.arange(128))
    calibrate(student, files, project_into(student, TINY_TEACHER, expert, channels=channels), frames)
    assert velocity_error(student, teacher, expert, many_embeddings) < 1e-8


@pytest.mark.parametrize(
    "shape", [{}, {"depth": 2}, {"hidden_size": 96, "num_heads": 3}, {"num_heads": 4}, {"ffn_dim": 100}]
)
def test_a_calibrated_student_is_closer_to_the_teacher_than_a_projected_one(shape, teacher, many_embeddings):
    student, files = WanLiteStudent(**PRUNED | shape), teacher.files.experts["low"]
    report = project_into(student, TINY_TEACHER, "low")
    before = velocity_error(student, teacher, "low", many_embeddings)
    calibrate(student, files, report, make_frames(files, many_embeddings, (8, 8)))
    assert velocity_error(student, teacher, "low", many_embeddings) < 0.8 * before


def test_frames_of_real_images_are_those_images_with_noise(teacher, many_embeddings):
    clean = torch.full((64, 16, 6, 4), 3.0)
    frames = make_frames(teacher.files.experts["low"], many_embeddings, (8, 8), clean)
    level = frames.timestep[:, None, None, None] / 1000
    noise = (frames.latents - (1 - level) * clean) / level
    assert frames.latents.shape == clean.shape and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.allclose(frames.timestep.sort().values, (torch.arange(64) + 0.5) * 1000 / 64)


def test_calibration_is_the_same_from_either_layout_and_any_random_state(official_teacher, many_embeddings):
    students = []
    for seed, folder in ((1, TINY_TEACHER), (2, official_teacher)):
        torch.manual_seed(seed)
        student = WanLiteStudent(**PRUNED)
        files = open_teacher_files(folder).experts["high"]
        frames = make_frames(files, many_embeddings, (8, 8))
        report = project_into(student, folder, "high", channels=choose_channels(files, frames, 64))
        calibrate(student, files, report, frames)
        students.append(student.state_dict())
    assert all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())


def test_selected_channels_predict_channels_that_are_sums_of_them():
    three = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.cat(
        [three, three @ torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)], 1
    )
    channels = _best_columns(rows.T @ rows, 3)
    kept = rows[:, channels]
    assert len(channels.unique()) == 3
    assert (kept @ torch.linalg.lstsq(kept, rows).solution - rows).abs().max() < 1e-3


def test_a_streamed_expert_is_the_expert(teacher, prompt_embeddings, noisy):
    arguments = (noisy, torch.tensor([990.0, 700.0, 400.0, 100.0]), *prompt_embeddings[0])
    streamed = stream_expert(teacher.files.experts["low"])
    found, wanted = (
        one_frame_velocity(network, *arguments)[0] for network in (streamed, teacher.expert("low"))
    )
    assert torch.equal(found, wanted) and not list(streamed.blocks.parameters())
