"""Learning rates: one step changes a student's output alike at every width, and a rising loss halves them."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from benchmarks.rates import CHECK_ROWS, first_step, make_states, make_student, make_teacher, teacher_width
from train_distillation import Settings, WanLiteStudent
from wanlite.phases import Span
from wanlite.training.optimizers import (
    KEPT_SHARE,
    make_lr_schedulers,
    make_optimizers,
    muon_decay,
    muon_factor,
    rate_factor,
    role_of,
    sample_weights,
    update_ratios,
)
from wanlite.training.state import Progress
from wanlite.training.training_step import EARLY_STEPS, halve_rates_if_rising

BAND = 0.3  # of the change at width 64
WIDE = [(width, text_dim) for width in (256, 512) for text_dim in (64, 4096)]


@cache
def change(width, text_dim, start, is_constant=False):
    """Return the change of a student's output in its first step at the peak rates."""
    files, teacher = make_teacher(teacher_width(width), text_dim, seed=0)
    student = make_student(width, text_dim, files if start == "projected" else None, seed=0)
    states = make_states(teacher, text_dim, CHECK_ROWS, seed=0)
    return first_step(student, states, is_constant)["all"]["change"]


@pytest.mark.parametrize("start", ["random", "projected"])
@pytest.mark.parametrize("width, text_dim", WIDE)
def test_the_first_step_changes_the_output_alike_at_every_width(width, text_dim, start):
    assert change(width, text_dim, start) == pytest.approx(change(64, 64, start), rel=BAND)


@pytest.mark.parametrize("start", ["random", "projected"])
def test_rates_that_ignore_the_width_change_a_wide_student_more(start):
    assert change(512, 64, start, is_constant=True) > (1 + BAND) * change(64, 64, start)


def test_every_weight_has_a_role_and_an_unknown_one_is_refused():
    student = WanLiteStudent(hidden_size=64, depth=1, num_heads=2)
    assert {role_of(name)[0] for name, _ in student.named_parameters()} == {
        *("vectors", "patch", "time", "text", "hidden", "output", "blocks")
    }
    with pytest.raises(ValueError, match="img_emb.weight: has no role"):
        role_of("img_emb.weight")


def test_the_peaks_hold_at_width_64_and_narrower():
    for width in (24, 64):
        student = WanLiteStudent(hidden_size=width, depth=1, num_heads=2, text_dim=64)
        optimizers = make_optimizers(Settings(max_train_steps=1400), student, torch.nn.Linear(width, 16))
        rates = [{group["lr"] for group in optimizer.param_groups} for optimizer in optimizers]
        assert rates == [{3e-3}, {0.09}] and optimizers[1].param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize(
    "name, expected",
    [
        ("patch_embedding.weight", 1),
        ("condition_embedder.text_embedder.linear_1.weight", 1 / 64),
        ("condition_embedder.time_embedder.linear_1.weight", 1 / 4),
        ("condition_embedder.time_proj.weight", 1 / 16),
        ("proj_out.weight", 1 / 16),
        ("feature_head.weight", 1 / 16),
        ("proj_out.bias", 1),
        ("blocks.0.norm2.weight", 1),
        ("blocks.0.ffn.net.2.weight", 1 / 16),
    ],
)
def test_a_rate_falls_with_the_size_of_its_role(name, expected):
    assert rate_factor(name, width=1024, text_dim=4096) == expected


def test_the_rate_of_muon_falls_with_the_cube_root_of_the_width():
    assert [muon_factor(width) for width in (24, 64, 512)] == pytest.approx([1, 1, 0.5])


def test_every_weight_is_in_one_optimizer_at_a_scaled_rate():
    student, head = WanLiteStudent(hidden_size=128, depth=1, num_heads=2), torch.nn.Linear(128, 32)
    for muon_rate in (0.0, 0.09):
        optimizers = make_optimizers(Settings(muon_learning_rate=muon_rate), student, head)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        weights = [weight for group in groups for weight in group["params"]]
        expected = {id(weight) for weight in [*student.parameters(), *head.parameters()]}
        assert len(weights) == len(expected) and {id(weight) for weight in weights} == expected
        rates = {group["role"]: group["lr"] for group in groups if group["role"] != "blocks"}
        assert rates["vectors"] == 3e-3 and rates["output"] == rates["hidden"] == 1.5e-3


@pytest.mark.parametrize("num_steps, rate", [(1400, 0.09), (5600, 0.09), (100_000, 0.02)])
def test_muons_decay_leaves_half_of_the_initial_weights_in_a_run_of_any_length(num_steps, rate):
    decay = muon_decay(0.01, rate, num_steps)
    cosine = (0.5 * (1 + math.cos(math.pi * step / num_steps)) for step in range(num_steps))
    kept = math.prod(1 - decay * rate * share for share in cosine)
    assert decay <= 0.01 and kept > 0.99 * KEPT_SHARE


