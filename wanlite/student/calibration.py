"""A projected student + its teacher's expert -> the same student, its matrices refitted to what the teacher
computes.

First the expert says which residual channels best foretell all others. Then student and expert walk the same
noisy frames in step, one teacher block in memory at a time, and each matrix of the student is moved by ridge
regression on the student's own activations: what the dropped channels said is mostly a linear function of the
kept ones, and is read from them from here on. No pictures are needed: the expert draws the frames itself,
from noise and the prompts.

Legend: B batch, N tokens, L text length, D d teacher and student width, F f feed-forward neurons.
"""

from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import nn
from tqdm import tqdm

from ..flow import shift_noise_level
from ..network import TextTokens
from ..schedule import TIMESTEPS
from ..teacher.model import run_expert, stream_expert

RIDGE = 3e-3  # of the mean Gram diagonal
OUTPUT_SHARE = 0.5  # an attention output goes half of the way; all of it was no better
LAST_SHARE = 3  # the states that the head reads count this often in the choice of channels


DRAWING_STEPS = 4  # Euler steps from noise to a frame; each reads the expert once
PASSES = DRAWING_STEPS + 2  # of a frame through the expert: drawing, choosing channels, calibrating


@dataclass
class Frames:
    """Noisy frames on which student and expert are compared."""

    latents: torch.Tensor  # (B, C, H, W)
    timestep: torch.Tensor  # (B,) in 0..1000
    text: TextTokens


@torch.no_grad()
def make_frames(files, text, size, clean=None, seed=0, shift=3.0, device="cpu"):
    """Return a frame for each prompt of `text`, at noise levels spread evenly over 0 to 1.

    `clean` (B, C, H, W) are latents of real pictures; without them the expert draws frames of `size` (height
    and width of the latents) in DRAWING_STEPS steps of a schedule with `shift`. The noise is the same on
    every device.
    """
    generator, text = torch.Generator().manual_seed(seed), text.to(device)
    count = len(text.tokens)
    size = size if clean is None else clean.shape[-2:]
    noise, other = (
        torch.randn(count, files.config["in_channels"], *size, generator=generator).to(device)
        for _ in range(2)
    )
    if clean is None:
        clean, expert = noise, stream_expert(files, device)
        even = torch.linspace(1, 0, DRAWING_STEPS + 1)
        levels = shift_noise_level(even, shift)
        steps = tqdm(
            list(zip(levels[:-1], levels[1:])),
            desc="drawing frames to calibrate on",
            unit="step",
            disable=None,
        )
        for level, lower in steps:
            velocity, _ = run_expert(expert, clean, (TIMESTEPS * level).expand(count).to(device), text)
            clean = clean + (lower - level).item() * velocity
    noise_level = (((torch.arange(count) + 0.5) / count)[torch.randperm(count, generator=generator)]).to(
        device
    )
    level = noise_level[:, None, None, None]
    return Frames((1 - level) * clean.to(device) + level * other, TIMESTEPS * noise_level, text)


@torch.no_grad()
def choose_channels(files, frames, width):
    """Return the `width` residual channels of an expert, in rising order, that best foretell all others
    linearly.
    """
    expert = stream_expert(files, frames.latents.device)
    forward = _begin(expert, frames)
    moment = _normed_moment(forward.states)
    for block in tqdm(expert.blocks, desc="choosing channels", unit="block", disable=None):
        forward.states = block(
            forward.states, forward.text, forward.modulation, forward.rotary, forward.logit_bias
        )
        last = _normed_moment(forward.states)
        moment += last
    return _best_columns(moment + LAST_SHARE * last, width)


def _normed_moment(states):
    """Return the second moment (D, D) of what a reader sees: states (B, N, D) after a LayerNorm."""
    rows = nn.functional.layer_norm(states, states.shape[-1:]).flatten(0, 1).double()
    return rows.T @ rows / len(rows)


