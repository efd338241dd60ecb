"""One optimizer step: forward, backward, reduce, clip, step, average. No file is read or written here."""

import math
from dataclasses import dataclass
from statistics import mean, variance

import numpy as np
import torch

from .optimizers import halve_rates, sample_weights, update_ratios
from .run_log import LOG_STEPS

# Steps in a row without a finite gradient after which a run ends; float16 needs some to find its scale.
MAX_SKIPPED = 20
EARLY_STEPS, EARLY_MEAN = 50, 10  # steps after which the loss must not have risen; steps of each of two means
LOSS_PURPOSE = 0  # what random numbers are for, as a part of their seed: here the loss of a micro-batch


@dataclass(frozen=True)
class StepFigures:
    """What a step measured: means over all processes; `terms` are those of the loss, by name."""

    loss: float
    grad_norm: float
    is_sound: bool  # loss and gradient were finite, so that the weights were updated
    terms: dict[str, torch.Tensor]
    update_ratios: dict[str, torch.Tensor]  # RMS(step) / RMS(weight) by role, of the steps that are logged


def training_step(phase, run, state, batch):
    """Train one step of a phase and return its StepFigures; `state` changes in place.

    `batch` is an iterable of micro-batches (tensors by name, TextTokens), as many as
    --gradient_accumulation_steps. Raises FloatingPointError after MAX_SKIPPED steps without a finite gradient.
    """
    total_loss = torch.zeros((), device=run.accelerator.device)
    for number, (states, text) in enumerate(batch):
        loss, terms = _accumulate(phase, run, state, (states, text), number)
        total_loss += loss / run.settings.gradient_accumulation_steps
    networks = state.networks
    norm = run.accelerator.clip_grad_norm_(
        [*networks.student.parameters(), *networks.feature_head.parameters()], run.settings.max_grad_norm
    )
    mean_loss, norm = _reduce(run.accelerator, state, total_loss, norm)
    is_sound = math.isfinite(mean_loss + norm)
    halve_rates_if_rising(phase, run, state, mean_loss, is_sound)
    is_logged = (state.progress.step + 1) % LOG_STEPS == 0 or state.progress.step + 1 == phase.last
    before = sample_weights(state.optimizers) if is_logged else {}
    _update(run.accelerator, state, is_sound)
    _count(state, is_sound, f"loss {mean_loss}, norm {norm}")
    return StepFigures(mean_loss, norm, is_sound, terms, update_ratios(state.optimizers, before))


def _accumulate(phase, run, state, micro_batch, number):
    """Add the gradients of a micro-batch; returns its loss, detached, and the loss's terms."""
    networks, step = state.networks, state.progress.step
    with run.accelerator.accumulate(networks.student, networks.feature_head):
        with run.accelerator.autocast():
            loss, terms = phase.loss(
                networks, run.settings, *micro_batch, phase.progress(step), step_generator(run, step, number)
            )
        run.accelerator.backward(loss)
    return loss.detach(), terms


def step_generator(run, step, micro_batch):
    """Return the source of a micro-batch's random numbers, the same in all processes; see FewSteps."""
    numbers = (run.settings.seed, step, micro_batch, LOSS_PURPOSE)
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed) % 2**63)


def _reduce(accelerator, state, loss, norm):
    """Return loss and norm as means over all processes; notes whether any of them was asked to stop.

    This is the one time that a step waits for the device.
    """
    was_asked = state.stop is not None and state.stop.is_set
    means = accelerator.reduce(torch.stack([loss, norm.float(), loss.new_tensor(was_asked)]), "mean")
    mean_loss, norm, asked = means.tolist()
    state.is_stopping = asked > 0
    return mean_loss, norm


def halve_rates_if_rising(phase, run, state, loss, is_sound):
    """Halve all learning rates after EARLY_STEPS steps if the loss has risen by more than its noise.

    The means of the first and of the last EARLY_MEAN losses are compared, all of the first phase.
    """
    progress, losses = state.progress, state.progress.early_losses
    if phase.first > 0 or progress.step >= EARLY_STEPS:
        return
    if is_sound:
        losses.append(loss)
    if progress.step + 1 < EARLY_STEPS or len(losses) < 2 * EARLY_MEAN:
        return
    first, last = losses[:EARLY_MEAN], losses[-EARLY_MEAN:]
    noise = math.sqrt((variance(first) + variance(last)) / EARLY_MEAN)
    if mean(last) > mean(first) + 2 * noise:
        halve_rates(state.lr_schedulers)
        run.accelerator.print(
            f"\nstep {EARLY_STEPS}: the loss rose from {mean(first):.3g} to {mean(last):.3g}, so all learning "
            "rates are halved from here on"
        )


def _update(accelerator, state, is_sound):
    for optimizer in state.optimizers:
        if is_sound:
            optimizer.step()
        optimizer.zero_grad()
    if accelerator.scaler is not None:  # once: accelerate would for each optimizer, and unscale again
        accelerator.scaler.update()
    for lr_scheduler in state.lr_schedulers:
        lr_scheduler.step()
    if is_sound and state.ema is not None:
        state.ema.step(state.student.parameters())


def _count(state, is_sound, measured):
    """Count a step, and those in a row that were skipped."""
    progress = state.progress
    progress.step += 1
    progress.skipped_steps += not is_sound
    progress.skipped_in_a_row = 0 if is_sound else progress.skipped_in_a_row + 1
    if progress.skipped_in_a_row == MAX_SKIPPED:
        raise FloatingPointError(
            f"{MAX_SKIPPED} steps in a row, up to {progress.step}, had no finite gradient ({measured}). "
            "Add --overwrite and lower --learning_rate and --muon_learning_rate, or --mixed_precision no."
        )
