"""What only a real teacher brings: words in bfloat16, few walks that are dear, pictures too large to be
looked at together.
"""

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


@pytest.mark.parametrize("walks", [400, 1000, 4000, 20000])
def test_what_is_looked_at_costs_a_large_teacher_less_than_half_of_its_trajectories(walks):
    settings = replace(SETTINGS, **fill_validation_and_rollout(SETTINGS, True, walks))
    learnt = 2 * walks * settings.teacher_steps
    assert learnt < count_passes(settings, walks, 400, plan_phases(settings)) < 1.5 * learnt


def test_one_trajectory_of_a_large_teacher_is_looked_at_four_times_of_a_kind_and_a_small_one_as_ever():
    assert fill_validation_and_rollout(SETTINGS, True, 1) == {
        "validation_trajectories": 4,
        "rollout_states": 1,
    }
    assert fill_validation_and_rollout(SETTINGS, False, 4000) == {
        "validation_trajectories": 64,
        "rollout_states": 512,
    }
    asked = replace(SETTINGS, validation_trajectories=16, rollout_states=0)
    assert fill_validation_and_rollout(asked, True, 1) == {"validation_trajectories": 16, "rollout_states": 0}


def test_a_batch_larger_than_what_is_learnt_from_is_refused_before_the_teacher_is_asked():
    settings = replace(SETTINGS, rollout_states=4, train_batch_size=16)
    check_batch(settings, count_states(settings, 6, plan_phases(settings)), 1)
    with pytest.raises(ValueError, match="few_step has 14 training states, .* --train_batch_size to 14"):
        check_batch(settings, count_states(settings, 5, plan_phases(settings)), 1)


def test_words_of_a_bfloat16_encoder_are_packed_in_float32_as_they_are():
    words = torch.randn(3, 8).bfloat16()
    packed = pack_text([words, words[:1]])
    assert packed.tokens.dtype == torch.float32 and torch.equal(packed.tokens[0, :3], words.float())


def test_pictures_looked_at_in_parts_are_those_looked_at_together(monkeypatch):
    student, generator = (
        loud_student(hidden_size=64, depth=2, num_heads=2, text_dim=8),
        torch.Generator().manual_seed(0),
    )
    text = pack_text([torch.randn(length, 8, generator=generator) for length in (2, 5, 3)])
    latents, timestep = torch.randn(3, 16, 8, 8, generator=generator), torch.tensor([900.0, 500.0, 100.0])
    asked = []
    student.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    monkeypatch.setattr(steps, "TOKENS_PER_PASS", 32)  # two pictures of 16 tokens
    with torch.no_grad():
        together = steps.velocity_from(student, text)(latents, timestep)
        parts = steps.velocity_in_chunks(student, text)(latents, timestep)
    assert asked == [3, 2, 1] and torch.allclose(parts, together, atol=1e-5)


def test_what_is_kept_is_made_once(tmp_path):
    made = []
    found = [
        compute_once(Accelerator(), tmp_path, lambda: made.append(1) or {"basis": torch.arange(5.0)})
        for _ in range(2)
    ]
    assert len(made) == 1 and all(torch.equal(each["basis"], torch.arange(5.0)) for each in found)


def test_a_streamed_block_is_gone_when_the_next_is_read():
    held = list(stream_expert(open_teacher_files(TINY_TEACHER).experts["high"]).blocks)
    assert len(held) == 4 and all(weight.is_meta for block in held for weight in block.parameters())


def test_a_sample_of_the_real_size_tells_every_phase_and_leaves_nothing(tmp_path):
    process = run_script(
        ROOT / "benchmarks" / "real_size.py", "--quick", "--resolution", "64", "--folder", tmp_path / "wan"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in process.stdout.splitlines()
        if line.startswith("| ")
    }
    assert rows.keys() >= {
        "converting",
        "text",
        "start",
        "trajectories",
        "training",
        "own path",
        "validation",
    }
    assert "streamed and stock teacher differ by" in process.stdout and not (tmp_path / "wan").exists()
