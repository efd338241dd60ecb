"""A projected student and its teacher's expert -> the student with matrices refitted to the expert's activations.

The residual channels that best predict all others are chosen before the projection. For the calibration, student
and expert compute the same noisy frames block by block, with one teacher block in memory at a time, and ridge
regression on the student's activations moves each of its matrices: the output of dropped channels is mostly a
linear function of the kept ones. The expert generates the frames from noise and prompts, without real images.

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

RIDGE = 3e-3  # relative to the mean Gram diagonal
OUTPUT_SHARE = 0.5  # fraction of the correction that is applied to an attention output; 1 is not better
LAST_WEIGHT = 3  # weight of the head's input in the choice of channels
GENERATION_STEPS = 4  # Euler steps from noise to a frame; each reads the expert once
PASSES = GENERATION_STEPS + 2  # of the expert per frame: generation, choice of channels, calibration
ATTENTIONS = ("attn1", "attn2")


@dataclass
class Frames:
    """Noisy frames on which the student is compared with the expert."""

    latents: Tensor  # (B, C, H, W)
    timestep: Tensor  # (B,) in 0..1000
    text: TextTokens


@torch.no_grad()
def make_frames(files, text, size, clean=None, seed=0, shift=3.0, device="cpu") -> Frames:
    """Return a frame for each prompt of `text`, at noise levels spread evenly over 0 to 1.

    `clean` (B, C, H, W) are latents of real images; without them, the expert generates frames of `size` (latent
    height and width) on a schedule with `shift`. The noise is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    text = text.to(device)
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
    for level, lower in tqdm(steps, desc="generating calibration frames", unit="step", disable=None):
        timestep = (TIMESTEPS * level).expand(len(latents)).to(latents.device)
        velocity, _ = run_expert(expert, latents, timestep, text)
        latents = latents + (lower - level).item() * velocity
    return latents


@torch.no_grad()
def choose_channels(files, frames: Frames, width: int) -> Tensor:
    """Return the `width` residual channels of an expert that best predict all others, in ascending order."""
    expert = stream_expert(files, frames.latents.device)
    forward = _begin(expert, frames)
    moment = _normed_moment(forward.hidden_states)
    for block in tqdm(expert.blocks, desc="choosing channels", unit="block", disable=None):
        forward.run(block)
        last = _normed_moment(forward.hidden_states)
        moment += last
    return _best_columns(moment + LAST_WEIGHT * last, width)


def _normed_moment(hidden_states):
    """Return the second moment (D, D) of hidden states (B, N, D) after a LayerNorm, the input of matrices."""
    rows = nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:]).flatten(0, 1).double()
    return rows.T @ rows / len(rows)


def _best_columns(moment, count):
    """Choose columns one by one, each time the one that explains most of the unexplained variance."""
    size = len(moment)
    identity = torch.eye(size, dtype=moment.dtype, device=moment.device)
    unexplained = moment + 1e-6 * moment.diagonal().mean() * identity
    is_free = torch.ones(size, dtype=torch.bool, device=moment.device)
    buffer = torch.empty_like(unexplained)  # allocated once: allocation in the loop would double the time
    for _ in range(count):
        explained = torch.square(unexplained, out=buffer).sum(0) / unexplained.diagonal().clamp(min=1e-12)
        best = torch.where(is_free, explained, -1.0).argmax()
        is_free[best] = False
        column, power = unexplained[:, best], unexplained[best, best].clone()
        unexplained -= torch.outer(column, column, out=buffer).div_(power)
    return (~is_free).nonzero().flatten().cpu()


