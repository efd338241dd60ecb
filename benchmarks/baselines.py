"""Train a student with a baseline method and the command line of train_distillation.py, which prints its progress.

python benchmarks/baselines.py flow_matching --output_dir DIR ...    # in place of few_step: the teacher's images as data
python benchmarks/baselines.py twin_flow --output_dir DIR ...        # in place of matching: its own critic, at negative times
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

import train_distillation as script
from wanlite.flow import add_noise, shift_noise_level
from wanlite.network import TextTokens
from wanlite.schedule import TIMESTEPS
from wanlite.training.losses import velocity_loss
from wanlite.training.phase_table import PHASES
from wanlite.training.steps import MATCHED, Networks, few_step_regression, generate, velocity_from

WARM_UP = 0.5  # share of the phase that trains the fake branch before it pushes
RECTIFY_WEIGHT = 0.5

Losses = dict[str, torch.Tensor]


def flow_matching_step(
    networks: Networks,
    settings: Any,
    batch: dict[str, Any],
    text: TextTokens,
    progress: float,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, Losses]:
    """Train on the teacher's images with independent noise, and logit-normal, shifted noise levels.

    Source: rectified flow as in Stable Diffusion 3 (Esser et al. 2024).
    """
    clean = batch["image"].float()
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    level = torch.randn(len(clean), generator=generator).sigmoid().to(clean.device)
    level = shift_noise_level(level, settings.flow_shift)
    velocity = velocity_from(networks.student, text)(add_noise(clean, noise, level), TIMESTEPS * level)
    loss = velocity_loss(velocity, noise - clean).mean()
    return loss, {"flow_loss": loss}


def twin_flow_step(
    networks: Networks,
    settings: Any,
    batch: dict[str, Any],
    text: TextTokens,
    progress: float,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, Losses]:
    """Train one network at positive and, on its own images, at negative times, and push it by the difference.

    The velocity at positive times counts as real. The few-step loss anchors it, in place of consistency in the
    image-free mode. The push is clamped to 1 and begins after the fake branch is trained. Source: TwinFlow
    (Cheng et al. 2025), L_adv and L_rectify, for a network without a second time input.
    """
    anchor, losses = few_step_regression(networks, settings, batch, text, progress, generator)
    text = text.rows(slice(0, max(1, len(text.tokens) // MATCHED)))
    velocity_of = velocity_from(networks.student, text)
    drawn = generate(networks, text, generator)
    noisy, noise, timestep, _ = networks.few.renoise(drawn, generator)
    losses["fake_loss"] = velocity_loss(velocity_of(noisy, -timestep), noise - drawn.detach()).mean()
    noisy, _, timestep, _ = networks.few.renoise(drawn, generator)
    with torch.no_grad():
        push = (velocity_of(noisy, -timestep) - velocity_of(noisy, timestep)).clamp(-1, 1)
    # where the velocity rises, the clean image falls
    losses["rectify_loss"] = velocity_loss(drawn, (drawn + push).detach()).mean()
    weight = RECTIFY_WEIGHT * (progress >= WARM_UP)
    return anchor + losses["fake_loss"] + weight * losses["rectify_loss"], losses


BASELINES = {"flow_matching": ("few_step", flow_matching_step), "twin_flow": ("matching", twin_flow_step)}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BASELINES:
        sys.exit(f"baselines.py: expected {' or '.join(BASELINES)}, then flags of train_distillation.py")
    phase, loss = BASELINES[sys.argv.pop(1)]
    phases = PHASES | {phase: replace(PHASES[phase], loss=loss)}
    sys.exit(script.main(*script.read_settings(), phases=phases))
