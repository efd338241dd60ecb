"""One optimizer step: forward, backward, reduce, clip, step, average. No file is read or written here."""

import math
from dataclasses import dataclass
from statistics import mean, variance

import numpy as np
import torch

from .optimizers import halve_rates, sample_weights, update_ratios
from .run_log import LOG_STEPS

# A run ends after this many steps in a row without a finite gradient; float16 needs some to find its scale.
MAX_SKIPPED = 20
EARLY_STEPS = 50  # the loss is compared with that of the start after these
NUM_COMPARED = 10  # steps of each mean that is compared
LOSS_PURPOSE = 0  # part of the seed of random numbers, by their use: here the loss of a micro-batch


@dataclass(frozen=True)
class StepFigures:
    """The measurements of a step: means over all processes, and the terms of the loss by name."""

    loss: float
    grad_norm: float
    is_finite: bool  # loss and gradient; otherwise the weights were not updated
    terms: dict[str, torch.Tensor]
    update_ratios: dict[str, torch.Tensor]  # RMS(step) / RMS(weight) by role, of the steps that are logged


def training_step(phase, run, state, batch):
    """Train one step of a phase; updates `state` in place and returns StepFigures.

    `batch` is an iterable of the micro-batches of the step (tensors by name, TextTokens). Raises
    FloatingPointError after MAX_SKIPPED steps in a row without a finite gradient.
    """
    total_loss = torch.zeros((), device=run.accelerator.device)
    for number, (states, text) in enumerate(batch):
        loss, terms = _accumulate(phase, run, state, (states, text), number)
        total_loss += loss / phase.accumulation
    networks = state.networks
    norm = run.accelerator.clip_grad_norm_(
        [*networks.student.parameters(), *networks.feature_head.parameters()], run.settings.max_grad_norm
    )
    mean_loss, norm = _reduce(run.accelerator, state, total_loss, norm)
    is_finite = math.isfinite(mean_loss + norm)
    halve_rates_if_rising(phase, run, state, mean_loss, is_finite)
    is_logged = (state.progress.step + 1) % LOG_STEPS == 0 or state.progress.step + 1 == phase.last
    before = sample_weights(state.optimizers) if is_logged else {}
    _update(run.accelerator, state, is_finite)
    _count(state, is_finite, f"loss {mean_loss}, norm {norm}")
    return StepFigures(mean_loss, norm, is_finite, terms, update_ratios(state.optimizers, before))


def _accumulate(phase, run, state, micro_batch, number):
    """Add the gradients of a micro-batch; returns its detached loss and the terms of the loss."""
    networks, step = state.networks, state.progress.step
    with run.accelerator.accumulate(networks.student, networks.feature_head):
        with run.accelerator.autocast():
            loss, terms = phase.loss(
                networks, run.settings, *micro_batch, phase.progress(step), make_generator(run, step, number)
            )
        run.accelerator.backward(loss)
    return loss.detach(), terms


def make_generator(run, step, micro_batch):
    """Return the random generator of a micro-batch, the same in all processes; see FewSteps."""
    numbers = (run.settings.seed, step, micro_batch, LOSS_PURPOSE)
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed) % 2**63)


def _reduce(accelerator, state, loss, norm):
    """Return the means of loss and norm over all processes; sets `state.is_stopping` if any received a signal.

    A step synchronises with the device only here.
    """
    is_stopping = state.stop is not None and state.stop.is_set
    means = accelerator.reduce(torch.stack([loss, norm.float(), loss.new_tensor(is_stopping)]), "mean")
    mean_loss, norm, stopping_share = means.tolist()
    state.is_stopping = stopping_share > 0
    return mean_loss, norm


def halve_rates_if_rising(phase, run, state, loss, is_finite):
    """Halve all learning rates after EARLY_STEPS steps if the loss has risen by more than its noise.

    The mean of the first NUM_COMPARED losses of a run is compared with that of the last.
    """
    progress, losses = state.progress, state.progress.early_losses
    if phase.first > 0 or progress.step >= EARLY_STEPS:
        return
    if is_finite:
        losses.append(loss)
    if progress.step + 1 < EARLY_STEPS or len(losses) < 2 * NUM_COMPARED:
        return
    first, last = losses[:NUM_COMPARED], losses[-NUM_COMPARED:]
    noise = math.sqrt((variance(first) + variance(last)) / NUM_COMPARED)
    if mean(last) > mean(first) + 2 * noise:
        halve_rates(state.lr_schedulers)
        run.accelerator.print(
            f"\nstep {EARLY_STEPS}: the loss rose from {mean(first):.3g} to {mean(last):.3g}, so all learning "
            "rates are halved from here on"
        )


def _update(accelerator, state, is_finite):
    for optimizer in state.optimizers:
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
    if accelerator.scaler is not None:  # accelerate would update it once per optimizer
        accelerator.scaler.update()
    for lr_scheduler in state.lr_schedulers:
        lr_scheduler.step()
    if is_finite and state.ema is not None:
        state.ema.step(state.student.parameters())


def _count(state, is_finite, measured):
    """Count a step, and the skipped ones in a row."""
    progress = state.progress
    progress.step += 1
    progress.skipped_steps += not is_finite
    progress.skipped_in_a_row = 0 if is_finite else progress.skipped_in_a_row + 1
    if progress.skipped_in_a_row == MAX_SKIPPED:
        raise FloatingPointError(
            f"{MAX_SKIPPED} steps in a row, up to {progress.step}, had no finite gradient ({measured}). "
            "Add --overwrite and lower --learning_rate and --muon_learning_rate, or --mixed_precision no."
        )
