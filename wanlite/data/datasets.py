"""Shards of trajectories -> states, numbered, and batches of their numbers.

Legend: B batch, K states a trajectory, n trajectories of a shard, C channels, H W latent height and width, N image
tokens, D feature width.
"""

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..flow import add_noise, clean_from
from .shards import SCALE, dequantize, read_shard

EPOCH_SEED = 1_000_003  # seeds of two runs are less apart than this


class Trajectories(Dataset):
    """Every state of every trajectory in a folder, memory-mapped.

    Shards hold `latents` and `velocity` (n, K, C, H, W) and, of the teacher's trajectories, `features` (n, K, n',
    D) of tokens from `first_token` (n, K) on, in int8 with their scales; `timestep` and `noise_level` (n, K),
    `prompt` (n,). A list of state numbers gives a batch, a dict, in float32.
    """

    def __init__(self, folder: Path, num_shards: int):
        self._set_shards([read_shard(folder, index) for index in range(num_shards)])

    def _set_shards(self, shards):
        self.shards = shards
        self.states_each = self.shards[0]["timestep"].shape[1]
        counts = torch.tensor([len(shard["prompt"]) for shard in self.shards])
        self.starts = counts.cumsum(0) * self.states_each

    def __len__(self):
        return int(self.starts[-1])

    def __add__(self, other):
        """Return the states of both; trajectories of both have the same number of states."""
        both = copy.copy(self)
        both._set_shards([*self.shards, *other.shards])
        return both

    def __getitems__(self, numbers, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        numbers = torch.as_tensor(numbers)
        shard_of = torch.searchsorted(self.starts, numbers, right=True)
        parts, order = [], []
        for index in shard_of.unique().tolist():
            places = (shard_of == index).nonzero().flatten()
            own = numbers[places] - (int(self.starts[index - 1]) if index else 0)
            rows, states = own // self.states_each, own % self.states_each
            shard = self.shards[index]
            wanted = names or [name for name in shard if name != "prompt" and not name.endswith(SCALE)]
            part = {name: dequantize(shard, name, rows, states) for name in wanted}
            parts.append(part | {"prompt": shard["prompt"][rows]})
            order.append(places)
        back = torch.cat(order).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def in_order(self, numbers: Sequence[int]) -> Sequence[int]:
        """Return the state numbers of a batch in the order of its rows."""
        return numbers

    def ends(self, rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise and image (B, C, H, W) of the trajectories `rows`, and the numbers of their prompts
        (B,).
        """
        rows, names = torch.as_tensor(rows), ("latents", "velocity", "noise_level")
        first = self.__getitems__(rows * self.states_each, names)
        last = self.__getitems__(rows * self.states_each + self.states_each - 1, names)
        image = clean_from(last["latents"].float(), last["velocity"].float(), last["noise_level"])
        return first["latents"].float(), image, first["prompt"]


class FewStepStates(Dataset):
    """States for few-step training: states that few steps pass, the teacher's image, and the average velocity
    to it.

    In this order: the noise that every trajectory starts from; one state of every trajectory on the straight line
    from its noise to its image, which a student follows whose first step was right; and the states of student
    rollouts, `rollout`. `levels` are the (timestep, noise level) that few steps pass, noise first.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        levels: Sequence[tuple[float, float]],
        rollout: Trajectories | None = None,
    ):
        self.trajectories, self.levels, self.rollout = trajectories, torch.tensor(levels), rollout
        self.num_trajectories = len(trajectories) // trajectories.states_each
        self.num_lines = self.num_trajectories if len(levels) > 1 else 0

    def __len__(self):
        return self.num_trajectories + self.num_lines + len(self.rollout or ())

    def in_order(self, numbers: Sequence[int]) -> Sequence[int]:
        """Return the state numbers of a batch in the order of its rows: states of rollouts last.

        Ranks that share out numbers in this order have the rows of one batch.
        """
        return sorted(numbers, key=lambda number: number >= self.num_trajectories + self.num_lines)

    def __getitems__(self, numbers) -> dict[str, Tensor]:
        numbers = torch.as_tensor(numbers)
        is_rollout = numbers >= self.num_trajectories + self.num_lines
        found = []
        if len(lines := numbers[~is_rollout]):
            found.append(self._line_states(lines))
        if self.rollout is not None and is_rollout.any():
            first = self.num_trajectories + self.num_lines
            found.append(_rollout_states(self.rollout, numbers[is_rollout] - first))
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _line_states(self, numbers):
        noise, image, prompt = self.trajectories.ends(numbers % self.num_trajectories)
        later = 1 + numbers % max(1, len(self.levels) - 1)
        levels = self.levels[torch.where(numbers < self.num_trajectories, 0, later)]
        timestep, noise_level = levels.unbind(1)
        return {
            "latents": add_noise(image, noise, noise_level),
            "velocity": noise - image,
            "timestep": timestep,
            "noise_level": noise_level,
            "image": image,
            "prompt": prompt,
        }


def _rollout_states(rollout, numbers):
    states = rollout.__getitems__(numbers)
    states |= {name: states[name].float() for name in ("latents", "velocity")}
    return states | {"image": clean_from(states["latents"], states["velocity"], states["noise_level"])}


class Buckets(Dataset):
    """Datasets of one latent shape each, with their states numbered one dataset after the other.

    A batch has states of one dataset.
    """

    def __init__(self, datasets: Sequence[Trajectories | FewStepStates]):
        self.datasets, self.sizes = datasets, [len(dataset) for dataset in datasets]
        self.starts = [0, *accumulate(self.sizes)]

    def __len__(self):
        return self.starts[-1]

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        index = bisect_right(self.starts, numbers[0]) - 1
        return self.datasets[index].__getitems__([number - self.starts[index] for number in numbers])

    def in_order(self, numbers: Sequence[int]) -> Sequence[int]:
        """Return the state numbers of a batch in the order of its rows."""
        index = bisect_right(self.starts, numbers[0]) - 1
        own = self.datasets[index].in_order([number - self.starts[index] for number in numbers])
        return [number + self.starts[index] for number in own]


class SeededBatches(Sampler):
    """Batches of state numbers in an order that is a function of (seed, epoch) alone, from batch `first` to
    batch `last`.

    `num_states` is their number or, for Buckets, a list of the number in each: a batch has states of one.
    """

    def __init__(self, num_states: int | list[int], batch_size: int, seed: int, first: int, last: int):
        self.sizes = [num_states] if isinstance(num_states, int) else num_states
        if min(self.sizes) < batch_size:
            fewer = ", or name fewer --aspect_ratios" if len(self.sizes) > 1 else ""
            raise ValueError(
                f"{min(self.sizes)} cached states are fewer than one batch of {batch_size}: raise "
                f"--num_trajectories or lower --train_batch_size{fewer}."
            )
        self.batch_size, self.seed, self.first, self.last = batch_size, seed, first, last

    def __len__(self):
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        batches_each = sum(size // self.batch_size for size in self.sizes)
        epoch, batches = None, []
        for batch in range(self.first, self.last):
            if epoch != batch // batches_each:
                epoch = batch // batches_each
                batches = self._shuffle(epoch)
            yield batches[batch % batches_each].tolist()

    def _shuffle(self, epoch):
        """Return an epoch's batches: all complete ones of every bucket, with the buckets mixed."""
        generator = torch.Generator().manual_seed(self.seed * EPOCH_SEED + epoch)
        batches, start = [], 0
        for size in self.sizes:
            order = start + torch.randperm(size, generator=generator)
            batches += order.split(self.batch_size)[: size // self.batch_size]
            start += size
        if len(self.sizes) == 1:
            return batches
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
