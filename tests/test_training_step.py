"""A single training step: the state that it changes, keeps and restores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from train_distillation import Settings, WanLiteStudent
from wanlite.flow import FewSteps
from wanlite.network import TextTokens
from wanlite.planning.resolve import complete
from wanlite.planning.run import resolve_run
from wanlite.training.phase_table import PHASES, phases_to_train
from wanlite.training.state import CHECKPOINTED, Progress, make_training_state
from wanlite.training.training_step import MAX_SKIPPED, make_generator, training_step


class NoTeacher:
    """Replaces the teacher in phases that do not use it online."""

    guided = unguided = None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = Settings(
        output_dir=str(tmp_path_factory.mktemp("run")),
        num_trajectories=32,
        hidden_size=24,
        depth=1,
        num_heads=2,
    )
    return resolve_run(complete(settings), WanLiteStudent, start=lambda settings: Accelerator())


@pytest.fixture
def state(run):
    few = FewSteps(
        run.settings.flow_shift, run.few_steps, run.resolutions[0].latent_shape, run.settings.teacher_steps
    )
    torch.manual_seed(0)
    return make_training_state(run, WanLiteStudent(run.shape), NoTeacher(), few)


def batch_of(run, value=1.0):
    rows, (channels, height, width) = 2, run.resolutions[0].latent_shape
    tokens = height * width // 4
    latents = value * torch.randn(rows, channels, height, width, generator=torch.Generator().manual_seed(1))
    batch = {
        "latents": latents,
        "velocity": latents,
        "timestep": torch.full((rows,), 500.0),
        "features": torch.ones(rows, tokens, run.settings.feature_directions),
        "first_token": torch.zeros(rows, dtype=torch.long),
    }
    return [(batch, TextTokens(torch.ones(rows, 1, run.shape["text_dim"]), torch.zeros(rows, 1)))]


def weights(state):
    return [tensor.clone() for tensor in state.student.state_dict().values()]


def are_equal(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_step_changes_the_weights_and_increments_the_counter(run, state):
    phase, before = phases_to_train(run, PHASES)[0], weights(state)
    run.accelerator.gradient_accumulation_steps = 1
    state.lr_schedulers[0].step()  # the first learning rate of a warm-up is 0
    state.lr_schedulers[-1].step()
    measured = training_step(phase, run, state, batch_of(run))
    assert measured.is_finite and measured.terms.keys() == {"velocity_loss", "feature_loss"}
    assert state.progress.step == 1 and not are_equal(before, weights(state))


def test_the_learning_rates_of_a_run_reach_their_peak_in_each_phase(run, state):
    (velocity, *_, few_step) = run.phases
    for scheduler in state.lr_schedulers:
        (factor, *_) = scheduler.lr_lambdas
        peaks = [step for step in range(few_step.last) if factor(step) == 1]
        assert peaks == [100, velocity.last + 100]
        assert factor(velocity.last - 1) < 1e-4 and factor(few_step.last - 1) < 1e-4


def test_a_step_without_a_finite_gradient_keeps_the_weights(run, state):
    phase, before = phases_to_train(run, PHASES)[0], weights(state)
    measured = training_step(phase, run, state, batch_of(run, float("nan")))
    assert not measured.is_finite and are_equal(before, weights(state))
    assert (state.progress.step, state.progress.skipped_steps) == (1, 1)


def test_skipped_steps_in_a_row_are_counted_across_a_resume(run, state, tmp_path):
    phase = phases_to_train(run, PHASES)[0]
    state.progress.skipped_in_a_row, state.progress.step = MAX_SKIPPED - 1, 40
    state.save(tmp_path, {}, 2)
    state.progress.load_state_dict(Progress().state_dict())
    state.resume(tmp_path, "cpu", lambda line: None)
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} steps in a row, up to 41"):
        training_step(phase, run, state, batch_of(run, float("nan")))


def test_the_phase_in_the_table_is_the_one_that_is_trained(run, state):
    def loss(networks, settings, batch, text, progress, generator):
        weight = networks.student.proj_out.bias.sum() + networks.feature_head.bias.sum()
        return 0 * weight + 7.0, {"seven": torch.tensor(7.0)}

    phase = phases_to_train(run, PHASES | {"velocity": replace(PHASES["velocity"], loss=loss)})[0]
    assert training_step(phase, run, state, batch_of(run)).loss == 7.0


def test_the_tensors_of_a_checkpoint_match_the_documented_list(state):
    assert state.checkpointed().keys() <= set(CHECKPOINTED)
    assert set(CHECKPOINTED) - state.checkpointed().keys() == {"critic", "critic_optimizers", "scaler"}


def test_a_resolved_run_has_all_settings_that_depend_on_the_machine(run):
    names = (
        "train_batch_size",
        "gradient_accumulation_steps",
        "mixed_precision",
        "rollout_states",
        "ffn_dim",
    )
    assert all(getattr(run.settings, name) is not None for name in names)
    assert run.settings.teacher_residency != "auto" and run.settings.validation_prompts


def test_every_micro_batch_has_its_own_random_numbers_from_a_closed_form(run):
    seeds = {make_generator(run, step, number).initial_seed() for step in range(20) for number in range(4)}
    expected = np.random.SeedSequence((run.settings.seed, 3, 1, 0)).generate_state(1, np.uint64)[0]
    assert len(seeds) == 80 and make_generator(run, 3, 1).initial_seed() == int(expected) % 2**63
