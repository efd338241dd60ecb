"""The throughput that a run logs matches its operations."""

import json
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import loud_student
from wanlite.network import TextTokens, pass_operations
from wanlite.teacher.model import run_expert
from wanlite.training.throughput import Pace

LOGGED = {
    "images_per_second",
    "teacher_share",
    "data_wait_share",
    "memory_peak_gb",
    "model_flops_utilisation",
}


def counted(work):
    """Return the operations that torch counts, with attention as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as meter:
        work()
    return meter.get_total_flops()


@pytest.fixture
def student():
    return loud_student(hidden_size=64, depth=3, num_heads=2, text_dim=48, ffn_dim=160)


def test_the_operations_of_a_pass_equal_the_count_of_torch(student, teacher, noisy, prompt_embeddings):
    latents, timestep = torch.randn(5, 16, 16, 16), torch.full((5,), 500.0)
    real = counted(lambda: student(latents, timestep, torch.randn(5, 11, 48)))
    assert pass_operations(student.config, 5, 64, 11) == pytest.approx(real, rel=0.001)
    text, expert = prompt_embeddings[0], teacher.expert("high")
    real = counted(lambda: run_expert(expert, noisy, torch.full((4,), 990.0), text))
    assert pass_operations(teacher.config, 4, 16, text.tokens.shape[1]) == pytest.approx(real, rel=0.001)


def test_passes_are_counted_once_and_three_times_with_a_gradient(student):
    pace = Pace("cpu", rate=1.0)
    pace.count_operations(student)
    latents, timestep, text = torch.randn(2, 16, 8, 8), torch.full((2,), 500.0), torch.randn(2, 5, 48)
    with torch.no_grad():
        student(latents, timestep, text)
    once = pace.operations
    student(latents, timestep, text).sample.sum().backward()
    assert once == pass_operations(student.config, 2, 16, 5) and pace.operations == 4 * once


def test_waits_for_batches_and_for_the_teacher_are_logged_as_shares_of_time():
    def slow_batches():
        for _ in range(3):
            time.sleep(0.1)
            yield {}, TextTokens(torch.zeros(8, 1, 1), torch.zeros(8, 1))

    def velocity_for(text):
        return lambda latents, timestep: time.sleep(0.2)

    pace, began = Pace("cpu", rate=1.0), time.perf_counter()
    for _, text in pace.count_batches(slow_batches()):
        pace.time_teacher(velocity_for)(text)(torch.zeros(8), None)
        time.sleep(0.1)
    seconds, found = time.perf_counter() - began, pace.figures()
    assert found["images_per_second"] == pytest.approx(24 / seconds, rel=0.05)
    assert found["data_wait_share"] == pytest.approx(0.25, abs=0.08)
    assert found["teacher_share"] == pytest.approx(0.5, abs=0.08)
    assert pace.figures()["teacher_share"] == 0  # the counters are reset


def test_a_run_logs_its_throughput_with_every_training_record(finished_run):
    records = [json.loads(line) for line in (finished_run[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 4 and all(
        record.keys() >= LOGGED and record["images_per_second"] > 0 for record in steps
    )
    assert [record["teacher_share"] > 0 for record in steps] == [
        False,
        False,
        False,
        True,
    ]  # the teacher runs during matching
    assert all(
        0 < record["model_flops_utilisation"] < 2 and 0 < record["data_wait_share"] < 1 for record in steps
    )
    assert all(0.1 < record["memory_peak_gb"] < 10 for record in steps)
    (generation,) = (record for record in records if "generated" in record)
    assert (
        generation["generated"] == 64 + 16 + 4 * 4
        and generation["step"] == 0
        and 0.5 < generation["generation_teacher_share"] <= 1
    )
    assert "generated 96 trajectories" in finished_run[1]
