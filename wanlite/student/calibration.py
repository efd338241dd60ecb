"""A projected student and its teacher's expert -> the same student, its matrices refitted to the expert's
activations.

First the residual channels are chosen that predict all others best. Then the student and the expert compute
the same noisy frames in step, with one teacher block in memory at a time, and each matrix of the student is
moved by ridge regression on the student's own activations: the output of dropped channels is mostly a linear
function of the kept ones. No real images are needed, because the expert generates the frames from noise and
prompts.

Legend: B batch, C channels, H W latent height and width, N tokens, L text length, D d teacher and student
width, R rows of a matrix that are kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..flow import add_noise, shift_noise_level
from ..network import TextTokens
from ..schedule import TIMESTEPS
from ..teacher.model import run_expert, stream_expert
from .projection import Report
from .regression import solve_ridge

RIDGE = 3e-3  # of the mean Gram diagonal
OUTPUT_SHARE = 0.5  # of the way that an attention output is moved; 1 was no better
LAST_WEIGHT = 3  # of the hidden states that the head reads, in the choice of channels
GENERATION_STEPS = 4  # Euler steps from noise to a frame; each reads the expert once
PASSES = GENERATION_STEPS + 2  # through the expert for a frame: generation, choice of channels, calibration
ATTENTIONS = ("attn1", "attn2")


@dataclass
class Frames:
    """Noisy frames on which student and expert are compared."""

    latents: Tensor  # (B, C, H, W)
    timestep: Tensor  # (B,) in 0..1000
    text: TextTokens


@torch.no_grad()
def make_frames(files, text, size, clean=None, seed=0, shift=3.0, device="cpu") -> Frames:
    """Return a frame for each prompt of `text`, at noise levels spread evenly over 0 to 1.

    `clean` (B, C, H, W) are latents of real images; without them the expert generates frames of `size` (latent
    height and width) on a schedule with `shift`. The noise is the same on every device.
    """
    generator, text = torch.Generator().manual_seed(seed), text.to(device)
    count = len(text.tokens)
    shape = count, files.config["in_channels"], *(size if clean is None else clean.shape[-2:])
    start, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    if clean is None:
        clean = _generate(stream_expert(files, device), start, text, shift)
    order = torch.randperm(count, generator=generator)
    noise_level = ((torch.arange(count) + 0.5) / count)[order].to(device)
    return Frames(add_noise(clean.to(device), noise, noise_level), TIMESTEPS * noise_level, text)


def _generate(expert, latents, text, shift):
    """Solve from noise to frames (B, C, H, W) in GENERATION_STEPS Euler steps, without guidance."""
    levels = shift_noise_level(torch.linspace(1, 0, GENERATION_STEPS + 1), shift)
    steps = list(zip(levels[:-1], levels[1:]))
    for level, lower in tqdm(steps, desc="generating frames to calibrate on", unit="step", disable=None):
        timestep = (TIMESTEPS * level).expand(len(latents)).to(latents.device)
        velocity, _ = run_expert(expert, latents, timestep, text)
        latents = latents + (lower - level).item() * velocity
    return latents


@torch.no_grad()
def choose_channels(files, frames: Frames, width: int) -> Tensor:
    """Return the `width` residual channels of an expert, in rising order, that predict all others best
    linearly.
    """
    expert = stream_expert(files, frames.latents.device)
    forward = _begin(expert, frames)
    moment = _normed_moment(forward.hidden_states)
    for block in tqdm(expert.blocks, desc="choosing channels", unit="block", disable=None):
        forward.run(block)
        last = _normed_moment(forward.hidden_states)
        moment += last
    return _best_columns(moment + LAST_WEIGHT * last, width)


def _normed_moment(hidden_states):
    """Return the second moment (D, D) of hidden states (B, N, D) after a LayerNorm, as matrices read them."""
    rows = nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:]).flatten(0, 1).double()
    return rows.T @ rows / len(rows)


def _best_columns(moment, count):
    """Pick columns one by one, each time the one that explains most of the unexplained variance."""
    size, kind = len(moment), {"dtype": moment.dtype, "device": moment.device}
    unexplained = moment + 1e-6 * moment.diagonal().mean() * torch.eye(size, **kind)
    is_free = torch.ones(size, dtype=torch.bool, device=moment.device)
    buffer = torch.empty_like(unexplained)  # allocated once: allocations would double the time
    for _ in range(count):
        explained = torch.square(unexplained, out=buffer).sum(0) / unexplained.diagonal().clamp(min=1e-12)
        best = torch.where(is_free, explained, -1.0).argmax()
        is_free[best] = False
        column, power = unexplained[:, best], unexplained[best, best].clone()
        unexplained -= torch.outer(column, column, out=buffer).div_(power)
    return (~is_free).nonzero().flatten().cpu()


@torch.no_grad()
def calibrate(student, files, report: Report, frames: Frames) -> None:
    """Refit a student in place, on the frames' device; `report` is that of its projection from the expert
    `files`.
    """
    device = frames.latents.device
    expert, channels = stream_expert(files, device), report.channels.to(device)
    theirs, ours = _begin(expert, frames), _begin(student, frames)
    teacher_blocks = iter(expert.blocks)
    spans = tqdm(report.spans, desc="calibrating", unit="block", disable=None)
    for span, block, kept_rows in zip(spans, student.blocks, report.kept_rows):
        targets, kept = _run_span(islice(teacher_blocks, len(span)), theirs, channels, kept_rows)
        _refit_block(block, ours, targets, kept, kept_rows)
    target = expert.proj_out(_head_input(expert, theirs))
    _refit(student.proj_out, _head_input(student, ours), target)


@dataclass
class _Forward:
    """A forward pass over the frames, before some block."""

    hidden_states: Tensor  # (B, N, D)
    text: Tensor  # (B, L, D)
    time: Tensor  # (B, D)
    modulation: Tensor  # (B, 6, D)
    rotary: tuple
    logit_bias: Tensor  # (B, L)

    def run(self, block):
        """Replace the hidden states by those after a block."""
        self.hidden_states = block(
            self.hidden_states, self.text, self.modulation, self.rotary, self.logit_bias
        )


def _begin(network, frames):
    """Embed frames, prompts and timesteps, as one_frame_velocity does."""
    latents = frames.latents.unsqueeze(2)  # (B, C, 1, H, W)
    hidden_states = network.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
    time, modulation, text, _ = network.condition_embedder(frames.timestep, frames.text.tokens)
    modulation = modulation.unflatten(1, (6, -1))  # (B, 6, D)
    return _Forward(hidden_states, text, time, modulation, network.rope(latents), frames.text.logit_bias)


def _head_input(network, forward):
    shift, scale = (network.scale_shift_table + forward.time.unsqueeze(1)).chunk(2, dim=1)
    return network.norm_out(forward.hidden_states) * (1 + scale) + shift


# ---- the teacher's side ------------------------------------------------------------------------------------

WATCHED = {f"{attention}.{kind}": f"{attention}.to_{kind}" for attention in ATTENTIONS for kind in "qkv"}
WATCHED |= {"ffn": "ffn.net.0.proj"}


def _run_span(blocks: Iterable, forward, channels, kept_rows) -> tuple[dict, dict]:
    """Run the teacher's blocks of a span.

    Returns the hidden states (B, N, d) that the student block should reach after each of its components, and
    the outputs (B, N or L, R) of the rows that it keeps.
    """
    after = forward.hidden_states[..., channels]
    updates: dict = {"attn1": 0.0, "attn2": 0.0}
    picked = []
    for number, block in enumerate(blocks):
        outputs: dict[str, Tensor] = {}
        hooks = _watch(block, outputs, partial(_pick, number=number, kept_rows=kept_rows), channels)
        forward.run(block)
        for hook in hooks:
            hook.remove()
        gate = (block.scale_shift_table + forward.modulation)[:, 2:3]  # (B, 1, D)
        updates["attn1"] = updates["attn1"] + outputs.pop("attn1") * gate[..., channels]
        updates["attn2"] = updates["attn2"] + outputs.pop("attn2")
        picked.append(outputs)
    after = after + updates["attn1"]
    targets = {"attn1": after, "attn2": after + updates["attn2"]}
    return targets | {"ffn": forward.hidden_states[..., channels]}, _join(picked)


def _watch(block, outputs, pick: Callable, channels):
    """Add hooks that store in `outputs` the rows that are kept, and the updates of both attentions."""

    def store_rows(module, inputs, output, name):
        outputs.update(pick(output, name))

    def store_update(module, inputs, output, name):
        outputs[name] = output[..., channels]

    watched = [(module, partial(store_rows, name=name)) for name, module in WATCHED.items()]
    watched += [(name, partial(store_update, name=name)) for name in ATTENTIONS]
    return [block.get_submodule(module).register_forward_hook(hook) for module, hook in watched]


def _pick(output, name, number, kept_rows):
    """Return the kept rows of block `number` in a span's queries, keys, values or neurons.

    Only these: all rows of all blocks of a span would fill the memory.
    """
    kept = [rows for block, rows in kept_rows.get(name) or () if block == number]
    if not kept:
        return {}
    rows = torch.cat([torch.as_tensor(each) for each in kept])
    size = {f"{name}.size": _size(output).expand(len(rows))} if name[-1] in "qk" else {}
    return {name: output[..., rows]} | size


def _join(picked):
    """Concatenate the rows that were picked of each block of a span, in their order."""
    names = dict.fromkeys(chain(*picked))
    return {name: torch.cat([found[name] for found in picked if name in found], -1) for name in names}


def _size(queries):
    """Return the mean divisor of RMSNorm."""
    return queries.square().mean(-1).sqrt().mean()


# ---- the student's side ------------------------------------------------------------------------------------


def _refit_block(block, forward, targets, kept, kept_rows):
    """Refit a student block and move `forward` past it."""
    modulation = (block.scale_shift_table + forward.modulation).chunk(6, dim=1)  # six of (B, 1, d)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
    states = block.norm1(forward.hidden_states) * (1 + scale) + shift
    _refit_attention(block.attn1, states, states, _of("attn1", kept), _of("attn1", kept_rows))
    attend = partial(block.attn1, states, None, None, forward.rotary)
    update = targets["attn1"] - forward.hidden_states
    _refit_output(block.attn1.to_out[0], attend, update, gate, OUTPUT_SHARE)
    forward.hidden_states = forward.hidden_states + attend() * gate

    states, mask = block.norm2(forward.hidden_states), forward.logit_bias[:, None, None]
    _refit_attention(block.attn2, states, forward.text, _of("attn2", kept), _of("attn2", kept_rows))
    attend = partial(block.attn2, states, forward.text, mask, None)
    update = targets["attn2"] - forward.hidden_states
    _refit_output(block.attn2.to_out[0], attend, update, torch.ones_like(gate), OUTPUT_SHARE)
    forward.hidden_states = forward.hidden_states + attend()

    states = block.norm3(forward.hidden_states) * (1 + ffn_scale) + ffn_shift
    _refit(block.ffn.net[0].proj, states, kept["ffn"])
    update = targets["ffn"] - forward.hidden_states
    _refit_output(block.ffn.net[2], partial(block.ffn, states), update, ffn_gate)
    forward.hidden_states = forward.hidden_states + block.ffn(states) * ffn_gate


def _of(attention, values):
    """Return the values of one attention, without its prefix."""
    prefix = f"{attention}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _refit_attention(attention, states, context, kept, kept_rows):
    """Refit queries, keys and, for whole heads, values; then the gains, to keep the teacher's temperature."""
    for kind, inputs in (("q", states), ("k", context), ("v", context)):
        layer = getattr(attention, f"to_{kind}")
        if kind in kept:
            _refit(layer, inputs, kept[kind])
        if kind in "qk":
            gain = kept_rows[f"{kind}.gain"].to(inputs.device)
            norm = getattr(attention, f"norm_{kind}")
            norm.weight.copy_(gain * _size(layer(inputs)) / kept[f"{kind}.size"])


def _refit_output(layer, run: Callable, update, gate, share=1.0):
    """Refit a writer, whose output is multiplied by `gate` (B, 1, d), towards its component's `update`
    (B, N, d).
    """
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = run()
    hook.remove()
    power = gate.square()
    change = (update - output * gate) * gate / (power + 1e-2 * power.mean())  # 0 where the gate is shut
    weight = power.mean(-1, keepdim=True).expand(*update.shape[:-1], 1)  # (B, N, 1)
    _refit(layer, seen[0], output + change, weight / weight.mean(), share)


def _refit(layer, inputs, target, weight=None, share=1.0):
    """Move a linear layer by ridge regression from `inputs` (B, N, in) to `target` (B, N, out).

    `weight` (B, N, 1) is that of each row; `share` is the part of the way that the layer is moved.
    """
    residual = (target - layer(inputs)).flatten(0, 1).double()  # (B * N, out)
    if residual.square().mean() <= 1e-8 * target.square().mean():
        return
    weight = None if weight is None else weight.flatten(0, 1)
    weight_change, bias_change = solve_ridge(inputs.flatten(0, 1), residual, RIDGE, weight)
    layer.weight += share * weight_change
    layer.bias += share * bias_change
