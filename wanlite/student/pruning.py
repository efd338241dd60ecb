"""A span of teacher blocks -> one student block: of the heads and neurons that write most, what the kept
channels read and write.

The student's modulation is one for the span: what a block of it says otherwise is folded into its matrices.
What dropped channels, heads and neurons say whatever the input goes to biases, and norms are scaled so that
kept channels are divided by what all were.

Legend: D d teacher and student width, F f feed-forward neurons; capital = teacher.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

SHIFT, SCALE, GATE = (0, 3), (1, 4), (2, 5)  # rows of the modulation: of self-attention, of the feed-forward
ATTENTIONS = ("attn1", "attn2")


@dataclass
class BlockProjector:
    """What every block is cut with."""

    config: dict  # the student's
    teacher: dict  # the teacher's
    channels: torch.Tensor
    norm_scale: float
    times: dict
    words: torch.Tensor


def cut_span(projector, reader, span):
    """Return one student block's tensors, what rows of which block they are, the energy kept per group, and
    the expert's name.
    """
    channels, norm_scale, rows = projector.channels, projector.norm_scale, list(SCALE)
    prefixes = [f"blocks.{number}." for number in span]
    full_tables = torch.stack(
        [reader(f"{prefix}scale_shift_table")[0] for prefix in prefixes]
    )  # (span, 6, D)
    tables = full_tables[:, :, channels]
    table = tables.mean(0)
    stretched = table.clone()
    stretched[rows] = norm_scale * (1 + table[rows]) - 1
    full_norms = [
        torch.stack([reader(f"{prefix}norm2.{kind}") for prefix in prefixes]) for kind in ("weight", "bias")
    ]
    norms = [each[:, channels] for each in full_norms]
    weight, bias = norms[0].mean(0), norms[1].mean(0)
    tensors = {"scale_shift_table": stretched[None], "norm2.weight": weight * norm_scale, "norm2.bias": bias}
    parts, cut, kept = {name: [] for name in (*ATTENTIONS, "ffn")}, {}, {}
    over_time = projector.times["modulation"]
    dropped = torch.ones(over_time.shape[-1], device=channels.device)
    dropped[channels] = 0
    for number, prefix in enumerate(prefixes):
        folds = _fold_modulation(tables[number], table, over_time[:, :, channels])
        folds["attn2"] = _fold_affine(norms[0][number], norms[1][number], weight, bias)
        silent = full_tables[number] + over_time.mean(0)  # what dropped channels say whatever the input
        for name, constant in (
            ("attn1", silent[SHIFT[0]]),
            ("attn2", full_norms[1][number]),
            ("ffn", silent[SHIFT[1]]),
        ):
            folds[name].silent = dropped * constant
        for name, text_basis in zip(ATTENTIONS, (None, projector.words)):
            parts[name].append(
                _cut_attention(
                    reader,
                    f"{prefix}{name}.",
                    channels,
                    text_basis,
                    folds[name],
                    projector.config["num_heads"],
                )
            )
        parts["ffn"].append(
            _cut_feed_forward(
                reader, f"{prefix}ffn.net.", channels, folds["ffn"], projector.config["ffn_dim"]
            )
        )
    for name in ATTENTIONS:
        tensors |= _join_heads(
            parts.pop(name), projector.config, projector.teacher["attention_head_dim"], name, cut, kept
        )
    tensors |= _join_neurons(parts.pop("ffn"), projector.config["ffn_dim"], cut, kept)
    return tensors, cut, kept, reader.files.name


@dataclass
class _Fold:
    """What a block's matrices take up so that the modulation of its span serves it: exactly 1, 0, 1 for a
    span of one block.
    """

    scale: torch.Tensor  # (d,) for the columns of its readers
    shift: torch.Tensor  # (d,)
    gate: torch.Tensor  # (d,) for the rows of its writer
    silent: torch.Tensor | None = None  # (D,) the constant that its readers miss of dropped channels


def _fold_modulation(own, shared, over_time):
    """Return the folds of self-attention and feed-forward, by least squares over timesteps, per channel."""
    folds = {}
    for part, name in enumerate(("attn1", "ffn")):
        shift, scale, gate = SHIFT[part], SCALE[part], GATE[part]
        ratio = _ratio(1 + own[scale] + over_time[:, scale], 1 + shared[scale] + over_time[:, scale])
        offset = (own[shift] + over_time[:, shift]).mean(0) - ratio * (
            shared[shift] + over_time[:, shift]
        ).mean(0)
        folds[name] = _Fold(
            ratio, offset, _ratio(own[gate] + over_time[:, gate], shared[gate] + over_time[:, gate])
        )
    return folds


def _ratio(own, shared):
    """Least squares of own = ratio * shared over the first dimension; 1 where they are equal or the shared
    one vanishes.
    """
    power = shared.square().sum(0)
    return torch.where(
        (own == shared).all(0) | (power <= 1e-8 * power.mean()),
        torch.ones_like(power),
        (own * shared).sum(0) / power.clamp(min=1e-12),
    ).clamp(-4, 4)


def _fold_affine(own_weight, own_bias, weight, bias):
    ratio = _ratio(own_weight[None], weight[None])
    return _Fold(ratio, own_bias - ratio * bias, torch.ones_like(ratio))


def _cut_reader(reader, name, channels, fold):
    """Cut a reader of the residual: keep its columns, fold a block's own scale and the constants in."""
    weight = reader(f"{name}.weight")
    bias = reader(f"{name}.bias") + weight @ fold.silent
    weight = weight[:, channels]
    return weight * fold.scale, bias + weight @ fold.shift


