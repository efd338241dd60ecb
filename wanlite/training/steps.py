"""The loss of each phase: a batch of states -> a loss, and its terms by name.

Every step is called as `step(networks, settings, batch, text, progress, generator)`: `batch` is a dict of
tensors on the device, `text` holds the TextTokens of its rows, `progress` is the position in the phase (0..1), and
all random numbers come from `generator`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..data.trajectories import sample_tokens
from .losses import distribution_matching_loss, feature_loss, push_apart, velocity_loss

TOKENS_PER_PASS = 65536  # image tokens per pass in validations and rollouts: 64 images of 512 x 512
MATCHED = 4  # one in MATCHED rows of a micro-batch is matched; the anchor loss uses all rows


@dataclass
class Networks:
    """The networks of the steps: student, teacher and critic, and the few-step schedule."""

    student: nn.Module
    feature_head: nn.Module
    block: int  # the block whose hidden states are compared
    guided: Callable  # TextTokens -> the guided velocity of the teacher, as a function of (latents, timestep)
    unguided: Callable  # the same, without guidance
    few: Any  # flow.FewSteps
    critic: nn.Module | None = None
    critic_optimizers: list = field(default_factory=list)


def velocity_step(networks, settings, batch, text, progress, generator):
    """Velocity phase: match the teacher's guided velocity and, with a falling weight, its hidden states.

    Only the trajectories of the first resolution have hidden states.
    """
    if "features" not in batch:
        velocity = velocity_from(networks.student, text)(batch["latents"].float(), batch["timestep"])
        velocity_term = velocity_loss(velocity, batch["velocity"]).mean()
        return velocity_term, {"velocity_loss": velocity_term}
    velocity, (hidden_states,) = networks.student(
        batch["latents"].float(),
        batch["timestep"],
        text.tokens,
        text_logit_bias=text.logit_bias,
        feature_blocks=(networks.block,),
        return_dict=False,
    )
    velocity_term = velocity_loss(velocity, batch["velocity"]).mean()
    compared = sample_tokens(hidden_states, batch["first_token"]).float()
    feature_term = feature_loss(networks.feature_head(compared), batch["features"]).mean()
    weight = settings.feature_weight * (1 - progress)
    return velocity_term + weight * feature_term, {
        "velocity_loss": velocity_term,
        "feature_loss": feature_term,
    }


def few_step_regression(networks, settings, batch, text, progress, generator):
    """Few-step phase: match the average velocity from the states of few-step solves to the teacher's image.

    With a diversity gain, the targets at noise come from vary_targets().
    """
    target = batch["velocity"]
    if settings.diversity_gain:
        target = vary_targets(networks, settings.diversity_gain, batch, text, generator)
    velocity = velocity_from(networks.student, text)(batch["latents"].float(), batch["timestep"])
    few_step_loss = velocity_loss(velocity, target).mean()
    return few_step_loss, {"few_step_loss": few_step_loss}


def vary_targets(networks, gain, batch, text, generator):
    """Return the target velocities (B, C, H, W) of the few-step phase, with push_apart() applied to those at noise.

    The sizes of all tensors follow from the batch's, so that nothing waits for a GPU.
    """
    is_noise = batch["is_noise"]  # of the first rows, see FewStepStates
    first = slice(len(is_noise))
    noise = networks.few.own_noise(batch["latents"].shape, generator, is_noise.device)[first]
    target, noise_level = batch["velocity"].float(), batch["noise_level"][first]
    with torch.no_grad():
        velocity = velocity_from(networks.student, text.rows(first))(noise, batch["timestep"][first])
    pushed = push_apart(target[first], batch["image"][first], noise, velocity, noise_level, gain)
    chosen = torch.where(is_noise.view(-1, 1, 1, 1), pushed, target[first])
    return torch.cat([chosen, target[len(is_noise) :]])


def matching_step(networks, settings, batch, text, progress, generator):
    """Matching phase: push the student's images towards regions that the teacher finds likelier than the critic.

    The critic, a model of the student's images, is updated first. The terms of guidance and critic use separate
    noise levels and are logged separately; the anchor is the loss of the few-step phase. Source: DMD2 (Yin et
    al. 2024), decoupled DMD (Liu et al. 2025), and K-DMD in SnapGen++ for the critic that follows the student.
    """
    anchor, terms = few_step_regression(networks, settings, batch, text, progress, generator)
    text = text.rows(slice(0, max(1, len(text.tokens) // MATCHED)))
    latent_shape = batch["latents"].shape[1:]
    for _ in range(settings.critic_updates):
        with torch.no_grad():
            images = generate(networks, text, generator, latent_shape)
        terms["critic_loss"] = update_critic(networks, settings, images, text, generator)
    images = generate(networks, text, generator, latent_shape)
    for name, towards, away_from in (
        ("guidance", networks.guided, networks.unguided),
        ("critic", networks.unguided, partial(velocity_from, networks.critic)),
    ):
        noisy, _, timestep, noise_level = networks.few.renoise(images, generator, is_one_level=True)
        with torch.no_grad():
            velocities = [velocity_for(text)(noisy, timestep) for velocity_for in (towards, away_from)]
        terms[f"{name}_push"] = distribution_matching_loss(images, noisy, noise_level, *velocities).mean()
    matching = terms["guidance_push"] + terms["critic_push"]
    return matching + settings.anchor_weight * anchor, terms


def update_critic(networks, settings, images, text, generator):
    """Train the critic on the student's images and move it towards the student; returns its loss."""
    noisy, noise, timestep, _ = networks.few.renoise(images, generator)
    loss = velocity_loss(velocity_from(networks.critic, text)(noisy, timestep), noise - images).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(networks.critic.parameters(), settings.max_grad_norm)
    for optimizer in networks.critic_optimizers:
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for weight, student_weight in zip(networks.critic.parameters(), networks.student.parameters()):
            weight.lerp_(student_weight, settings.critic_lerp)
    return loss.detach()


def generate(networks, text, generator, latent_shape=None):
    """Return the student's images of `text` from new noise at a random stop; see FewSteps.draw()."""
    velocity_of = velocity_from(networks.student, text)
    return networks.few.draw(len(text.tokens), velocity_of, generator, text.tokens.device, latent_shape)


def velocity_from(network, text):
    """Return the unguided velocity of a student or critic as a function of (latents, timestep)."""
    return lambda latents, timestep: network(
        latents, timestep, text.tokens, text_logit_bias=text.logit_bias, return_dict=False
    )[0]


def velocity_in_chunks(network, text, tokens_per_pass=TOKENS_PER_PASS):
    """Return velocity_from() with at most `tokens_per_pass` image tokens per pass, to bound the memory."""

    def velocity_of(latents, timestep):
        tokens = latents.shape[-2] * latents.shape[-1] // math.prod(network.config.patch_size)
        rows = max(1, tokens_per_pass // tokens)
        chunks = [slice(start, start + rows) for start in range(0, len(latents), rows)]
        velocities = [
            velocity_from(network, text.rows(chunk))(latents[chunk], timestep[chunk]) for chunk in chunks
        ]
        return torch.cat(velocities)

    return velocity_of
