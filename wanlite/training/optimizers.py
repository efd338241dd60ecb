"""Optimizers: Muon for the matrices of the blocks, AdamW for all other weights, each with its learning-rate schedule.

--learning_rate and --muon_learning_rate are peaks at width 64 and text width 64, the sizes of the tiny world.
Every weight has its own rate, a function of its role and size, so that the first step changes the output by about
as much at every width. Sources: muP (Yang et al. 2022), whose rule for Adam is the table ROLES; muP for diffusion
transformers (arXiv 2505.15270).
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, chain
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from ..phases import Span
from .muon import StackedMuon

BASE = 64  # size at which the peaks hold
SAMPLED = 4096  # values of a weight, at most, that measure its step
WARMUP_PART = 4  # the warm-up is at most a quarter of a phase
KEPT_SHARE = 0.5  # of the initial weights of the blocks at the end of a run, at least, as far as decay goes
TEXT_INPUT = "condition_embedder.text_embedder.linear_1.weight"  # (width, text width)
HEAD = "feature_head."  # prefix of the names of a head's weights

# Name of a weight (the first pattern that matches), its role, and the power of BASE / size in its rate under
# AdamW. A matrix's outputs change by its rate times its inputs: 1 holds them. The size is the width, but the
# text width for the text. The powers of "time" and of Muon were chosen by benchmarks/rates.py: the layer after
# the first of the time embedder is refitted by a projection, and grows with the width.
ROLES = (
    (r"blocks\..*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)\.weight", "blocks", 1),
    (r"patch_embedding\.weight", "patch", 0),
    (r"condition_embedder\.text_embedder\.linear_1\.weight", "text", 1),
    (r"condition_embedder\.time_embedder\.linear_1\.weight", "time", 1 / 2),
    (r"condition_embedder\..*\.weight", "hidden", 1),
    (r"(proj_out|feature_head)\.weight", "output", 1),
    (r".*(norm\w*\.weight|bias|scale_shift_table)", "vectors", 0),
)
MUON_POWER = 1 / 3  # of BASE / width


def role_of(name: str) -> tuple[str, float]:
    """Return the role of a weight of a student or its head, and the power of its rate; see ROLES."""
    for pattern, role, power in ROLES:
        if re.fullmatch(pattern, name):
            return role, power
    raise ValueError(f"{name}: has no role in an optimizer; add it to ROLES.")


def rate_factor(name: str, width: int, text_dim: int) -> float:
    """Return the rate of a weight under AdamW over --learning_rate, at most 1."""
    role, power = role_of(name)
    return min(1.0, BASE / (text_dim if role == "text" else width)) ** power


def muon_factor(width: int) -> float:
    """Return the rate of Muon over --muon_learning_rate, at most 1."""
    return min(1.0, BASE / width) ** MUON_POWER


def muon_decay(weight_decay: float, rate: float, num_steps: int | None) -> float:
    """Return the decay of Muon that leaves at least KEPT_SHARE of the initial weights, at most `weight_decay`.

    Muon multiplies its weights by 1 - rate * decay in each step, and a schedule averages half of its peak. Source
    of a timescale in shares of a run: Wang and Aitchison 2024 (arXiv 2405.13698).
    """
    return min(weight_decay, -2 * math.log(KEPT_SHARE) / (rate * num_steps)) if num_steps else weight_decay


def make_optimizers(
    settings: Any,
    network: nn.Module,
    head: nn.Module | None = None,
    rate: float | None = None,
    is_fused: bool = False,
) -> list[torch.optim.Optimizer]:
    """Return AdamW for a network and its `head`, and Muon for the matrices of its blocks unless its rate is 0.

    `rate` replaces --learning_rate, and Muon's rate keeps its ratio to that. `is_fused` updates all of AdamW's
    tensors in one kernel.
    """
    rate = settings.learning_rate if rate is None else rate
    groups = _group_weights(network, head)
    width = network.get_parameter(TEXT_INPUT).shape[0]
    muon_rate = settings.muon_learning_rate * rate / settings.learning_rate * muon_factor(width)
    matrices = [groups.pop(key) for key in list(groups) if muon_rate and key[0] == "blocks"]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": weights, "lr": rate * factor, "role": role}
                for (role, factor), weights in groups.items()
            ],
            lr=rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            fused=is_fused or None,
        )
    ]
    if matrices:
        optimizers.append(
            StackedMuon(
                [{"params": matrices[0], "role": "blocks"}],
                lr=muon_rate,
                weight_decay=muon_decay(settings.adam_weight_decay, muon_rate, settings.max_train_steps),
            )
        )
    return optimizers


def _group_weights(network, head):
    """Return {(role, factor of the rate): weights}, the highest rates first."""
    width, text_dim = network.get_parameter(TEXT_INPUT).shape
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    heads = ((f"{HEAD}{name}", weight) for name, weight in (head.named_parameters() if head else ()))
    for name, weight in chain(network.named_parameters(), heads):
        factor = rate_factor(name, width, text_dim)
        groups.setdefault((role_of(name)[0], factor), []).append(weight)
    return dict(sorted(groups.items(), key=lambda group: -group[0][1]))


def make_lr_schedulers(
    settings: Any, optimizers: Iterable[torch.optim.Optimizer], phases: Iterable[Span] = ()
) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """Return a learning-rate schedule for each optimizer, with a cycle per kind of phase, or one without `phases`.

    The few-step phase has other targets than the velocity phase and starts from the peak again: a short one at the
    end of a common decay hardly trains.
    """
    lengths: dict[str, int] = {}
    for span in phases:
        lengths[span.name] = lengths.get(span.name, 0) + span.last - span.first
    return [
        _make_lr_scheduler(settings, each, list(lengths.values()) or [settings.max_train_steps])
        for each in optimizers
    ]


def _make_lr_scheduler(settings, optimizer, lengths):
    """Return the schedule of one optimizer with a cycle of each of `lengths` steps, one after the other."""
    cycles = [
        get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=min(settings.lr_warmup_steps, length // WARMUP_PART),
            num_training_steps=length,
        ).lr_lambdas[0]
        for length in lengths
    ]
    firsts = [0, *accumulate(lengths)]

    def factor(step):
        number = min(bisect_right(firsts, step), len(cycles)) - 1
        return cycles[number](step - firsts[number])

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def halve_rates(lr_schedulers: Iterable[torch.optim.lr_scheduler.LambdaLR]) -> None:
    """Halve the peaks of schedules, from their next step on; they are part of the schedules' state."""
    for lr_scheduler in lr_schedulers:
        lr_scheduler.base_lrs = [peak / 2 for peak in lr_scheduler.base_lrs]


def sample_weights(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, list[torch.Tensor]]:
    """Return copies of at most SAMPLED evenly spaced values of each weight, by role."""
    samples: dict[str, list[torch.Tensor]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        samples.setdefault(group["role"], []).extend(_sample(weight) for weight in group["params"])
    return samples


def _sample(weight):
    values = weight.detach().flatten()
    stride = math.ceil(len(values) / SAMPLED) | 1  # odd, so that it meets every column of a matrix
    return values[::stride].clone()


def update_ratios(
    optimizers: Iterable[torch.optim.Optimizer], before: dict[str, list[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return RMS(step) / RMS(weight) by role since sample_weights(), on the device of the weights."""
    after = sample_weights(optimizers) if before else {}
    return {
        role: _rms([new - old for new, old in zip(after[role], samples)]) / _rms(samples).clamp(min=1e-12)
        for role, samples in before.items()
    }


def _rms(tensors):
    return torch.cat(tensors).square().mean().sqrt()
