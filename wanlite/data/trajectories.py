"""The teacher's trajectories: generated once, kept on disk shard by shard, and dealt out as training batches.

A trajectory is the teacher's whole guided solve from one noise to one image. Each of its states is a
training example: the noisy latents, the guided velocity there, and the teacher's token states in the
student's basis. Legend: B batch, K states a trajectory, C channels, H W latent height and width, N image
tokens, D feature width.
"""

import copy
import functools
import math
import os
import time
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate, chain
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..flow import (
    add_noise,
    average_velocity,
    clean_from,
    noise_along,
    sample,
    seeded_noise,
    set_steps,
    solve,
)

SHARD_SIZE = 64  # trajectories or prompts a file; also how many the teacher trajectories, or the text encoder reads, at once
MAX_SAMPLED = 32768  # token states from which directions are found
EXACT = (
    "timestep",
    "noise_level",
    "prompt",
    "text",
    "length",
)  # kept as they are; latents, velocities and features in float16


def sample_rows(features, num_batches):
    """Return evenly spaced rows of hidden states (B, N, D), in float32: of `num_batches` at most MAX_SAMPLED."""
    rows = features.flatten(0, 1)
    spacing = -(-num_batches * len(rows) // MAX_SAMPLED)
    return rows[::spacing].to(torch.float32, copy=True)  # a view would keep all rows in memory


class TrajectoryGenerator:
    """Asks the teacher for all that a student learns from, and keeps it shard by shard; shards that are there
    are not made again.

    `velocity_for(prompts, has_features)` returns the guided velocity as a function of (latents, timestep); with
    `has_features` that function returns (velocity, hidden states (B, N, D)). `basis` (D, d) is that of the
    states on disk. Every rank makes its share of the shards, all of them `in_step` where they share the
    teacher out.
    """

    def __init__(self, accelerator, velocity_for, scheduler, num_steps, in_step=False, basis=None):
        self.accelerator, self.velocity_for, self.scheduler, self.num_steps = (
            accelerator,
            velocity_for,
            scheduler,
            num_steps,
        )
        self.in_step, self.basis = in_step, basis

    @torch.no_grad()
    def find_basis(self, folder, prompts, latent_shape, width):
        """From here on keep token states in the `width` directions in which they vary most along trajectories of
        `prompts`.
        """

        def make():
            noise = seeded_noise(latent_shape, range(len(prompts))).to(self.accelerator.device)
            steps = solve(self.velocity_for(prompts, True), noise, self.scheduler, self.num_steps)
            rows = [sample_rows(features, self.num_steps) for *_, features in steps]
            return {"basis": principal_directions(torch.cat(rows), width).cpu()}

        self.basis = compute_once(self.accelerator, folder, make)["basis"].to(self.accelerator.device)

    def generate(self, folder, jobs, latent_shape):
        """Walk from noise to image for every (number, prompt, seed) of `jobs`; returns the Trajectories."""

        def make(numbers, prompts, seeds):
            noise = seeded_noise(latent_shape, seeds).to(self.accelerator.device)
            steps = solve(self.velocity_for(prompts, True), noise, self.scheduler, self.num_steps)
            return _states(steps, self.basis, numbers)

        return self._kept(folder, jobs, make, "teacher trajectories")

    def ask_at_images(self, folder, jobs, latents_of):
        """Ask at real images, noised to each level of a solve, for every (number, prompt, seed, image) of
        `jobs`.

        `latents_of(images)` returns their latents (B, C, H, W); what is kept is as that of trajectories.
        """

        def make(numbers, prompts, seeds, images):
            clean, velocity_of = (
                latents_of(images).to(self.accelerator.device),
                self.velocity_for(prompts, True),
            )
            steps = noise_along(velocity_of, clean, seeds, self.scheduler, self.num_steps)
            return _states(steps, self.basis, numbers)

        return self._kept(folder, jobs, make, "teacher at images")

    def roll_out(self, folder, jobs, latent_shape, student_for, own_scheduler):
        """Go a part of the way with the student and the rest with the teacher, for every (number, prompt,
        seed, count, index).

        The student takes `index` of `count` steps, the teacher what is left of its own; kept is where they
        met, and the average velocity from there to the teacher's image. Source: the roll-outs of pi-Flow
        (Chen et al. 2025), with one segment that ends at the image.
        """

        def make(numbers, prompts, seeds, counts, indices):
            noise, shard = seeded_noise(latent_shape, seeds).to(self.accelerator.device), {}
            for count, index in sorted(set(zip(counts, indices))):
                rows = [row for row, path in enumerate(zip(counts, indices)) if path == (count, index)]
                said = [prompts[row] for row in rows]
                met = sample(student_for(said), noise[rows], own_scheduler, count, end=index)
                timestep, noise_level = (
                    part.float() for part in set_steps(own_scheduler, count, met.device)[index]
                )
                image = sample(
                    self.velocity_for(said, False),
                    met,
                    self.scheduler,
                    self.num_steps,
                    begin=self.num_steps * index // count,
                )
                noise_level = noise_level.expand(len(rows))
                found = {
                    "latents": met,
                    "velocity": average_velocity(met, image, noise_level),
                    "noise_level": noise_level,
                    "timestep": timestep.expand(len(rows)),
                }
                for name, part in found.items():
                    shard.setdefault(name, part.new_empty(len(prompts), 1, *part.shape[1:]))[rows] = (
                        part.unsqueeze(1)
                    )
            return shard | {"prompt": torch.tensor(numbers)}

        return self._kept(folder, jobs, make, "student's own path")

    @torch.no_grad()
    def _kept(self, folder, jobs, make, description):
        return Trajectories(
            folder, _fill(self.accelerator, folder, jobs, make, description, in_step=self.in_step)
        )


def _states(steps, basis, numbers):
    """Return the tensors of a shard from (latents, timestep, noise_level, velocity, features) of each step.

    Each step's hidden states (B, N, D) are projected onto the basis (D, d) at once and kept in float16.
    """
    # Unlike a loop's variable, map() holds no step while the next one is computed.
    kept = map(functools.partial(_in_basis, basis), steps)
    latents, timestep, noise_level, velocity, features = (
        torch.stack(list(part)) for part in zip(*kept)
    )  # (K, ...)
    return {
        "latents": latents.transpose(0, 1),
        "velocity": velocity.transpose(0, 1),
        "features": features.transpose(0, 1),
        "timestep": timestep.float().repeat(len(numbers), 1),
        "prompt": torch.tensor(numbers),
        "noise_level": noise_level.float().repeat(len(numbers), 1),
    }


def _in_basis(basis, step):
    *state, features = step
    return *state, (features.float() @ basis).half()


def principal_directions(states, width):
    """Return the directions (D, width) in which states (B, D) vary most."""
    states = states.double()
    states = states - states.mean(0)
    return torch.linalg.eigh(states.T @ states).eigenvectors[:, -width:].float()


def deal_out(jobs, num_buckets, seed):
    """Return a list of jobs for each bucket: as many for each, drawn at random by `seed`; of a single one,
    `jobs` as they are.
    """
    if len(jobs) < num_buckets:
        raise ValueError(
            f"{len(jobs)} images of the teacher are fewer than the {num_buckets} sizes of --aspect_ratios: "
            f"raise "
            "--num_trajectories, or name fewer."
        )
    drawn = torch.randperm(len(jobs), generator=torch.Generator().manual_seed(seed)) % num_buckets
    return [
        [jobs[number] for number in (drawn == bucket).nonzero().flatten().tolist()]
        for bucket in range(num_buckets)
    ]


def encode_once(accelerator, encode, prompts, folder):
    """Encode prompts, none of which is twice there: {prompt: embedding (L, T)}, memory-mapped; `encode` is a
    lazy_encoder().
    """
    num_shards = _fill(accelerator, folder, [(prompt,) for prompt in prompts], encode, "text", "prompt")
    shards = [read_shard(folder, index) for index in range(num_shards)]
    return dict(
        zip(prompts, chain.from_iterable(shard["text"].split(shard["length"].tolist()) for shard in shards))
    )


def _fill(accelerator, folder, jobs, make, description, unit="solve", in_step=False):
    """Make the shards that `folder` lacks, SHARD_SIZE jobs each, every rank its share: `make(*columns of the
    jobs)` -> tensors. Returns how many there are.

    Where ranks have to be `in_step`, every rank makes as many shards of as many jobs as any: what would be
    too few is filled up with the jobs before it, and who has no shard of its own repeats one that is not
    written.
    """
    rank, ranks, num_shards = (
        accelerator.process_index,
        accelerator.num_processes,
        -(-len(jobs) // SHARD_SIZE),
    )
    missing = [index for index in range(num_shards) if not shard_path(folder, index).exists()]
    (missing,) = broadcast_object_list([missing])  # as one rank sees it, for others may already be writing
    if rank == 0:
        remove_leftovers(folder)
    mine = missing[rank::ranks]
    if in_step:
        mine += missing[-1:] * (-(-len(missing) // ranks) - len(mine))
    sizes = [min(SHARD_SIZE, len(jobs) - index * SHARD_SIZE) for index in mine]
    with tqdm(
        total=sum(sizes), desc=description, unit=unit, leave=False, disable=rank > 0 or not mine
    ) as progress:
        for number, (index, size) in enumerate(zip(mine, sizes)):
            start = index * SHARD_SIZE
            before = min(start, SHARD_SIZE - size) if in_step else 0
            tensors = make(*zip(*jobs[start - before : start + size]))
            if rank + number * ranks < len(missing):
                write_shard(
                    folder,
                    index,
                    {
                        name: tensor[before:].cpu() if name in EXACT else tensor[before:].half().cpu()
                        for name, tensor in tensors.items()
                    },
                )
            progress.update(size)
    accelerator.wait_for_everyone()
    return num_shards


def write_shard(folder, index, tensors):
    """Write one shard so that it is there whole or not at all; other runs may be writing the same one.

    Raises FloatingPointError, and writes nothing, where a tensor is not finite.
    """
    if odd := [name for name, tensor in tensors.items() if not all(map(math.isfinite, tensor.aminmax()))]:
        raise FloatingPointError(
            f"{folder}: {odd[0]} came out NaN or infinite and is not kept. Lower --guidance_scale and "
            "--guidance_scale_2, add --mixed_precision no, or see that the teacher's files are whole."
        )
    partial = folder / f".shard-{index:05d}-{uuid4().hex}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # how the library says that the disk is full
        partial.unlink(missing_ok=True)
        raise OSError(f"{partial}: {error}. Free some space; what was generated so far is kept.") from None
    os.replace(partial, shard_path(folder, index))


def remove_leftovers(folder):
    """Delete what runs that were killed left half written; what nobody has touched for an hour nobody is
    writing.
    """
    for partial in folder.glob(".shard-*.partial"):
        with suppress(FileNotFoundError):  # it has just got its name
            if time.time() - partial.stat().st_mtime > 3600:
                partial.unlink()


def compute_once(accelerator, folder, make):
    """Return the tensors of `make()`, {name: tensor} on the CPU, that `folder` keeps; they are made where it
    does not yet.
    """
    (is_there,) = broadcast_object_list(
        [shard_path(folder, 0).exists()]
    )  # all make it, or none: they may need each other
    if not is_there:
        made = make()
        if accelerator.is_main_process:
            write_shard(folder, 0, made)
    accelerator.wait_for_everyone()
    return {
        name: tensor.clone() for name, tensor in read_shard(folder, 0).items()
    }  # sums would depend on where a file has it


def read_shard(folder, index):
    """Return a shard's tensors, memory-mapped."""
    try:
        return load_file(shard_path(folder, index))
    except FileNotFoundError:
        raise OSError(
            f"{shard_path(folder, index)}: is not here. The machines of a run need one disk under "
            f"--output_dir and "
            "--cache_dir; on one machine, somebody deleted it."
        ) from None
    except SafetensorError as error:
        raise OSError(
            f"{shard_path(folder, index)}: not whole ({error}). Delete it: the same command makes it again."
        ) from None


def shard_path(folder, index):
    return folder / f"shard-{index:05d}.safetensors"


class Trajectories(torch.utils.data.Dataset):
    """Every state of every trajectory in a folder, memory-mapped.

    Shards hold `latents`, `velocity` (n, K, C, H, W), of whole trajectories `features` (n, K, N, D), in float16, and
    `timestep`, `noise_level` (n, K), `prompt` (n,). Indexed by a list of state numbers, it returns a batch as
    a dict.
    """

    def __init__(self, folder, num_shards):
        self._hold([read_shard(folder, index) for index in range(num_shards)])

    def _hold(self, shards):
        self.shards = shards
        self.states_each = self.shards[0]["timestep"].shape[1]
        self.starts = (
            torch.tensor([len(shard["prompt"]) for shard in self.shards]).cumsum(0) * self.states_each
        )

    def __len__(self):
        return int(self.starts[-1])

    def __add__(self, other):
        """Return the states of both; of each row of either there are as many."""
        both = copy.copy(self)
        both._hold([*self.shards, *other.shards])
        return both

    def __getitems__(self, numbers, names=None):
        numbers = torch.as_tensor(numbers)
        shard_of = torch.searchsorted(self.starts, numbers, right=True)
        parts, order = [], []
        for index in shard_of.unique().tolist():
            places = (shard_of == index).nonzero().flatten()
            first = int(self.starts[index - 1]) if index else 0
            rows, states = (
                (numbers[places] - first) // self.states_each,
                (numbers[places] - first) % self.states_each,
            )
            shard = self.shards[index]
            part = {name: shard[name][rows, states] for name in names or shard if name != "prompt"}
            part["prompt"] = shard["prompt"][rows]
            parts.append(part)
            order.append(places)
        back = torch.cat(order).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def in_order(self, numbers):
        """Return state numbers as their rows come in a batch."""
        return numbers

    def ends(self, rows):
        """Return where the trajectories `rows` start and end: noise and images, both (B, C, H, W), and
        their prompts (B,).
        """
        rows, names = torch.as_tensor(rows), ("latents", "velocity", "noise_level")
        first = self.__getitems__(rows * self.states_each, names)
        last = self.__getitems__(rows * self.states_each + self.states_each - 1, names)
        return (
            first["latents"].float(),
            clean_from(last["latents"].float(), last["velocity"].float(), last["noise_level"]),
            (first["prompt"]),
        )


class FewStepStates(torch.utils.data.Dataset):
    """What few-step training learns from: states that few steps pass, the teacher's image, and the average
    velocity to it.

    In this order: the noise that every trajectory starts from; one state of every trajectory on the straight
    line from its noise to its image, which is the way a student goes whose first step was right; and where
    students did come by, `rollout`. `levels` are the (timestep, noise level) that few steps pass, the first
    of them noise.
    """

    def __init__(self, trajectories, levels, rollout=None):
        self.trajectories, self.levels, self.rollout = trajectories, torch.tensor(levels), rollout
        self.num_trajectories = len(trajectories) // trajectories.states_each
        self.num_lines = self.num_trajectories if len(levels) > 1 else 0

    def __len__(self):
        return self.num_trajectories + self.num_lines + len(self.rollout or ())

    def in_order(self, numbers):
        """Return state numbers as their rows come in a batch: own states last.

        Dealt out so, ranks have the rows of one batch.
        """
        return sorted(numbers, key=lambda number: number >= self.num_trajectories + self.num_lines)

    def __getitems__(self, numbers):
        numbers = torch.as_tensor(numbers)
        is_own = numbers >= self.num_trajectories + self.num_lines
        found = []
        if len(lines := numbers[~is_own]):
            noise, image, prompt = self.trajectories.ends(lines % self.num_trajectories)
            later = 1 + lines % max(1, len(self.levels) - 1)
            timestep, noise_level = self.levels[torch.where(lines < self.num_trajectories, 0, later)].unbind(
                1
            )
            found.append(
                {
                    "latents": add_noise(image, noise, noise_level),
                    "velocity": noise - image,
                    "timestep": timestep,
                    "noise_level": noise_level,
                    "image": image,
                    "prompt": prompt,
                }
            )
        if is_own.any():
            own = self.rollout.__getitems__(numbers[is_own] - self.num_trajectories - self.num_lines)
            own |= {name: own[name].float() for name in ("latents", "velocity")}
            found.append(own | {"image": clean_from(own["latents"], own["velocity"], own["noise_level"])})
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}


class Buckets(torch.utils.data.Dataset):
    """Datasets of one latent shape each, their states numbered one after the other; a batch is of one of
    them.
    """

    def __init__(self, datasets):
        self.datasets, self.sizes = datasets, [len(dataset) for dataset in datasets]
        self.starts = [0, *accumulate(self.sizes)]

    def __len__(self):
        return self.starts[-1]

    def __getitems__(self, numbers):
        index = bisect_right(self.starts, numbers[0]) - 1
        return self.datasets[index].__getitems__([number - self.starts[index] for number in numbers])

    def in_order(self, numbers):
        """Return the state numbers of a batch as its rows come."""
        index = bisect_right(self.starts, numbers[0]) - 1
        own = self.datasets[index].in_order([number - self.starts[index] for number in numbers])
        return [number + self.starts[index] for number in own]


class SeededBatches(torch.utils.data.Sampler):
    """Batches of state numbers in an order that is a function of (seed, epoch) alone, from batch `first` to
    batch `last`.

    `num_states` is how many there are or, of Buckets, a list of how many each has: no batch is of two.
    """

    def __init__(self, num_states, batch_size, seed, first, last):
        self.sizes = [num_states] if isinstance(num_states, int) else num_states
        if min(self.sizes) < batch_size:
            raise ValueError(
                f"{min(self.sizes)} cached states are fewer than one batch of {batch_size}: raise "
                f"--num_trajectories "
                f"or lower --train_batch_size{', or name fewer --aspect_ratios' if len(self.sizes) > 1 else ''}."
            )
        self.batch_size, self.seed, self.first, self.last = batch_size, seed, first, last

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        batches_each = sum(size // self.batch_size for size in self.sizes)
        epoch = dealt = None
        for batch in range(self.first, self.last):
            if epoch != batch // batches_each:
                epoch = batch // batches_each
                dealt = self._deal(epoch)
            yield dealt[batch % batches_each].tolist()

    def _deal(self, epoch):
        """Return an epoch's batches: of every bucket all that are whole, and the buckets mixed."""
        generator, batches, start = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch), [], 0
        for size in self.sizes:
            order = start + torch.randperm(size, generator=generator)
            batches += order.split(self.batch_size)[: size // self.batch_size]
            start += size
        if len(self.sizes) == 1:
            return batches
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