@torch.no_grad()
def calibrate(student, files, report: Report, frames: Frames) -> None:
    """Refit a student in place, on the frames' device, to the expert in `files`.

    `report` is that of the student's projection from this expert.
    """
    device = frames.latents.device
    expert = stream_expert(files, device)
    channels = report.channels.to(device)
    teacher_forward = _begin(expert, frames)
    student_forward = _begin(student, frames)
    teacher_blocks = iter(expert.blocks)
    spans = tqdm(report.spans, desc="calibrating", unit="block", disable=None)
    for span, block, kept_rows in zip(spans, student.blocks, report.kept_rows):
        span_blocks = islice(teacher_blocks, len(span))
        targets, kept = _run_span(span_blocks, teacher_forward, channels, kept_rows)
        _refit_block(block, student_forward, targets, kept, kept_rows)
    target = expert.proj_out(_head_input(expert, teacher_forward))
    _refit(student.proj_out, _head_input(student, student_forward), target)


@dataclass
class _Forward:
    """A forward pass over the frames, paused between two blocks."""

    hidden_states: Tensor  # (B, N, D)
    text: Tensor  # (B, L, D)
    time: Tensor  # (B, D)
    modulation: Tensor  # (B, 6, D)
    rotary: tuple
    logit_bias: Tensor  # (B, L)

    def run(self, block):
        """Apply a block to the hidden states."""
        self.hidden_states = block(
            self.hidden_states, self.text, self.modulation, self.rotary, self.logit_bias
        )


def _begin(network, frames):
    """Return the forward pass before the first block: frames, prompts and timesteps are embedded."""
    latents = frames.latents.unsqueeze(2)  # (B, C, 1, H, W)
    hidden_states = network.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
    time, modulation, text, _ = network.condition_embedder(frames.timestep, frames.text.tokens)
    modulation = modulation.unflatten(1, (6, -1))  # (B, 6, D)
    return _Forward(hidden_states, text, time, modulation, network.rope(latents), frames.text.logit_bias)


def _head_input(network, forward):
    """Return the input (B, N, D) of the output layer."""
    shift, scale = (network.scale_shift_table + forward.time.unsqueeze(1)).chunk(2, dim=1)
    return network.norm_out(forward.hidden_states) * (1 + scale) + shift


# ---- the teacher -------------------------------------------------------------------------------------------

# {group of rows: layer whose outputs are stored}
HOOKED = {f"{attention}.{kind}": f"{attention}.to_{kind}" for attention in ATTENTIONS for kind in "qkv"}
HOOKED |= {"ffn": "ffn.net.0.proj"}


def _run_span(blocks: Iterable, forward, channels, kept_rows) -> tuple[dict, dict]:
    """Run the teacher blocks of a span.

    Returns the target hidden states (B, N, d) after each component of the student block, and the outputs
    (B, N or L, R) of the rows that it keeps.
    """
    after = forward.hidden_states[..., channels]
    updates: dict = {"attn1": 0.0, "attn2": 0.0}
    picked = []
    for number, block in enumerate(blocks):
        outputs: dict[str, Tensor] = {}
        hooks = _add_hooks(block, outputs, partial(_pick, number=number, kept_rows=kept_rows), channels)
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


def _add_hooks(block, outputs, pick: Callable, channels):
    """Add hooks that store kept rows and the updates of both attentions in `outputs`; returns the hooks."""

    def store_rows(module, inputs, output, name):
        outputs.update(pick(output, name))

    def store_update(module, inputs, output, name):
        outputs[name] = output[..., channels]

    hooks = [(module, partial(store_rows, name=name)) for name, module in HOOKED.items()]
    hooks += [(name, partial(store_update, name=name)) for name in ATTENTIONS]
    return [block.get_submodule(module).register_forward_hook(hook) for module, hook in hooks]


def _pick(output, name, number, kept_rows):
    """Return the kept rows of a layer's output, for block `number` of a span, and the size of queries and keys.

    Other rows are not stored, because all rows of a span's blocks would fill the memory.
    """
    kept = [rows for block, rows in kept_rows.get(name) or () if block == number]
    if not kept:
        return {}
    rows = torch.cat([torch.as_tensor(each) for each in kept])
    size = {f"{name}.size": _size(output).expand(len(rows))} if name[-1] in "qk" else {}
    return {name: output[..., rows]} | size


def _join(picked):
    """Concatenate the rows of a span's blocks, in the order of the blocks."""
    names = dict.fromkeys(chain(*picked))
    return {name: torch.cat([found[name] for found in picked if name in found], -1) for name in names}


