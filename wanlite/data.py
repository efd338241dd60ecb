"""The teacher's trajectories: walked once, kept on disk shard by shard, and dealt out as training batches.

A trajectory is the teacher's whole guided walk from one noise to one picture. Each of its states is a training example: the noisy
latents, the guided velocity there, and the teacher's token states in the student's basis.
Legend: B batch, K states a trajectory, C channels, H W latent height and width, N image tokens, D feature width.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .flow import seeded_noise, walk

SHARD_SIZE = 64  # trajectories a file; also how many the teacher walks at once


@torch.no_grad()
def feature_basis(velocity_of, features, noise, scheduler, num_steps, width):
    """Return the directions (D, width) in which token states vary most along trajectories from `noise`.

    `velocity_of` appends the token states (B, N, D) of each step to the list `features`.
    """
    for _ in walk(velocity_of, noise, scheduler, num_steps):
        pass
    states = torch.cat(features).flatten(0, 1).double()
    states = states - states.mean(0)
    return torch.linalg.eigh(states.T @ states).eigenvectors[:, -width:].float()


@torch.no_grad()
def walk_teacher(accelerator, velocity_for, basis, scheduler, num_steps, jobs, latent_shape, folder):
    """Walk from noise to picture for every (number, prompt, seed) of `jobs`, shard by shard; shards that are there are kept.

    `velocity_for(prompts, features)` returns the velocity as a function of (latents, timestep) that appends token states to
    `features`; `basis` (D, d) is that of the states on disk. Every rank walks its share of the shards.
    """
    shards = [jobs[start:start + SHARD_SIZE] for start in range(0, len(jobs), SHARD_SIZE)]
    missing = [index for index in range(len(shards)) if not shard_path(folder, index).exists()]
    mine = missing[accelerator.process_index::accelerator.num_processes]
    for index in tqdm(mine, desc="teacher trajectories", unit="shard", disable=not accelerator.is_main_process):
        numbers, prompts, seeds = zip(*shards[index])
        noise, features = seeded_noise(latent_shape, seeds).to(accelerator.device), []
        steps = walk(velocity_for(prompts, features), noise, scheduler, num_steps)
        latents, timestep, noise_level, velocity = (torch.stack(list(part)) for part in zip(*steps))  # (K, ...)
        states = torch.stack(features, 1) @ basis                                                     # (B, K, N, d)
        write_shard(folder, index, {
            "latents": latents.transpose(0, 1).half().cpu(), "velocity": velocity.transpose(0, 1).half().cpu(),
            "features": states.half().cpu(), "timestep": timestep.float().repeat(len(prompts), 1).cpu(),
            "noise_level": noise_level.float().repeat(len(prompts), 1).cpu(), "prompt": torch.tensor(numbers)})
    accelerator.wait_for_everyone()
    return Trajectories(folder, len(shards))


def cache_folder(parent, kind, **what):
    """Return the folder for what was made of exactly this: a teacher, prompts, guidance, a schedule, ..."""
    folder = Path(parent) / f"{kind}-{fingerprint(what)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(what):
    """Return the sha256 of anything that JSON, or str, can say."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def write_shard(folder, index, tensors):
    """Write one shard so that it is there whole or not at all."""
    partial = folder / f".shard-{index:05d}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:                         # how the library says that the disk is full
        partial.unlink(missing_ok=True)
        raise OSError(f"{partial}: {error}. Free some space; what was walked so far is kept.") from None
    os.replace(partial, shard_path(folder, index))


def read_shard(folder, index):
    """Return a shard's tensors, memory-mapped."""
    try:
        return load_file(shard_path(folder, index))
    except SafetensorError as error:
        raise OSError(f"{shard_path(folder, index)}: not whole ({error}). Delete it: the same command makes it again.") from None


def shard_path(folder, index):
    return folder / f"shard-{index:05d}.safetensors"


class Trajectories(torch.utils.data.Dataset):
    """Every state of every trajectory in a folder, memory-mapped.

    Shards hold `latents`, `velocity` (n, K, C, H, W), `features` (n, K, N, D) in float16, and `timestep`, `noise_level` (n, K),
    `prompt` (n,). Indexed by a list of state numbers, it returns a batch as a dict.
    """

    def __init__(self, folder, num_shards):
        self.shards = [read_shard(folder, index) for index in range(num_shards)]
        self.states_each = self.shards[0]["timestep"].shape[1]
        self.starts = torch.tensor([len(shard["prompt"]) for shard in self.shards]).cumsum(0) * self.states_each

    def __len__(self):
        return int(self.starts[-1])

    def __getitems__(self, numbers):
        numbers = torch.as_tensor(numbers)
        shard_of = torch.searchsorted(self.starts, numbers, right=True)
        parts, order = [], []
        for index in shard_of.unique().tolist():
            places = (shard_of == index).nonzero().flatten()
            first = int(self.starts[index - 1]) if index else 0
            rows, states = (numbers[places] - first) // self.states_each, (numbers[places] - first) % self.states_each
            shard = self.shards[index]
            part = {name: shard[name][rows, states] for name in shard if name != "prompt"}
            part["prompt"] = shard["prompt"][rows]
            parts.append(part)
            order.append(places)
        back = torch.cat(order).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


class SeededBatches(torch.utils.data.Sampler):
    """Batches of state numbers in an order that is a function of (seed, epoch) alone, from batch `first` to batch `last`."""

    def __init__(self, num_states, batch_size, seed, first, last):
        if num_states < batch_size:
            raise ValueError(f"{num_states} cached states are fewer than one batch of {batch_size}: "
                             "raise --num_trajectories or lower --train_batch_size.")
        self.num_states, self.batch_size, self.seed, self.first, self.last = num_states, batch_size, seed, first, last

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        batches_each = self.num_states // self.batch_size
        epoch = order = None
        for batch in range(self.first, self.last):
            if epoch != batch // batches_each:
                epoch = batch // batches_each
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.num_states, generator=generator)
            start = batch % batches_each * self.batch_size
            yield order[start:start + self.batch_size].tolist()
