"""Shards of trajectories -> datasets of states, and seeded batches of state numbers.

Legend: B batch, K states per trajectory, n trajectories per shard, C channels, H W latent height and width, N
image tokens, D feature width.
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

ROWS_AT_NOISE = (
    8  # the number of leading rows that hold all states at noise is a multiple: few sizes for a compiler
)
EPOCH_SEED = 1_000_003  # distance between the seeds of two runs, larger than any number of epochs


class Trajectories(Dataset):
    """All states of the trajectories in some shards, memory-mapped.

    Shards hold `latents` and `velocity` (n, K, C, H, W) and, for the teacher's trajectories, `features` (n, K, N,
    D) of the tokens from `first_token` (n, K) on, in int8 with their scales; `timestep` and `noise_level` (n, K),
    and `prompt` (n,), a number. A list of state numbers selects a batch, a dict of tensors.
    """

    def __init__(self, paths: Sequence[Path]):
        self._set_shards([read_shard(path) for path in paths])

    def _set_shards(self, shards):
        self.shards = shards
        self.states_each = self.shards[0]["timestep"].shape[1]
        counts = torch.tensor([len(shard["prompt"]) for shard in self.shards])
        self.starts = counts.cumsum(0) * self.states_each

    def __len__(self):
        return int(self.starts[-1])

    def __add__(self, other):
        """Return the states of both datasets, whose trajectories have the same number of states."""
        combined = copy.copy(self)
        combined._set_shards([*self.shards, *other.shards])
        return combined

    def __getitems__(self, numbers, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        numbers = torch.as_tensor(numbers)
        shard_of = torch.searchsorted(self.starts, numbers, right=True)
        chunks, positions = [], []
        for index in shard_of.unique().tolist():
            in_shard = (shard_of == index).nonzero().flatten()
            own = numbers[in_shard] - (int(self.starts[index - 1]) if index else 0)
            rows, states = own // self.states_each, own % self.states_each
            shard = self.shards[index]
            shard.check_unchanged()
            wanted = names or [name for name in shard if name != "prompt" and not name.endswith(SCALE)]
            chunk = {name: dequantize(shard, name, rows, states) for name in wanted}
            chunks.append(chunk | {"prompt": shard["prompt"][rows]})
            positions.append(in_shard)
        order = torch.cat(positions).argsort()
        return {name: torch.cat([chunk[name] for chunk in chunks])[order] for name in chunks[0]}

    def in_order(self, numbers: Sequence[int]) -> Sequence[int]:
        """Return the state numbers of a batch in the order of its rows."""
        return numbers

    def ends(self, rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise and image (B, C, H, W) of the trajectories `rows`, and the numbers (B,) of their prompts."""
        rows = torch.as_tensor(rows)
        names = ("latents", "velocity", "noise_level")
        first = self.__getitems__(rows * self.states_each, names)
        last = self.__getitems__(rows * self.states_each + self.states_each - 1, names)
        image = clean_from(last["latents"].float(), last["velocity"].float(), last["noise_level"])
        return first["latents"].float(), image, first["prompt"]


class FewStepStates(Dataset):
    """States of few-step training, each with the teacher's image and the average velocity to it.

    They are, in this order: the noise of every trajectory; one state of every trajectory on the straight line
    from noise to image, as a student with a correct first step would reach; and on-policy states, `rollout`.
    `levels` are the (timestep, noise level) of few-step solves, noise first. In a batch, states at noise are the
    first rows; `is_noise` marks them among the first few rows, so that its length bounds their number without a look
    at its values.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        levels: Sequence[tuple[float, float]],
        rollout: Trajectories | None = None,
    ):
        self.trajectories = trajectories
        self.levels = torch.tensor(levels)
        self.rollout = rollout
        self.num_trajectories = len(trajectories) // trajectories.states_each
        self.num_lines = self.num_trajectories if len(levels) > 1 else 0

    def __len__(self):
        return self.num_trajectories + self.num_lines + len(self.rollout or ())

    def in_order(self, numbers: Sequence[int]) -> Sequence[int]:
        """Return the state numbers of a batch in the order of its rows: noise first, on-policy states last.

        If ranks divide the numbers in this order, their rows together are those of a single process.
        """
        starts = (self.num_trajectories, self.num_trajectories + self.num_lines)
        return sorted(numbers, key=lambda number: bisect_right(starts, number))

    def __getitems__(self, numbers) -> dict[str, Tensor]:
        numbers = torch.as_tensor(self.in_order(numbers))
        first_rollout = self.num_trajectories + self.num_lines
        is_rollout = numbers >= first_rollout
        chunks = []
        if len(lines := numbers[~is_rollout]):
            chunks.append(self._line_states(lines))
        if self.rollout is not None and is_rollout.any():
            chunks.append(_rollout_states(self.rollout, numbers[is_rollout] - first_rollout))
        batch = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        return batch | {"is_noise": self._mark_noise(numbers)}

    def _mark_noise(self, numbers):
        """Return whether each of the first rows is at noise; later rows are not."""
        num_noise = int((numbers < self.num_trajectories).sum())
        num_rows = ROWS_AT_NOISE * -(-max(1, num_noise) // ROWS_AT_NOISE)
        return torch.arange(min(num_rows, len(numbers))) < num_noise

    def _line_states(self, numbers):
        """Return states at noise and on the straight lines from noise to image."""
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
    """Return on-policy states in float32, with the image that their average velocity leads to."""
    states = rollout.__getitems__(numbers)
    states |= {name: states[name].float() for name in ("latents", "velocity")}
    return states | {"image": clean_from(states["latents"], states["velocity"], states["noise_level"])}


class Buckets(Dataset):
    """Datasets of one latent shape each, whose states are numbered consecutively.

    A batch has states of a single dataset.
    """

    def __init__(self, datasets: Sequence[Trajectories | FewStepStates]):
        self.datasets = datasets
        self.sizes = [len(dataset) for dataset in datasets]
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
    """Batches of state numbers, from batch `first` up to `last`, in an order that depends on (seed, epoch) alone.

    `num_states` is a number or, for Buckets, a list with the number in each; a batch has states of one bucket.
    """

    def __init__(self, num_states: int | list[int], batch_size: int, seed: int, first: int, last: int):
        self.sizes = [num_states] if isinstance(num_states, int) else num_states
        if min(self.sizes) < batch_size:
            fewer = ", or name fewer --aspect_ratios" if len(self.sizes) > 1 else ""
            raise ValueError(
                f"{min(self.sizes)} cached states are fewer than one batch of {batch_size}: raise "
                f"--num_trajectories or lower --train_batch_size{fewer}."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.first = first
        self.last = last

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
        """Return the batches of an epoch: all complete ones of every bucket, in random order."""
        generator = torch.Generator().manual_seed(self.seed * EPOCH_SEED + epoch)
        batches, start = [], 0
        for size in self.sizes:
            order = start + torch.randperm(size, generator=generator)
            batches += order.split(self.batch_size)[: size // self.batch_size]
            start += size
        if len(self.sizes) == 1:
            return batches
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
