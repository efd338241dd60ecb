"""Muon in batched products: all matrices of one shape go through the Newton-Schulz iteration together.

A network of equal blocks has many matrices of few shapes. One by one they cost thousands of launches on a GPU, and on
a CPU more time between the products than in them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_STACKED = 2**25  # values of a stack, at most, unless one matrix has more: 64 MiB in bfloat16


class StackedMuon(torch.optim.Muon):
    """torch.optim.Muon with the same arguments, state and updates."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, weights, gradients, momenta)
            if weights:
                _update(group, weights, gradients, momenta)
        return loss


def _update(group, weights, gradients, momenta):
    """Update the weights of a group and their momenta, in place."""
    momentum, rate = group["momentum"], float(group["lr"])
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    updates = torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
    torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
    for numbers in stack_numbers(weights):
        rows, columns = weights[numbers[0]].shape
        stack = torch.stack([updates[number].bfloat16() for number in numbers])
        stack = orthogonalize(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
        scale = _scale(group["adjust_lr_fn"], rows, columns)
        for number, update in zip(numbers, stack):
            weights[number].add_(update, alpha=-rate * scale)


def stack_numbers(matrices: Sequence[Tensor]) -> Iterable[list[int]]:
    """Yield the numbers of matrices of one shape, in stacks of at most MAX_STACKED values."""
    by_shape: dict[tuple, list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape, matrix.device), []).append(number)
    for (shape, _), numbers in by_shape.items():
        at_once = max(1, MAX_STACKED // shape.numel())
        yield from (numbers[start : start + at_once] for start in range(0, len(numbers), at_once))


def orthogonalize(
    stack: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    """Return the nearest orthogonal matrices of a stack (K, R, C), about, by the Newton-Schulz iteration.

    Source: Jordan 2024, as in torch.optim.Muon.
    """
    a, b, c = coefficients
    stack = stack / torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=eps)
    is_tall = stack.shape[1] > stack.shape[2]
    stack = stack.mT if is_tall else stack
    for _ in range(num_steps):
        gram = stack @ stack.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, gram, stack, beta=a)
    return stack.mT if is_tall else stack


def _scale(name, rows, columns):
    """Return the factor of the rate by a matrix's shape, as torch.optim.Muon names it."""
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
