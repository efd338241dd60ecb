"""Inputs of a linear layer and residuals of its outputs -> the change of its weight and bias."""

import torch
from torch import Tensor
from torch.nn import functional as F


def solve_ridge(
    inputs: Tensor, residual: Tensor, ridge: float, weight: Tensor | None = None, has_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias, in float32, of the ridge regression from `inputs` to `residual`.

    Shapes: inputs (rows, in), residual (rows, out), row weights (rows, 1); returns (out, in) and (out,).
    `ridge` is relative to the mean diagonal of the Gram matrix. Without `has_bias` the bias is zero. The arithmetic is
    in float64.
    """
    rows = F.pad(
        inputs, (0, 1), value=float(has_bias)
    ).double()  # (rows, in + 1): the last column is the bias
    weighted = rows if weight is None else rows * weight
    gram = weighted.T @ rows  # (in + 1, in + 1)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(gram, weighted.T @ residual.double()).T.float()  # (out, in + 1)
    return change[:, :-1], change[:, -1]
