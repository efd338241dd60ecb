"""Optimizers: Muon for the matrices of the blocks, AdamW for all other weights, each with its learning-rate schedule."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn


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
    muon_rate = settings.muon_learning_rate * rate / settings.learning_rate
    matrices = [
        p
        for name, p in network.named_parameters()
        if muon_rate and name.startswith("blocks.") and p.ndim == 2
    ]
    in_muon = {id(p) for p in matrices}
    others = [
        p for p in chain(network.parameters(), head.parameters() if head else ()) if id(p) not in in_muon
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            others,
            lr=rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            fused=is_fused or None,
        )
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_rate, weight_decay=settings.adam_weight_decay))
    return optimizers


def make_lr_schedulers(
    settings: Any, optimizers: Iterable[torch.optim.Optimizer]
) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """Return a learning-rate schedule over the whole run for each optimizer."""
    return [
        get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        for optimizer in optimizers
    ]
