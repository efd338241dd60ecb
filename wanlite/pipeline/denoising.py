"""Noise and embeddings -> the latents of images, by the steps of the pipeline's scheduler.

Legend: B images, C channels, H W latent height and width.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from train_distillation import WanLiteStudent

from ..flow import Steps
from ..network import use_cudnn_self_attention
from ..runtime.devices import capability_of, prefers_cudnn_attention
from .editing import Edit
from .text import pack_embeddings

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")


def denoise(
    pipeline: Any,
    values: dict[str, Any],
    num_steps: int,
    callback: Callable | None,
    callback_inputs: Sequence[str],
    edit: Edit | None = None,
) -> Tensor:
    """Return the last latents (B, C, H, W).

    `values` are {name: tensor} of the noise and the embeddings. The callback may replace them after each step.
    An `edit` starts at its own step, from its image.
    """
    device = values["latents"].device
    if _is_student(pipeline.transformer):
        use_cudnn_self_attention(pipeline.transformer, prefers_cudnn_attention(capability_of(device)))
    texts = {name: _pack(pipeline.transformer, values[name]) for name in EMBEDDINGS}
    begin = edit.begin if edit else 0
    steps = Steps(pipeline.scheduler, num_steps, device, begin)
    states = steps.states[begin:]
    if edit:
        values["latents"] = edit.start(states[0][1])
    pipeline._num_timesteps = len(states)
    with pipeline.progress_bar(total=len(states)) as progress:
        for index, (timestep, _) in enumerate(states):
            if pipeline.interrupt:
                break
            pipeline._current_timestep = timestep
            velocity = _guided_velocity(pipeline, values["latents"], timestep, *texts.values())
            values["latents"] = steps.take(velocity, values["latents"])
            if edit:
                values["latents"] = edit.keep(values["latents"], pipeline.scheduler.sigmas[steps.index])
            if callback is not None:
                changed = callback(
                    pipeline, index, timestep, {name: values[name] for name in callback_inputs}
                )
                values |= {name: changed[name] for name in values if name in changed}
                texts |= {
                    name: _pack(pipeline.transformer, changed[name]) for name in EMBEDDINGS if name in changed
                }
            progress.update()
    pipeline._current_timestep = None
    return values["latents"]


def _pack(transformer, embeddings):
    """Return embeddings (B, L, T) as the transformer takes them: a student needs no padding."""
    if embeddings is None or not _is_student(transformer):
        return embeddings
    return pack_embeddings(embeddings).to(embeddings.device, embeddings.dtype)


def _is_student(transformer):
    return isinstance(getattr(transformer, "_orig_mod", transformer), WanLiteStudent)


def _guided_velocity(pipeline, latents, timestep, text, negative):
    """Return the velocity (B, C, H, W) in float32, with guidance if there is a negative text."""
    velocity = _velocity(pipeline, "cond", latents, timestep, text)
    if negative is None or not pipeline.do_classifier_free_guidance:
        return velocity
    negative_velocity = _velocity(pipeline, "uncond", latents, timestep, negative)
    return negative_velocity + pipeline.guidance_scale * (velocity - negative_velocity)


def _velocity(pipeline, name, latents, timestep, text):
    transformer = pipeline.transformer
    with transformer.cache_context(name):
        velocity = transformer(
            hidden_states=latents.to(transformer.dtype).unsqueeze(2),
            timestep=timestep.float().expand(len(latents)),
            encoder_hidden_states=text,
            attention_kwargs=pipeline.attention_kwargs,
            return_dict=False,
        )[0]
    return velocity.squeeze(2).float()
