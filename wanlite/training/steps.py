"""The loss of each phase: a batch of states -> a loss, and its terms by name.

Every step is called as `step(networks, settings, batch, text, progress, generator)`: `batch` is a dict of
tensors on the device, `text` TextTokens of the same rows, `progress` 0..1 through the phase, `generator` the
source of all that is random.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from .losses import distribution_matching_loss, feature_loss, push_apart, velocity_loss

TOKENS_PER_PASS = 65536  # image tokens of a pass while a student is looked at: 64 images of 512 x 512
MATCHED = 4  # one row in so many of a micro-batch is matched; every row anchors


@dataclass
class Networks:
    """What the steps ask: who learns, who is matched, and where few steps stop."""

    student: nn.Module
    feature_head: nn.Module
    block: int  # whose token states are compared
    guided: Callable  # TextTokens -> the guided teacher's velocity of (latents, timestep)
    unguided: Callable  # the same without guidance
    few: Callable  # flow.FewSteps
    critic: nn.Module | None = None
    critic_optimizers: list = field(default_factory=list)


def velocity_step(networks, settings, batch, text, progress, generator):
    """Stage 1: the guided velocity at the teacher's states, and its token states while these help."""
    velocity, (states,) = networks.student(
        batch["latents"].float(),
        batch["timestep"],
        text.tokens,
        text_logit_bias=text.logit_bias,
        feature_blocks=(networks.block,),
        return_dict=False,
    )
    velocity_term = velocity_loss(velocity, batch["velocity"]).mean()
    feature_term = feature_loss(networks.feature_head(states.float()), batch["features"]).mean()
    weight = settings.feature_weight * (1 - progress)
    return velocity_term + weight * feature_term, {
        "velocity_loss": velocity_term,
        "feature_loss": feature_term,
    }


def few_step_regression(networks, settings, batch, text, progress, generator):
    """Stage 2a: from where few steps stop, the average velocity to the teacher's image, or from noise to a
    more varied one.
    """
    target = (
        vary(networks, settings.diversity_gain, batch, text, generator)
        if settings.diversity_gain
        else batch["velocity"]
    )
    velocity = velocity_from(networks.student, text)(batch["latents"].float(), batch["timestep"])
    few_step_loss = velocity_loss(velocity, target).mean()
    return few_step_loss, {"few_step_loss": few_step_loss}


def vary(networks, gain, batch, text, generator):
    """Return the target velocities of stage 2a (B, C, H, W), those from noise moved away from what other
    noise gives.
    """
    rows = (batch["timestep"] == networks.few.levels[0][0]).nonzero().flatten()
    noise = networks.few.own_noise(batch["latents"].shape, generator, rows.device)[rows]
    target, noise_level = batch["velocity"].float(), batch["noise_level"][rows]
    with torch.no_grad():
        velocity = velocity_from(networks.student, text.rows(rows))(noise, batch["timestep"][rows])
    return target.index_copy(
        0, rows, push_apart(target[rows], batch["image"][rows], noise, velocity, noise_level, gain)
    )


def matching_step(networks, settings, batch, text, progress, generator):
    """Stage 2b: what few steps draw is pushed to where the teacher finds it likelier than the critic does.

    The critic, a student that learns what the student draws, is updated first. What guidance pushes and what
    the critic holds against it are drawn at noise levels of their own and logged apart; the anchor is stage
    2a's loss. Source: DMD2 (Yin et al. 2024), decoupled DMD (Liu et al. 2025), K-DMD in SnapGen++ for the
    critic that is pulled along.
    """
    anchor, parts = few_step_regression(networks, settings, batch, text, progress, generator)
    text, latent_shape = text.rows(slice(0, max(1, len(text.tokens) // MATCHED))), batch["latents"].shape[1:]
    for _ in range(settings.critic_updates):
        with torch.no_grad():
            drawn = draw(networks, text, generator, latent_shape)
        parts["critic_loss"] = update_critic(networks, settings, drawn, text, generator)
    drawn = draw(networks, text, generator, latent_shape)
    for name, here, there in (
        ("guidance", networks.guided, networks.unguided),
        ("critic", networks.unguided, partial(velocity_from, networks.critic)),
    ):
        noisy, _, timestep, noise_level = networks.few.renoise(drawn, generator, is_one_level=True)
        with torch.no_grad():
            towards, from_there = (maker(text)(noisy, timestep) for maker in (here, there))
        parts[f"{name}_push"] = distribution_matching_loss(
            drawn, noisy, noise_level, towards, from_there
        ).mean()
    matching = parts["guidance_push"] + parts["critic_push"]
    return matching + settings.anchor_weight * anchor, parts


def update_critic(networks, settings, drawn, text, generator):
    """Let the critic learn what the student draws, and pull it a little towards the student; returns its
    loss.
    """
    noisy, noise, timestep, _ = networks.few.renoise(drawn, generator)
    loss = velocity_loss(velocity_from(networks.critic, text)(noisy, timestep), noise - drawn).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(networks.critic.parameters(), settings.max_grad_norm)
    for optimizer in networks.critic_optimizers:
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for weight, aim in zip(networks.critic.parameters(), networks.student.parameters()):
            weight.lerp_(aim, settings.critic_lerp)
    return loss.detach()


def draw(networks, text, generator, latent_shape=None):
    """Return the student's images of `text`, from new noise and one stop drawn at random; `latent_shape` as
    in FewSteps.draw.
    """
    velocity_of = velocity_from(networks.student, text)
    return networks.few.draw(len(text.tokens), velocity_of, generator, text.tokens.device, latent_shape)


def velocity_from(network, text):
    """Return a student's, or a critic's, velocity as a function of (latents, timestep); guidance is baked
    into it.
    """
    return lambda latents, timestep: network(
        latents, timestep, text.tokens, text_logit_bias=text.logit_bias, return_dict=False
    )[0]


def velocity_in_chunks(network, text):
    """As velocity_from(), but TOKENS_PER_PASS image tokens at a time: all rows of large images would fill the
    memory.
    """

    def velocity_of(latents, timestep):
        tokens = latents.shape[-2] * latents.shape[-1] // math.prod(network.config.patch_size)
        rows = max(1, TOKENS_PER_PASS // tokens)
        return torch.cat(
            [
                velocity_from(network, text.rows(part))(latents[part], timestep[part])
                for part in (slice(start, start + rows) for start in range(0, len(latents), rows))
            ]
        )

    return velocity_of
