"""Train a student with a baseline method, under the command line of train_distillation.py.

python benchmarks/baselines.py flow_matching --output_dir DIR ...    # in place of stage 2a: the teacher's pictures as data
python benchmarks/baselines.py twin_flow --output_dir DIR ...        # in place of stage 2b: its own critic, at negative times
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

import train_distillation as script
from wanlite.flow import add_noise, shift_noise_level
from wanlite.training.losses import velocity_loss
from wanlite.training.phase_table import PHASES
from wanlite.training.steps import MATCHED, few_step_regression, generate, velocity_from

WARM_UP = 0.5  # share of the part in which the fake branch is learnt before it pushes
RECTIFY_WEIGHT = 0.5


def flow_matching_step(networks, settings, batch, text, progress, generator):
    """The teacher's pictures as data: independent noise, noise levels logit-normal and shifted.

    Source: rectified flow as in Stable Diffusion 3 (Esser et al. 2024).
    """
    picture = batch["image"].float()
    noise = torch.randn(picture.shape, generator=generator).to(picture.device)
    level = torch.randn(len(picture), generator=generator).sigmoid().to(picture.device)
    level = shift_noise_level(level, settings.flow_shift)
    velocity = velocity_from(networks.student, text)(add_noise(picture, noise, level), 1000 * level)
    loss = velocity_loss(velocity, noise - picture).mean()
    return loss, {"flow_loss": loss}


def twin_flow_step(networks, settings, batch, text, progress, generator):
    """Train one network at positive and, on its own images, at negative times, and push it by the difference.

    The velocity at positive times counts as real; the few-step loss anchors it, as consistency does in the
    image-free mode. The push is clamped to 1 and begins when the fake branch has been learnt. Source:
    TwinFlow (Cheng et al. 2025), L_adv and L_rectify, for a network without a second time input.
    """
    anchor, parts = few_step_regression(networks, settings, batch, text, progress, generator)
    text = text.rows(slice(0, max(1, len(text.tokens) // MATCHED)))
    velocity_of = velocity_from(networks.student, text)
    drawn = generate(networks, text, generator)
    noisy, noise, timestep, _ = networks.few.renoise(drawn, generator)
    parts["fake_loss"] = velocity_loss(velocity_of(noisy, -timestep), noise - drawn.detach()).mean()
    noisy, _, timestep, _ = networks.few.renoise(drawn, generator)
    with torch.no_grad():
        push = (velocity_of(noisy, -timestep) - velocity_of(noisy, timestep)).clamp(-1, 1)
    parts["rectify_loss"] = velocity_loss(
        drawn, (drawn + push).detach()
    ).mean()  # clean falls where velocity rises
    weight = RECTIFY_WEIGHT * (progress >= WARM_UP)
    return anchor + parts["fake_loss"] + weight * parts["rectify_loss"], parts


BASELINES = {"flow_matching": ("few_step", flow_matching_step), "twin_flow": ("matching", twin_flow_step)}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BASELINES:
        sys.exit(f"baselines.py: expected {' or '.join(BASELINES)} and then flags of train_distillation.py")
    phase, loss = BASELINES[sys.argv.pop(1)]
    phases = PHASES | {phase: replace(PHASES[phase], loss=loss)}
    sys.exit(script.main(*script.read_settings(), phases=phases))