def _cut_writer(reader, name, channels, gate):
    """Cut a writer to the residual: keep its rows, fold a block's own gate in."""
    return gate[:, None] * reader(f"{name}.weight")[channels], gate * reader(f"{name}.bias")[channels]


def _cut_attention(reader, prefix, channels, text_basis, fold, num_heads):
    """Return one block's attention, of the heads that write most, between the student's residual channels (or
    text basis) and the teacher's own rows."""
    cut = {"q": _cut_reader(reader, f"{prefix}to_q", channels, fold)}
    for kind in "kv":
        cut[kind] = (
            _cut_reader(reader, f"{prefix}to_{kind}", channels, fold)
            if text_basis is None
            else (reader(f"{prefix}to_{kind}.weight") @ text_basis, reader(f"{prefix}to_{kind}.bias"))
        )
    cut["o"], cut["o_bias"] = _cut_writer(reader, f"{prefix}to_out.0", channels, fold.gate)  # (d, D), (d,)
    cut["gain"] = {kind: reader(f"{prefix}norm_{kind}.weight") for kind in "qk"}
    cut["power"] = {
        kind: _row_power(*cut[kind]).mean() for kind in "qk"
    }  # what the teacher's RMSNorm divides by
    return _weigh_heads(cut, reader.files.config["attention_head_dim"], num_heads)


def _weigh_heads(cut, full, num_heads):
    """Note what each head writes, the squared norm of its output times its value matrix, and keep the heads
    that write most.
    """
    outputs, values = cut["o"].unflatten(1, (-1, full)), cut["v"][0].unflatten(0, (-1, full))
    writes = torch.stack([(outputs[:, head] @ values[head]).square().sum() for head in range(len(values))])
    cut |= {
        "writes": writes,
        "energy": writes.sum(),
        "rows": torch.arange(cut["o"].shape[1], device=writes.device),
    }
    return _take_heads(cut, top(writes, min(num_heads, len(writes))))


def _take_heads(cut, heads):
    """Drop all other heads; what they write whatever they look at goes to the bias."""
    rows = (
        torch.arange(len(cut["rows"]), device=heads.device)
        .unflatten(0, (len(cut["writes"]), -1))[heads]
        .flatten()
    )
    silent = cut["v"][1].clone()
    silent[rows] = 0
    return (
        cut
        | {kind: (cut[kind][0][rows], cut[kind][1][rows]) for kind in "qkv"}
        | {
            "o": cut["o"][:, rows],
            "o_bias": cut["o_bias"] + cut["o"] @ silent,
            "rows": cut["rows"][rows],
            "gain": {kind: gain[rows] for kind, gain in cut["gain"].items()},
            "writes": cut["writes"][heads],
        }
    )