def _best_columns(moment, count):
    """Pick columns one by one, each that which explains most of what the picked ones leave unexplained."""
    left = moment + 1e-6 * moment.diagonal().mean() * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )
    free, room = (
        torch.ones_like(left[0], dtype=torch.bool),
        torch.empty_like(left),
    )  # new memory at each turn takes as long again
    for _ in range(count):
        explained = torch.square(left, out=room).sum(0) / left.diagonal().clamp(min=1e-12)
        best = torch.where(free, explained, -1.0).argmax()
        free[best] = False
        left -= torch.outer(left[:, best], left[:, best], out=room).div_(left[best, best].clone())
    return (~free).nonzero().flatten().cpu()


@torch.no_grad()
def calibrate(student, files, report, frames):
    """Refit a student that `report` tells how it was cut from the expert `files`; in place, on the frames'
    device.
    """
    expert = stream_expert(files, frames.latents.device)
    theirs, ours = _begin(expert, frames), _begin(student, frames)
    blocks, channels = iter(expert.blocks), report.channels.to(frames.latents.device)
    spans = tqdm(report.spans, desc="calibrating", unit="block", disable=None)
    for span, block, cut in zip(spans, student.blocks, report.cuts):
        goals, seen = _watch_span(islice(blocks, len(span)), theirs, channels, cut)
        _refit_block(block, ours, goals, _join(seen), cut)
    wanted = expert.proj_out(_head_input(expert, theirs))
    _refit(student.proj_out, _head_input(student, ours), wanted)


class _Forward:
    """The state of a forward pass over the frames."""

    def __init__(self, states, text, time, modulation, rotary, logit_bias):
        self.states, self.text, self.time, self.modulation = states, text, time, modulation
        self.rotary, self.logit_bias = rotary, logit_bias


def _begin(network, frames):
    """Embed frames, words and times, as one_frame_velocity does."""
    latents, timestep, text = frames.latents, frames.timestep, frames.text
    states = (
        network.patch_embedding(latents.unsqueeze(2)).flatten(2).transpose(1, 2).contiguous()
    )  # (B, N, D)
    time, modulation, words, _ = network.condition_embedder(timestep, text.tokens)
    modulation, rotary = modulation.unflatten(1, (6, -1)), network.rope(latents.unsqueeze(2))  # (B, 6, D)
    return _Forward(states, words, time, modulation, rotary, text.logit_bias)


def _head_input(network, forward):
    shift, scale = (network.scale_shift_table + forward.time.unsqueeze(1)).chunk(2, dim=1)
    return network.norm_out(forward.states) * (1 + scale) + shift


# ---- the teacher's side ------------------------------------------------------------------------------------

WATCHED = {
    f"{attention}.{kind}": f"{attention}.to_{kind}" for attention in ("attn1", "attn2") for kind in "qkv"
}
WATCHED |= {"ffn": "ffn.net.0.proj"}


def _watch_span(blocks, forward, channels, cut):
    """Walk a span; returns the states to reach after each part of a student block, and of each block what the
    student keeps.
    """
    entry, updates, seen = forward.states[..., channels], {"attn1": 0.0, "attn2": 0.0}, []
    for number, block in enumerate(blocks):
        found = {}
        hooks = [
            block.get_submodule(module).register_forward_hook(
                lambda module, inputs, output, name=name, number=number, found=found: found.update(
                    _pick(output, name, number, cut)
                )
            )
            for name, module in WATCHED.items()
        ]
        hooks += [
            block.get_submodule(module).register_forward_hook(
                lambda module, inputs, output, name=module, found=found: found.__setitem__(
                    name, output[..., channels]
                )
            )
            for module in updates
        ]
        forward.states = block(
            forward.states, forward.text, forward.modulation, forward.rotary, forward.logit_bias
        )
        for hook in hooks:
            hook.remove()
        gate = (block.scale_shift_table + forward.modulation)[:, 2:3]
        updates["attn1"] = updates["attn1"] + found.pop("attn1") * gate[..., channels]
        updates["attn2"] = updates["attn2"] + found.pop("attn2")
        seen.append(found)
    after = entry + updates["attn1"]
    return {"attn1": after, "attn2": after + updates["attn2"], "ffn": forward.states[..., channels]}, seen


