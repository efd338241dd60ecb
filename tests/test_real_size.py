"""Conditions of a real teacher: bfloat16 embeddings, few and costly trajectories, images that need several passes."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import ROOT, TINY_TEACHER, loud_student, run_script
from train_distillation import Settings
from wanlite.data.shards import compute_once
from wanlite.network import pack_text
from wanlite.phases import count_passes, count_states, fill_validation_and_rollout, plan_phases
from wanlite.planning.checks import check_batch
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import stream_expert
from wanlite.training import steps

SETTINGS = replace(
    Settings(),
    max_train_steps=1400,
    few_step_train_steps=1000,
    reference_steps=40,
    train_batch_size=128,
    gradient_accumulation_steps=1,
)


@pytest.mark.parametrize("trajectories", [400, 1000, 4000, 20000])
def test_validation_of_a_large_teacher_costs_less_than_half_of_its_training_data(trajectories):
    settings = replace(SETTINGS, **fill_validation_and_rollout(SETTINGS, True, trajectories))
    training = 2 * trajectories * settings.teacher_steps
    assert training < sum(count_passes(settings, [trajectories], 400, plan_phases(settings))) < 1.5 * training


def test_validation_is_bounded_for_large_teachers_unless_it_is_set():
    assert fill_validation_and_rollout(SETTINGS, True, 1) == {
        "validation_trajectories": 4,
        "rollout_states": 1,
    }
    assert fill_validation_and_rollout(SETTINGS, False, 4000) == {
        "validation_trajectories": 64,
        "rollout_states": 512,
    }
    given = replace(SETTINGS, validation_trajectories=16, rollout_states=0)
    assert fill_validation_and_rollout(given, True, 1) == {"validation_trajectories": 16, "rollout_states": 0}


def test_a_batch_larger_than_the_training_data_is_refused():
    settings = replace(SETTINGS, rollout_states=4, train_batch_size=16)
    check_batch(settings, count_states(settings, 6, plan_phases(settings)), 1)
    with pytest.raises(ValueError, match="few_step has 14 training states, .* --train_batch_size to 14"):
        check_batch(settings, count_states(settings, 5, plan_phases(settings)), 1)


def test_bfloat16_embeddings_are_packed_in_float32_without_loss():
    embedding = torch.randn(3, 8).bfloat16()
    packed = pack_text([embedding, embedding[:1]])
    assert packed.tokens.dtype == torch.float32 and torch.equal(packed.tokens[0, :3], embedding.float())


def test_the_velocity_in_chunks_equals_that_of_one_pass():
    student, generator = (
        loud_student(hidden_size=64, depth=2, num_heads=2, text_dim=8),
        torch.Generator().manual_seed(0),
    )
    text = pack_text([torch.randn(length, 8, generator=generator) for length in (2, 5, 3)])
    latents, timestep = torch.randn(3, 16, 8, 8, generator=generator), torch.tensor([900.0, 500.0, 100.0])
    rows = []
    student.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        in_one_pass = steps.velocity_from(student, text)(latents, timestep)
        # two images of 16 tokens per pass
        in_chunks = steps.velocity_in_chunks(student, text, tokens_per_pass=32)(latents, timestep)
    assert rows == [3, 2, 1] and torch.allclose(in_chunks, in_one_pass, atol=1e-5)


def test_cached_tensors_are_computed_once(tmp_path):
    made = []
    found = [
        compute_once(Accelerator(), tmp_path, lambda: made.append(1) or {"basis": torch.arange(5.0)})
        for _ in range(2)
    ]
    assert len(made) == 1 and all(torch.equal(each["basis"], torch.arange(5.0)) for each in found)


def test_a_streamed_block_is_freed_when_the_next_is_read():
    blocks = list(stream_expert(open_teacher_files(TINY_TEACHER).experts["high"]).blocks)
    assert len(blocks) == 4 and all(weight.is_meta for block in blocks for weight in block.parameters())


@pytest.mark.slow
def test_a_sample_of_the_real_size_measures_every_phase_and_removes_its_files(tmp_path):
    process = run_script(
        ROOT / "benchmarks" / "real_size.py", "--quick", "--resolution", "64", "--folder", tmp_path / "wan"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in process.stdout.splitlines()
        if line.startswith("| ")
    }
    assert rows.keys() >= {"converting", "text", "start", "trajectories", "training", "rollout", "validation"}
    assert "streamed and stock teacher differ by" in process.stdout and not (tmp_path / "wan").exists()