def _share_out(scores, count):
    """Return, of the `count` largest scores in several lists together, the places in each list."""
    chosen, found = top(torch.cat(scores), count), []
    for score in scores:
        found.append(chosen[(chosen >= 0) & (chosen < len(score))])
        chosen = chosen - len(score)
    return found


def _row_power(weight, bias):
    """Return the expected square of each output for inputs of unit variance."""
    return weight.square().sum(1) + bias.square()


def _join_heads(cuts, config, full, name, picked, kept):
    """Keep the heads that write most, of all blocks in a span, and their rotary pairs; returns a student
    attention's tensors.
    """
    num_heads, size = config["num_heads"], config["hidden_size"] // config["num_heads"]
    joined = {key: [] for key in ("q", "k", "v", "o", "q_gain", "k_gain", "q_power", "k_power")}
    picks, energy, total = {kind: [] for kind in "qkv"}, 0.0, float(sum(cut["energy"] for cut in cuts))
    cuts = [
        _take_heads(cut, heads)
        for cut, heads in zip(cuts, _share_out([cut["writes"] for cut in cuts], num_heads))
    ]
    output_bias = sum(cut["o_bias"] for cut in cuts)
    for number, cut in enumerate(cuts):
        for rows in torch.arange(len(cut["rows"])).view(-1, full):
            pairs = rows[_rotary_rows(cut, rows, full, size, has_rotary=name == "attn1")]
            picks["v"].append((number, cut["rows"][rows]))
            for kind in "qk":
                picks[kind].append((number, cut["rows"][pairs]))
                joined[kind].append([tensor[pairs] for tensor in cut[kind]])
                joined[f"{kind}_gain"].append(cut["gain"][kind][pairs] * (size / full) ** 0.25)
                joined[f"{kind}_power"].append(cut["power"][kind].expand(size))
            value, value_bias, output, lost = _cut_value(
                cut["v"][0][rows], cut["v"][1][rows], cut["o"][:, rows], size
            )
            energy += float((output @ value).square().sum())
            joined["v"].append((value, value_bias))
            joined["o"].append(output)
            output_bias = output_bias + lost
    kept[name] = energy / total
    tensors = {f"{name}.to_out.0.weight": torch.cat(joined["o"], 1), f"{name}.to_out.0.bias": output_bias}
    for kind in "qkv":
        weights, biases = zip(*joined[kind])
        tensors[f"{name}.to_{kind}.weight"], tensors[f"{name}.to_{kind}.bias"] = (
            torch.cat(weights),
            torch.cat(biases),
        )
    if size == full:  # values of a smaller head are no rows of the teacher's
        picked[f"{name}.v"] = picks["v"]
    for kind in "qk":
        power = _row_power(
            tensors[f"{name}.to_{kind}.weight"], tensors[f"{name}.to_{kind}.bias"]
        ).mean()  # the student's
        gain = torch.cat(joined[f"{kind}_gain"])
        picked |= {f"{name}.{kind}": picks[kind], f"{name}.{kind}.gain": gain}
        tensors[f"{name}.norm_{kind}.weight"] = gain * (power / torch.cat(joined[f"{kind}_power"])).sqrt()
    return tensors