def _pick(output, name, number, cut):
    """Pick what the student keeps of a block's queries, keys, values or neurons: all of them, of a span,
    would fill the memory.
    """
    rows = [kept for block, kept in cut.get(name) or () if block == number]
    if not rows:
        return {}
    rows = torch.cat([torch.as_tensor(kept) for kept in rows])
    return {name: output[..., rows]} | (
        {f"{name}.size": _size(output).expand(len(rows))} if name[-1] in "qk" else {}
    )


def _join(seen):
    """Put what was picked of the blocks of a span side by side, in their order."""
    return {
        name: torch.cat([found[name] for found in seen if name in found], -1)
        for name in dict.fromkeys(chain(*seen))
    }


def _size(queries):
    """Return the mean of what RMSNorm divides by."""
    return queries.square().mean(-1).sqrt().mean()


# ---- the student's side ------------------------------------------------------------------------------------


def _refit_block(block, forward, goals, wanted, cut):
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + forward.modulation).chunk(
        6, dim=1
    )
    normed = block.norm1(forward.states) * (1 + scale) + shift
    _refit_attention(block.attn1, normed, normed, wanted, "attn1", cut)
    _refit_output(
        block.attn1.to_out[0],
        lambda: block.attn1(normed, None, None, forward.rotary),
        goals["attn1"] - forward.states,
        gate,
        OUTPUT_SHARE,
    )
    forward.states = forward.states + block.attn1(normed, None, None, forward.rotary) * gate

    normed, mask = block.norm2(forward.states), forward.logit_bias[:, None, None]
    _refit_attention(block.attn2, normed, forward.text, wanted, "attn2", cut)
    _refit_output(
        block.attn2.to_out[0],
        lambda: block.attn2(normed, forward.text, mask, None),
        goals["attn2"] - forward.states,
        torch.ones_like(gate),
        OUTPUT_SHARE,
    )
    forward.states = forward.states + block.attn2(normed, forward.text, mask, None)

    normed = block.norm3(forward.states) * (1 + ffn_scale) + ffn_shift
    _refit(block.ffn.net[0].proj, normed, wanted["ffn"])
    _refit_output(block.ffn.net[2], lambda: block.ffn(normed), goals["ffn"] - forward.states, ffn_gate)
    forward.states = forward.states + block.ffn(normed) * ffn_gate


def _refit_attention(attention, states, context, wanted, name, cut):
    """Refit queries, keys and, of whole heads, values; then the gains, to keep the teacher's temperature."""
    for kind, inputs in (("q", states), ("k", context), ("v", context)):
        layer = getattr(attention, f"to_{kind}")
        if f"{name}.{kind}" in wanted:
            _refit(layer, inputs, wanted[f"{name}.{kind}"])
        if kind in "qk":
            gain = getattr(attention, f"norm_{kind}").weight
            gain.copy_(
                cut[f"{name}.{kind}.gain"].to(inputs.device)
                * _size(layer(inputs))
                / wanted[f"{name}.{kind}.size"]
            )


def _refit_output(layer, run, update, gate, share=1.0):
    """Refit a writer, whose output is multiplied by `gate` (B, 1, d), towards the update that its part should
    make.
    """
    found = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    output = run()
    hook.remove()
    power = gate.square()
    change = (update - output * gate) * gate / (power + 1e-2 * power.mean())  # a shut gate asks for nothing
    weight = power.mean(-1, keepdim=True).expand(*update.shape[:-1], 1)
    _refit(layer, found[0], output + change, weight / weight.mean(), share)


def _refit(layer, inputs, wanted, weight=None, share=1.0):
    """Move a linear layer by ridge regression from `inputs` (B, N, in) to `wanted` (B, N, out), by `weight`."""
    residual = (wanted - layer(inputs)).flatten(0, 1).double()
    if residual.square().mean() <= 1e-8 * wanted.square().mean():
        return
    rows = nn.functional.pad(inputs, (0, 1), value=1.0).flatten(0, 1).double()
    weighted = rows if weight is None else rows * weight.flatten(0, 1)
    gram = weighted.T @ rows
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change = share * torch.linalg.solve(gram, weighted.T @ residual).T.float()
    layer.weight += change[:, :-1]
    layer.bias += change[:, -1]
