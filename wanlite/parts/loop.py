"""Training of one part of a pipeline, resumable: steps of Muon and AdamW on a loss, with averaged weights.

All random numbers of a step follow from the seed and its number, so that a resumed training is the same one.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..files.atomic import read_manifest
from ..runtime.progress import track
from ..runtime.signals import Stopped
from ..training.checkpoints import latest_checkpoint, load_checkpoint, restore, save_checkpoint
from ..training.muon import StackedMuon

WARMUP_SHARE = 0.05  # of the steps
AVERAGED_SHARE = 0.04  # of the steps, in the averaged weights
MAX_NORM = 1.0  # of the gradients
MUON_RATIO = 30  # of the rate of Muon to that of AdamW
# Weights that Muon trains: layers of a UMT5, and convolutions as matrices. A decoder of half the channels of the emoji
# world's was at 30.5 dB after 300 steps, and at 28.3 with AdamW alone.
MATRICES = r".*(\.[qkvo]|\.wi_[01]|\.wo)\.weight|.*\.original"
KEPT_CHECKPOINTS = 2
NUM_AVERAGED = 50  # losses in the one that is shown


@dataclass(frozen=True)
class Schedule:
    """Steps and peak rate of AdamW in a training, its seed, and the steps between its checkpoints."""

    steps: int
    learning_rate: float
    seed: int
    checkpointing_steps: int = 500


def train_part(
    name: str,
    folder: Path,
    network: Any,
    loss: Callable[[torch.Generator], Tensor],
    schedule: Schedule,
    facts: dict[str, Any],
    stop: Any = None,
) -> float:
    """Train the parameters of `network` that require gradients; returns the mean loss of the last steps.

    `loss(generator)` computes the loss of a new batch. Checkpoints are written to `folder`, and training continues
    from the newest one, whose `facts` must be equal. `network` ends with averaged weights. Raises OSError for
    checkpoints of another training, and Stopped, after a checkpoint, once `stop` has received a signal.
    """
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    parameters = [*weights.values()]
    state = _make_state(weights, schedule)
    first = _resume(folder, state, weights, facts)
    losses = state["progress"]["losses"]
    with track(schedule.steps, name, done=first) as progress:
        for step in range(first, schedule.steps):
            if step % schedule.checkpointing_steps == 0 and step:
                _save(folder, step, state, facts)
            if stop is not None and stop.is_set:
                _save(folder, step, state, facts)
                raise Stopped
            losses.append(_step(parameters, state, loss, make_generator(schedule.seed, step)))
            del losses[:-NUM_AVERAGED]
            progress.describe(name, f"loss {np.mean(losses):.4g}")
            progress.update()
    _save(folder, schedule.steps, state, facts)
    state["ema"].copy_to(parameters)
    return float(np.mean(losses))


def make_generator(seed: int, step: int) -> torch.Generator:
    """Return the random generator of a step."""
    (number,) = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(number) % 2**63)


def _make_state(weights, schedule):
    """Return the content of a checkpoint at step 0."""
    matrices = [weight for name, weight in weights.items() if re.fullmatch(MATRICES, name)]
    others = [weight for name, weight in weights.items() if not re.fullmatch(MATRICES, name)]
    rate = schedule.learning_rate
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=rate, weight_decay=0.0)]
    if matrices:
        optimizers.append(StackedMuon(matrices, lr=MUON_RATIO * rate, weight_decay=0.0))
    shape = {"num_warmup_steps": round(WARMUP_SHARE * schedule.steps), "num_training_steps": schedule.steps}
    decay = 1 - 1 / max(1.0, AVERAGED_SHARE * schedule.steps)
    return {
        "weights": weights,
        "optimizers": optimizers,
        "lr_schedulers": [get_scheduler("cosine", each, **shape) for each in optimizers],
        "ema": EMAModel(weights.values(), decay=decay),
        "progress": {"losses": []},
    }


def _step(parameters, state, loss, generator):
    """Update all parameters once; returns the loss."""
    value = loss(generator)
    value.backward()
    norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    if not math.isfinite(norm):
        raise FloatingPointError("a gradient is not finite. Lower the learning rate, or train in float32.")
    for optimizer, lr_scheduler in zip(state["optimizers"], state["lr_schedulers"]):
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
    state["ema"].step(parameters)
    return value.item()


def _resume(folder, state, weights, facts):
    """Restore the newest checkpoint, if there is one; returns its step."""
    path, _ = latest_checkpoint(folder)
    if path is None:
        return 0
    manifest = read_manifest(path) or {}
    if manifest.get("facts") != facts:
        raise OSError(
            f"{folder}: holds an unfinished training under other settings or of other weights. Use the same, or move "
            f"{folder.parent} away to start again."
        )
    restore(state, load_checkpoint(path))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
    state["weights"] = weights
    state["ema"].to(next(iter(weights.values())).device)
    return manifest["step"]


def _save(folder, step, state, facts):
    save_checkpoint(folder, step, state, facts, KEPT_CHECKPOINTS)