def _rotary_rows(cut, rows, full, size, has_rotary):
    """Choose `size` of a head's `full` query and key channels as whole rotary pairs, each axis with the share
    that Wan gives it.

    Per head Wan lays out [time | height | width]; a smaller head has fewer and coarser-spaced frequencies, so
    each of its spatial pairs takes the teacher's pair of nearest log-frequency. Time pairs stand still at one
    frame: the strongest are kept.
    """
    if size == full:
        return torch.arange(full)
    strength = (
        sum(_row_power(cut[kind][0][rows], cut[kind][1][rows]) for kind in "qk").unflatten(0, (-1, 2)).sum(1)
    )
    if not has_rotary:
        pairs = top(strength, size // 2).cpu()
    else:
        axes, axes_full = _axis_pairs(size), _axis_pairs(full)
        pairs, start = [top(strength[: axes_full[0]], axes[0]).cpu()], axes_full[0]
        for few, many in zip(axes[1:], axes_full[1:]):
            pairs.append(start + (torch.arange(few) * many / few).round().long())
            start += many
        pairs = torch.cat(pairs)
    return (2 * pairs[:, None] + torch.arange(2)).flatten()


def _axis_pairs(size):
    """Return how many rotary pairs of a head belong to time, height and width."""
    spatial = size // 6
    return size // 2 - 2 * spatial, spatial, spatial


def _cut_value(value, bias, output, size):
    """Shrink a head's values to `size` channels by the best low-rank form of output @ value; returns also the
    bias it loses.
    """
    if size == len(value):
        return value, bias, output, torch.zeros(len(output))
    q_out, r_out = torch.linalg.qr(output)
    q_in, r_in = torch.linalg.qr(value.T)
    left, strength, right = torch.linalg.svd(r_out @ r_in.T)
    root = strength[:size].sqrt()
    small_output, small_value = q_out @ left[:, :size] * root, (root[:, None] * right[:size]) @ q_in.T
    return small_value, torch.zeros(size, device=bias.device), small_output, output @ bias


def _cut_feed_forward(reader, prefix, channels, fold, count):
    """Return one block's feed-forward, of the neurons that write most."""
    first, first_bias = _cut_reader(reader, f"{prefix}0.proj", channels, fold)
    second, second_bias = _cut_writer(reader, f"{prefix}2", channels, fold.gate)
    mean, power = _gelu_moments(first_bias, first.square().sum(1).sqrt())
    writes = second.square().sum(0) * power
    cut = {
        "first": first,
        "first_bias": first_bias,
        "second": second,
        "second_bias": second_bias,
        "mean": mean,
        "writes": writes,
        "energy": writes.sum(),
        "rows": torch.arange(len(writes), device=writes.device),
    }
    return _take_neurons(cut, top(writes, min(count, len(writes))))


def _take_neurons(cut, neurons):
    """Drop all other neurons; what they write on average goes to the bias."""
    silent = cut["mean"].clone()
    silent[neurons] = 0
    return (
        cut
        | {name: cut[name][neurons] for name in ("first", "first_bias", "mean", "writes", "rows")}
        | {"second": cut["second"][:, neurons], "second_bias": cut["second_bias"] + cut["second"] @ silent}
    )


def _join_neurons(cuts, count, picked, kept):
    """Keep the neurons that write most, of all blocks in a span."""
    total = float(sum(cut["energy"] for cut in cuts))
    cuts = [
        _take_neurons(cut, neurons)
        for cut, neurons in zip(cuts, _share_out([cut["writes"] for cut in cuts], count))
    ]
    kept["ffn"] = float(sum(cut["writes"].sum() for cut in cuts)) / total
    picked["ffn"] = [(number, cut["rows"]) for number, cut in enumerate(cuts)]
    return {
        "ffn.net.0.proj.weight": torch.cat([cut["first"] for cut in cuts]),
        "ffn.net.0.proj.bias": torch.cat([cut["first_bias"] for cut in cuts]),
        "ffn.net.2.weight": torch.cat([cut["second"] for cut in cuts], 1),
        "ffn.net.2.bias": sum(cut["second_bias"] for cut in cuts),
    }


def _gelu_moments(mean, deviation):
    """Return mean and mean square of gelu of a normal variable, by nine-point Gauss-Hermite quadrature."""
    points, weights = (
        torch.tensor(part, dtype=mean.dtype, device=mean.device)
        for part in np.polynomial.hermite_e.hermegauss(9)
    )
    values = F.gelu(mean[:, None] + deviation[:, None] * points, approximate="tanh")
    weights = weights / weights.sum()
    return values @ weights, values.square() @ weights


def top(score, count):
    """Return the indices of the `count` largest scores, in rising order; ties go to the lower index."""
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values
