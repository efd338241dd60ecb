"""Two experts of a teacher -> whether they are two, each in its place, and how alike their weights are."""

import torch
from torch import nn
from tqdm import tqdm

from .model import Expert, stream_expert

PROBE_LEVELS = (0.3, 0.99)  # noise levels of the low and of the high expert, far from the boundary
PROBE_MARGINS = (
    2.0,
    1.2,
)  # how many times more noise than the other the wrong expert must leave, at each level
PROBE_LIMIT = 0.1  # the share of the noise that a trained expert leaves at most, at its own level
PROBE_FRAMES, PROBE_SIZE = 4, (24, 24)
PROBE_ROWS = 2 * PROBE_FRAMES  # of an expert's pass: the frames at each level


@torch.no_grad()
def check_experts(files, device="cpu"):
    """Refuse two experts that are one, or that stand in each other's folder; returns their weights' cosine
    per group.

    An expert's guess of the clean picture must not depend on which noise was added. So a flat frame meets
    several noises at a level of each expert, and the variance of the guesses is the noise that an expert
    leaves. The experts have changed places only if each clearly leaves more at the level of its own folder:
    one that is merely the worse everywhere is let through, and so are two that know no noise at all. Reads
    each expert once, in step, one block of each in memory, in float32. Returns {} for a teacher with one
    expert. Raises ValueError.
    """
    if len(files.experts) < 2:
        return {}
    high, low = files.experts["high"], files.experts["low"]
    if _are_identical(high, low):
        raise ValueError(
            f"{files.folder}: {high.folder.name} and {low.folder.name} hold the same weights, expected two "
            f"experts. "
            "Download the one that is a copy again."
        )
    pair = _PairedExperts(high, low, device)
    left = noise_left(pair)
    if have_changed_places(left):
        shares = "; ".join(
            f"at noise level {level} they leave {ours:.2g} and {theirs:.2g} of the noise"
            for level, ours, theirs in zip(PROBE_LEVELS, *left)
        )
        raise ValueError(
            f"{files.folder}: {high.folder.name} and {low.folder.name} hold each other's weights: {shares}. "
            f"Exchange "
            "their names."
        )
    return pair.cosines()


def _are_identical(high, low):
    """Compare one row of every tensor, then whole tensors; stops at the first difference."""
    return all(
        torch.equal(high.read(name, rows=rows), low.read(name, rows=rows))
        for rows in (slice(0, 1), None)
        for name in high.places
    )


@torch.no_grad()
def noise_left(pair, seed=0):
    """Return the share of the noise's variance in the guesses of (high, low) at PROBE_LEVELS: ((float,
    float), (float, float)).
    """
    channels, generator = pair.config.in_channels, torch.Generator().manual_seed(seed)
    noise = torch.randn(PROBE_FRAMES, channels, *PROBE_SIZE, generator=generator)
    level = (
        torch.tensor(PROBE_LEVELS).repeat_interleave(PROBE_FRAMES).repeat(2)[:, None, None, None]
    )  # (expert level frame)
    noisy = (level * noise.repeat(4, 1, 1, 1)).to(pair.device)  # clean is 0: a flat frame
    padding = noisy.new_zeros(len(noisy), 1, pair.config.text_dim)  # all that an empty prompt has
    velocity, _ = pair(noisy, 1000 * level.flatten().to(pair.device), padding)
    guess = noisy / level.to(pair.device) - velocity  # in units of the noise
    variance = guess.unflatten(0, (2, 2, -1)).var(2).mean((2, 3, 4))  # (expert, level)
    return tuple(map(tuple, variance.tolist()))


def have_changed_places(left):
    """Say whether `left`, what noise_left returns, is clear at both levels."""
    (high_at_low, high_at_high), (low_at_low, low_at_high) = left
    are_trained = max(min(high_at_low, low_at_low), min(high_at_high, low_at_high)) < PROBE_LIMIT
    return (
        are_trained
        and low_at_low > PROBE_MARGINS[0] * high_at_low
        and high_at_high > PROBE_MARGINS[1] * low_at_high
    )


class _PairedExperts(nn.Module):
    """Two streamed experts as one network: the first half of a batch is the high expert's, the second half
    the low one's.
    """

    forward = Expert.forward

    def __init__(self, high, low, device):
        super().__init__()
        experts = stream_expert(high, device), stream_expert(low, device)
        self.config, self.device, self.products = experts[0].config, torch.device(device), {}
        self.rope, self.norm_out = experts[0].rope, experts[0].norm_out  # neither has weights
        for name in ("patch_embedding", "condition_embedder", "proj_out"):
            setattr(self, name, _Pair(*(getattr(expert, name) for expert in experts)))
        self.scale_shift_table = torch.cat(
            [expert.scale_shift_table.expand(2 * PROBE_FRAMES, -1, -1) for expert in experts]
        )
        self._streams = [expert.blocks for expert in experts]
        self._multiply(*experts)

    @property
    def blocks(self):
        """Yield each block of both experts as a pair, which is empty once the next is asked for."""
        streams = [iter(stream) for stream in self._streams]
        for _ in tqdm(range(len(self._streams[0])), desc="comparing experts", unit="block", disable=None):
            pair = _Pair(*map(next, streams))
            self._multiply(*pair.parts)
            yield pair
            pair.parts = None

    def _multiply(self, *parts):
        """Add the inner products of two modules' weights, (ours theirs, ours ours, theirs theirs), to those
        of their groups.
        """
        for (name, ours), theirs in zip(parts[0].named_parameters(), parts[1].parameters()):
            group = name.split(".")[0] if name.split(".")[0] in ("attn1", "attn2", "ffn") else "rest"
            ours, theirs = ours.flatten(), theirs.flatten()
            found = torch.stack([ours @ theirs, ours @ ours, theirs @ theirs]).cpu().double()
            self.products[group] = self.products.get(group, 0) + found

    def cosines(self):
        """Return the cosine per group of the weights that were met so far."""
        return {
            group: float(both / (ours * theirs).sqrt())
            for group, (both, ours, theirs) in sorted(self.products.items())
        }


class _Pair(nn.Module):
    """Two modules as one, each for half of the batch; what is no tensor goes to both."""

    def __init__(self, first, second):
        super().__init__()
        self.parts = nn.ModuleList([first, second])

    def forward(self, *arguments):
        halves = [
            argument.chunk(2) if isinstance(argument, torch.Tensor) else (argument, argument)
            for argument in arguments
        ]
        first, second = (part(*half) for part, half in zip(self.parts, zip(*halves)))
        if isinstance(first, torch.Tensor):
            return torch.cat([first, second])
        return [None if ours is None else torch.cat([ours, theirs]) for ours, theirs in zip(first, second)]