def _size(queries):
    """Return the mean root mean square, by which RMSNorm divides."""
    return queries.square().mean(-1).sqrt().mean()


# ---- the student -------------------------------------------------------------------------------------------


def _refit_block(block, forward, targets, kept, kept_rows):
    """Refit a student block, and advance `forward` past it."""
    modulation = (block.scale_shift_table + forward.modulation).chunk(6, dim=1)  # six of (B, 1, d)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
    inputs = block.norm1(forward.hidden_states) * (1 + scale) + shift
    _refit_attention(block.attn1, inputs, inputs, _of("attn1", kept), _of("attn1", kept_rows))
    attend = partial(block.attn1, inputs, None, None, forward.rotary)
    update = targets["attn1"] - forward.hidden_states
    _refit_output(block.attn1.to_out[0], attend, update, gate, OUTPUT_SHARE)
    forward.hidden_states = forward.hidden_states + attend() * gate

    inputs = block.norm2(forward.hidden_states)
    mask = forward.logit_bias[:, None, None]
    _refit_attention(block.attn2, inputs, forward.text, _of("attn2", kept), _of("attn2", kept_rows))
    attend = partial(block.attn2, inputs, forward.text, mask, None)
    update = targets["attn2"] - forward.hidden_states
    _refit_output(block.attn2.to_out[0], attend, update, torch.ones_like(gate), OUTPUT_SHARE)
    forward.hidden_states = forward.hidden_states + attend()

    inputs = block.norm3(forward.hidden_states) * (1 + ffn_scale) + ffn_shift
    _refit(block.ffn.net[0].proj, inputs, kept["ffn"])
    update = targets["ffn"] - forward.hidden_states
    _refit_output(block.ffn.net[2], partial(block.ffn, inputs), update, ffn_gate)
    forward.hidden_states = forward.hidden_states + block.ffn(inputs) * ffn_gate


def _of(attention, values):
    """Return the entries of one attention, without its prefix."""
    prefix = f"{attention}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _refit_attention(attention, hidden_states, context, kept, kept_rows):
    """Refit queries, keys and, for whole heads, values; then the norms, to keep the teacher's logit scale."""
    for kind, inputs in (("q", hidden_states), ("k", context), ("v", context)):
        layer = getattr(attention, f"to_{kind}")
        if kind in kept:
            _refit(layer, inputs, kept[kind])
        if kind in "qk":
            gain = kept_rows[f"{kind}.gain"].to(inputs.device)
            norm = getattr(attention, f"norm_{kind}")
            norm.weight.copy_(gain * _size(layer(inputs)) / kept[f"{kind}.size"])


def _refit_output(layer, run: Callable, update, gate, share=1.0):
    """Refit an output layer of a component towards the component's `update` (B, N, d) of the hidden states.

    `run()` returns the component's output, which is multiplied by `gate` (B, 1, d).
    """
    layer_inputs = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: layer_inputs.append(inputs[0]))
    output = run()
    hook.remove()
    power = gate.square()
    change = (update - output * gate) * gate / (power + 1e-2 * power.mean())  # 0 where the gate is 0
    weight = power.mean(-1, keepdim=True).expand(*update.shape[:-1], 1)  # (B, N, 1)
    _refit(layer, layer_inputs[0], output + change, weight / weight.mean(), share)


def _refit(layer, inputs, target, weight=None, share=1.0):
    """Refit a linear layer in place by ridge regression from `inputs` (B, N, in) to `target` (B, N, out).

    `weight` (B, N, 1) weights the rows; `share` is the fraction of the correction that is applied.
    """
    residual = (target - layer(inputs)).flatten(0, 1).double()  # (B * N, out)
    if residual.square().mean() <= 1e-8 * target.square().mean():
        return
    weight = None if weight is None else weight.flatten(0, 1)
    weight_change, bias_change = solve_ridge(inputs.flatten(0, 1), residual, RIDGE, weight)
    layer.weight += share * weight_change
    layer.bias += share * bias_change
