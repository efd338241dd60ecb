"""The two experts of a teacher -> an error if they are one or swapped, and the similarity of their weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..schedule import TIMESTEPS
from .expert_files import ExpertFiles, TeacherFiles
from .model import Expert, stream_expert

Shares = tuple[tuple[float, float], tuple[float, float]]  # (expert, level)
PROBE_LEVELS = (0.3, 0.99)  # noise levels of the low and of the high expert, far from the boundary
PROBE_MARGINS = (2.0, 1.2)  # at each level, the least ratio of the wrong expert's noise to the right one's
PROBE_LIMIT = 0.1  # the largest share of the noise that a trained expert leaves at its own level
PROBE_FRAMES, PROBE_SIZE = 4, (24, 24)
PROBE_ROWS = 2 * PROBE_FRAMES  # of an expert's pass: the frames at each level


@torch.no_grad()
def check_experts(files: TeacherFiles, device: str | torch.device = "cpu") -> dict[str, float]:
    """Raise ValueError for two experts that are one, or swapped; returns their weights' cosine per group.

    An expert's guess of the clean image must not depend on the noise that was added. So a flat frame gets
    several noises at a level of each expert, and the variance of the guesses is the noise that an expert
    leaves. The experts are swapped only if each clearly leaves more at the level of its own folder: an expert
    that is merely worse everywhere passes, and so do two that do not denoise at all. Both experts are read
    once, in step, one block of each in memory, in float32. Returns {} for a teacher with one expert.
    """
    if len(files.experts) < 2:
        return {}
    high, low = files.experts["high"], files.experts["low"]
    if _are_identical(high, low):
        raise ValueError(
            f"{files.folder}: {high.folder.name} and {low.folder.name} hold the same weights, expected two "
            "experts. Download the one that is a copy again."
        )
    pair = _PairedExperts(high, low, device)
    shares = measure_noise_left(pair)
    if are_swapped(shares):
        found = "; ".join(
            f"at noise level {level} they leave {of_high:.2g} and {of_low:.2g} of the noise"
            for level, of_high, of_low in zip(PROBE_LEVELS, *shares)
        )
        raise ValueError(
            f"{files.folder}: {high.folder.name} and {low.folder.name} hold each other's weights: {found}. "
            "Swap their names."
        )
    return pair.cosines()


def _are_identical(high: ExpertFiles, low: ExpertFiles) -> bool:
    """Compare one row of every tensor, then whole tensors; stops at the first difference."""
    return all(
        torch.equal(high.read(name, rows=rows), low.read(name, rows=rows))
        for rows in (slice(0, 1), None)
        for name in high.places
    )


@torch.no_grad()
def measure_noise_left(pair: "_PairedExperts", seed: int = 0) -> Shares:
    """Return the share of the noise's variance in the guesses of (high, low) at each of PROBE_LEVELS."""
    channels, generator = pair.config.in_channels, torch.Generator().manual_seed(seed)
    noise = torch.randn(PROBE_FRAMES, channels, *PROBE_SIZE, generator=generator)
    level = (
        torch.tensor(PROBE_LEVELS).repeat_interleave(PROBE_FRAMES).repeat(2)[:, None, None, None]
    )  # (expert level frame)
    noisy = (level * noise.repeat(4, 1, 1, 1)).to(pair.device)  # clean is 0: a flat frame
    padding = noisy.new_zeros(len(noisy), 1, pair.config.text_dim)  # the whole of an empty prompt
    velocity, _ = pair(noisy, TIMESTEPS * level.flatten().to(pair.device), padding)
    guess = noisy / level.to(pair.device) - velocity  # in units of the noise
    variance = guess.unflatten(0, (2, 2, -1)).var(2).mean((2, 3, 4))  # (expert, level)
    (high, low) = variance.tolist()
    return tuple(high), tuple(low)


def are_swapped(shares: Shares) -> bool:
    """Whether the shares of measure_noise_left() show it clearly at both levels."""
    (high_at_low, high_at_high), (low_at_low, low_at_high) = shares
    are_trained = max(min(high_at_low, low_at_low), min(high_at_high, low_at_high)) < PROBE_LIMIT
    return (
        are_trained
        and low_at_low > PROBE_MARGINS[0] * high_at_low
        and high_at_high > PROBE_MARGINS[1] * low_at_high
    )


class _PairedExperts(nn.Module):
    """Two streamed experts as one network: the first half of a batch is the high expert's, the second the low one's."""

    forward = Expert.forward  # type: ignore[assignment]

    def __init__(self, high: ExpertFiles, low: ExpertFiles, device: str | torch.device):
        super().__init__()
        experts = stream_expert(high, device), stream_expert(low, device)
        self.config, self.device = experts[0].config, torch.device(device)
        self.products: dict[str, Tensor] = {}
        self.rope, self.norm_out = experts[0].rope, experts[0].norm_out  # without weights in both
        for name in ("patch_embedding", "condition_embedder", "proj_out"):
            setattr(self, name, _Pair(*(getattr(expert, name) for expert in experts)))
        self.scale_shift_table = torch.cat(
            [expert.scale_shift_table.expand(2 * PROBE_FRAMES, -1, -1) for expert in experts]
        )
        self._streams = [expert.blocks for expert in experts]
        self._multiply(*experts)

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """Yield each block of both experts as a pair, which is empty once the next is read."""
        streams = [iter(stream) for stream in self._streams]
        for _ in tqdm(range(len(self._streams[0])), desc="comparing experts", unit="block", disable=None):
            parts = [next(stream) for stream in streams]
            self._multiply(*parts)
            pair = _Pair(*parts)
            del parts
            yield pair
            del pair.parts

    def _multiply(self, first: nn.Module, second: nn.Module) -> None:
        """Add the inner products of two modules' weights, (both, first, second), to those of their groups."""
        for (name, ours), theirs in zip(first.named_parameters(), second.parameters()):
            group = name.split(".")[0] if name.split(".")[0] in ("attn1", "attn2", "ffn") else "rest"
            x, y = ours.flatten(), theirs.flatten()
            found = torch.stack([x @ y, x @ x, y @ y]).cpu().double()
            self.products[group] = self.products.get(group, torch.zeros(())) + found

    def cosines(self) -> dict[str, float]:
        """Return the cosine per group of the weights that have been read so far."""
        return {
            group: float(both / (ours * theirs).sqrt())
            for group, (both, ours, theirs) in sorted(self.products.items())
        }


class _Pair(nn.Module):
    """Two modules as one, each for half of the batch; arguments other than tensors go to both."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList([first, second])

    def forward(self, *arguments: Any) -> Any:
        halves = [
            argument.chunk(2) if isinstance(argument, Tensor) else (argument, argument)
            for argument in arguments
        ]
        first, second = (part(*half) for part, half in zip(self.parts, zip(*halves)))
        if isinstance(first, Tensor):
            return torch.cat([first, second])
        return [None if ours is None else torch.cat([ours, theirs]) for ours, theirs in zip(first, second)]