def rates(phases, **settings):
    """Return the rate of every step under a schedule whose peak is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (lr_scheduler,) = make_lr_schedulers(Settings(**settings), [optimizer], phases)
    factor = lr_scheduler.lr_lambdas[0]
    return [factor(step) for step in range(phases[-1].last)]


def test_every_phase_warms_up_to_the_peak_and_decays_on_its_own():
    spans = (
        Span("velocity", 0, 40),
        Span("velocity", 40, 60, 1),
        Span("few_step", 60, 80, 1),
        Span("few_step", 80, 100, 1),
    )
    factors = rates(spans, lr_warmup_steps=10, lr_scheduler="cosine")
    assert factors[10] == factors[70] == max(factors) == 1
    assert factors[40] == pytest.approx(
        0.5 * (1 + math.cos(math.pi * 30 / 50))
    )  # a size has no cycle of its own
    assert factors[59] < 0.01 and factors[99] < 0.01 and factors[60] == 0
    alone = rates([Span("few_step", 0, 40)], lr_warmup_steps=10, lr_scheduler="cosine")
    assert factors[60:] == alone  # as a run that starts from base/


def test_a_short_phase_warms_up_in_a_quarter_of_its_steps():
    factors = rates(
        [Span("velocity", 0, 20), Span("few_step", 20, 30)], lr_warmup_steps=100, lr_scheduler="linear"
    )
    assert factors[5] == factors[22] == 1 and factors[4] < 1 and factors[21] < 1


def trained(losses, num_steps=100):
    """Return progress, optimizers and schedules of a run with these losses."""
    student = WanLiteStudent(hidden_size=24, depth=1, num_heads=2, text_dim=8)
    settings = Settings(max_train_steps=num_steps, lr_warmup_steps=0, lr_scheduler="constant_with_warmup")
    optimizers = make_optimizers(settings, student)
    state = SimpleNamespace(progress=Progress(), lr_schedulers=make_lr_schedulers(settings, optimizers))
    run, phase = SimpleNamespace(accelerator=Accelerator()), SimpleNamespace(first=0)
    for loss in losses:
        halve_rates_if_rising(phase, run, state, loss, math.isfinite(loss))
        for optimizer, lr_scheduler in zip(optimizers, state.lr_schedulers):
            optimizer.step()
            lr_scheduler.step()
        state.progress.step += 1
    return state, optimizers


def noisy(first, last):
    noise = 0.2 * torch.randn(EARLY_STEPS + 20, generator=torch.Generator().manual_seed(0))
    return (torch.linspace(first, last, len(noise)) + noise).tolist()


def test_a_loss_that_rises_over_the_first_steps_halves_all_rates_once(capsys):
    _, optimizers = trained(noisy(1, 2))
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1.5e-3, 0.045]
    assert capsys.readouterr().out.count("learning rates are halved") == 1


@pytest.mark.parametrize("last", [0.5, 1.0])
def test_a_loss_that_falls_or_stays_leaves_the_rates(last, capsys):
    _, optimizers = trained([*noisy(1, last)[:30], float("nan"), *noisy(1, last)[31:]])
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [3e-3, 0.09]
    assert not capsys.readouterr().out


def test_halved_rates_and_early_losses_are_restored():
    state, _ = trained(noisy(1, 2))
    restored, optimizers = trained([])
    restored.progress.load_state_dict(state.progress.state_dict())
    for new, old in zip(restored.lr_schedulers, state.lr_schedulers):
        new.load_state_dict(old.state_dict())
        new.optimizer.step()
        new.step()
    assert restored.progress.early_losses == state.progress.early_losses
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1.5e-3, 0.045]


def test_update_ratios_are_those_of_the_whole_step():
    student = WanLiteStudent(hidden_size=24, depth=1, num_heads=2, text_dim=8)
    optimizers = make_optimizers(Settings(), student)
    torch.nn.init.normal_(student.proj_out.weight)
    sampled = sample_weights(optimizers)
    with torch.no_grad():
        student.proj_out.weight.mul_(1.25)
        student.scale_shift_table.add_(1e-3)
    ratios = update_ratios(optimizers, sampled)
    assert ratios.keys() == {"vectors", "patch", "time", "text", "hidden", "output", "blocks"}
    assert ratios["output"].item() == pytest.approx(0.25) and ratios["blocks"].item() == 0
    assert ratios["vectors"].item() > 0 and update_ratios(optimizers, {}) == {}
