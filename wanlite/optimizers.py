"""What moves the weights: Muon for the matrices of the blocks, AdamW for the rest, under one schedule each."""

import torch
from diffusers.optimization import get_scheduler


def make_optimizers(settings, student, feature_head):
    """Return the optimizers and their schedules; AdamW alone where --muon_learning_rate is 0."""
    matrices = [p for name, p in student.named_parameters()
                if settings.muon_learning_rate and name.startswith("blocks.") and p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in (*student.parameters(), *feature_head.parameters()) if id(p) not in taken]
    optimizers = [torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, settings.adam_beta2),
                                    weight_decay=settings.adam_weight_decay)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.adam_weight_decay))
    rates = [get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps,
                           num_training_steps=settings.max_train_steps) for optimizer in optimizers]
    return optimizers, rates
