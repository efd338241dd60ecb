"""The teacher's time and text embedders -> the student's, refitted on a grid of timesteps and on prompts.

Legend: D d teacher and student width, T text width, G timesteps of the grid, S text tokens.
"""

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor
from torch.nn import functional as F

from ..schedule import TIMESTEPS
from .pruning import SCALE, Linear, top_indices
from .regression import solve_ridge
from .tensors import TensorReader, TensorWriter

TEXT_SAMPLES = 4096  # text tokens that the text embedder is refitted on
RIDGE = 1e-6  # relative to the mean Gram diagonal
TIME_LAYERS = [
    f"condition_embedder.{layer}"
    for layer in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")
]
TEXT_LAYERS = [f"condition_embedder.text_embedder.linear_{number}" for number in (1, 2)]


@dataclass
class TimeStates:
    """The outputs of the teacher's time embedder on the grid of timesteps."""

    neurons: Tensor  # (G, D)
    embedding: Tensor  # (G, D)
    modulation: Tensor  # (G, 6, D)


def embed_timesteps(reader: TensorReader, freq_dim: int) -> TimeStates:
    """Compute the teacher's time embedder on all whole timesteps."""
    first, second = (_read_linear(reader, layer) for layer in TIME_LAYERS[:2])
    grid = torch.linspace(0, TIMESTEPS, TIMESTEPS + 1, device=first[0].device)  # (G,)
    waves = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)(grid)
    neurons = F.silu(F.linear(waves, *first))
    embedding = F.linear(neurons, *second)
    bias = reader(f"{TIME_LAYERS[2]}.bias").unflatten(0, (6, -1))
    rows = [F.linear(F.silu(embedding), weight, bias[row]) for row, weight in enumerate(_six_rows(reader))]
    return TimeStates(neurons, embedding, torch.stack(rows, 1))


def _read_linear(reader, layer) -> Linear:
    return reader(f"{layer}.weight"), reader(f"{layer}.bias")


def _write_linear(writer, layer, weight, bias):
    writer[f"{layer}.weight"], writer[f"{layer}.bias"] = weight, bias


def _six_rows(reader):
    """Yield the matrix of the modulation in six pieces (D, D): shift, scale and gate of both components."""
    width = reader.files.width
    for row in range(6):
        yield reader(f"{TIME_LAYERS[2]}.weight", slice(row * width, (row + 1) * width))


def project_time(
    reader: TensorReader, states: TimeStates, channels: Tensor, norm_scale: float, writer: TensorWriter
) -> None:
    """Keep the most used neurons of the time embedder, and refit the layers after them on the grid."""
    (first, first_bias), (second, second_bias) = (_read_linear(reader, layer) for layer in TIME_LAYERS[:2])
    third = torch.cat([weight[channels] for weight in _six_rows(reader)])[:, channels]  # (6d, d)
    third_bias = reader(f"{TIME_LAYERS[2]}.bias").unflatten(0, (6, -1))[:, channels].flatten()
    neurons = top_indices(second[channels].square().sum(0) * first.square().sum(1), len(channels))
    inputs = states.neurons[:, neurons]  # (G, d)
    pruned = second[channels][:, neurons], second_bias[channels]
    second, second_bias = _refit(pruned, inputs, states.embedding[:, channels])
    embedding = F.silu(F.linear(inputs, second, second_bias))
    third, third_bias = _refit((third, third_bias), embedding, states.modulation[:, :, channels].flatten(1))
    stretch = torch.ones(6, len(channels), device=channels.device)  # the kept channels' LayerNorm statistic
    stretch[list(SCALE)] = norm_scale
    stretch = stretch.flatten()
    _write_linear(writer, TIME_LAYERS[0], first[neurons], first_bias[neurons])
    _write_linear(writer, TIME_LAYERS[1], second, second_bias)
    _write_linear(writer, TIME_LAYERS[2], third * stretch[:, None], third_bias * stretch)


def project_text(
    reader: TensorReader, width: int, samples: Tensor | None, writer: TensorWriter
) -> tuple[Tensor, float]:
    """Keep the most used neurons of the text embedder and the principal directions of its outputs.

    `samples` (S, T) are prompt embeddings; without them, normal random numbers are used. Returns the directions
    (D, d) and their share of the outputs' energy.
    """
    (first, first_bias), (second, second_bias) = (_read_linear(reader, layer) for layer in TEXT_LAYERS)
    if width == len(second):
        _write_linear(writer, TEXT_LAYERS[0], first, first_bias)
        _write_linear(writer, TEXT_LAYERS[1], second, second_bias)
        return torch.eye(width, device=first.device), 1.0
    samples = _text_samples(samples, first.shape[1]).to(first.device)
    activations = F.gelu(samples @ first.T + first_bias, approximate="tanh")  # (S, D)
    outputs = activations @ second.T + second_bias  # (S, D)
    energy, basis = torch.linalg.eigh(outputs.T @ outputs)
    basis = basis[:, -width:]
    basis = basis * torch.where(basis.sum(0) < 0, -1.0, 1.0)  # the sign differs between LAPACKs
    neurons = top_indices(second.square().sum(0) * activations.square().mean(0), width)
    pruned = basis.T @ second[:, neurons], basis.T @ second_bias
    weight, bias = _refit(pruned, activations[:, neurons], outputs @ basis)
    _write_linear(writer, TEXT_LAYERS[0], first[neurons], first_bias[neurons])
    _write_linear(writer, TEXT_LAYERS[1], weight, bias)
    return basis, float(energy[-width:].sum() / energy.sum())


def _text_samples(samples, width):
    """Return at most TEXT_SAMPLES evenly spaced text tokens, and a zero token, as in padding, for every 16."""
    if samples is None:
        samples = torch.randn(TEXT_SAMPLES, width, generator=torch.Generator().manual_seed(0))
    samples = samples[:: max(1, len(samples) // TEXT_SAMPLES)].float()
    return torch.cat([samples, torch.zeros(max(1, len(samples) // 16), width)])


def _refit(layer: Linear, inputs, target) -> Linear:
    """Return a layer refitted to `target`, or the given layer if it is exact already."""
    weight, bias = layer
    residual = target - (inputs @ weight.T + bias)
    if residual.abs().max() <= 1e-5 * target.abs().max():
        return layer
    weight_change, bias_change = solve_ridge(inputs, residual, RIDGE)
    return weight + weight_change, bias + bias_change
