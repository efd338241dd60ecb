"""What moves the weights: Muon for the matrices of the blocks, AdamW for the rest, under one schedule each."""

from itertools import chain

import torch
from diffusers.optimization import get_scheduler


def make_optimizers(settings, network, head=None, rate=None, is_fused=False):
    """Return AdamW for a network and what learns beside it, and Muon for the matrices of its blocks unless
    its rate is 0.

    `rate` stands in for --learning_rate; Muon's keeps its ratio to it. `is_fused` updates all of AdamW's
    tensors in one kernel.
    """
    rate = settings.learning_rate if rate is None else rate
    muon_rate = settings.muon_learning_rate * rate / settings.learning_rate
    matrices = [
        p
        for name, p in network.named_parameters()
        if muon_rate and name.startswith("blocks.") and p.ndim == 2
    ]
    taken = {id(p) for p in matrices}
    others = [p for p in chain(network.parameters(), head.parameters() if head else ()) if id(p) not in taken]
    optimizers = [
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


def make_lr_schedulers(settings, optimizers):
    """Return the schedule of every optimizer's rate over the whole run."""
    return [
        get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        for optimizer in optimizers
    ]
