"""Teacher tensors -> student tensors, from weights alone and one teacher tensor in memory at a time, with a
report of it.

The student keeps a set of the teacher's residual channels, whole heads, whole rotary pairs and the neurons
that matter; a student block stands for a contiguous span of teacher blocks. What the cut would change is put
back where it is known from the weights: the LayerNorm statistic, the RMSNorm statistic of queries and keys,
the modulation of a span, the values of dropped heads, the text path and the time path. A student of the
teacher's own shape is therefore the teacher.

Legend: D d teacher and student width, h e heads and head size, F f feed-forward neurons, T text width;
capital = teacher.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers.models.embeddings import Timesteps
from torch.nn import functional as F
from tqdm import tqdm

from .pruning import GATE, SCALE, BlockProjector, cut_span, top
from .regression import solve_ridge

EXPERTS = ("low", "high", "best_per_block")  # span: for each student block the expert that keeps more energy
TEXT_SAMPLES = 4096  # words that the text path is refitted on
WRITERS = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")  # to the residual


@dataclass
class Report:
    """What a projection did. `kept` is the share of energy (squared norm) that the kept rows and columns
    hold, per group and student block; for the text path, of the states of the sampled words."""

    spans: list  # of each student block: the teacher blocks that it stands for
    kept: dict = field(default_factory=dict)  # {group: [share of each student block]}
    experts: list = field(default_factory=list)  # of each student block: the expert that it came from
    cosines: dict = field(
        default_factory=dict
    )  # between the weights of two experts, per group; empty for one
    channels: torch.Tensor | None = None  # residual channels that were kept
    cuts: list = field(
        default_factory=list
    )  # of each student block: {"attn1.q": [(block in the span, rows), ...], ...}
    num_read: int = 0  # teacher tensors that were used
    dropped: list = field(default_factory=list)  # teacher tensors that were left out on purpose
    num_written: int = 0  # student tensors; none is left as it was
    seconds: float = 0.0

    def __str__(self):
        shares = ", ".join(f"{name} {np.mean(share):.0%}" for name, share in self.kept.items())
        alike = ", ".join(f"{name} {cosine:.2f}" for name, cosine in self.cosines.items())
        return (
            f"projected {' and '.join(sorted(set(self.experts)))} expert into {len(self.channels)} x "
            f"{len(self.spans)} in "
            f"{self.seconds:.0f} s: {self.num_read} tensors -> {self.num_written}; energy kept: {shares}"
            + (f"; cosine of the experts: {alike}" if alike else "")
        )

    def as_dict(self):
        """Return what run.json keeps."""
        return {
            "experts": self.experts,
            "spans": self.spans,
            "energy_kept": self.kept,
            "expert_cosines": self.cosines,
            "channels": self.channels.tolist(),
            "teacher_tensors_used": self.num_read,
            "teacher_tensors_dropped": self.dropped,
            "student_tensors_written": self.num_written,
            "student_tensors_new": [],
            "seconds": round(self.seconds, 1),
        }


def choose_experts(files, expert):
    """Return the expert files to project from: one, or for "best_per_block" both, the low one first."""
    if expert not in EXPERTS:
        raise ValueError(
            f"--expert {expert!r} is unknown, expected {', '.join(EXPERTS)}; a teacher with one expert has "
            f"only that."
        )
    if "only" in files.experts:
        return [files.experts["only"]]
    return [files.experts[name] for name in (("low", "high") if expert == "best_per_block" else (expert,))]


@torch.no_grad()
def project(student, experts, text_samples=None, channels=None, device="cpu"):
    """Fill a student with the tensors of an expert, in place, or span by span with those of the better of
    two; returns the Report.

    `text_samples` (n, T) are embeddings of real prompts' words; without them, normal ones stand in.
    `channels` are the residual channels to keep, in rising order; None = those that vary most where they are
    read, as far as weights tell. What a span's experts share, the text, time and output paths, is the first
    one's. The arithmetic runs on `device`, in float32. Raises ValueError for a tensor that is not finite or
    finds no place.
    """
    began, config, teacher = time.perf_counter(), dict(student.config), experts[0].config
    spans = [part.tolist() for part in np.array_split(np.arange(teacher["num_layers"]), config["depth"])]
    report, target = Report(spans), _Target(student)
    total = 2 * sum(files.num_bytes for files in experts)  # once for the channels, once for the rest
    with tqdm(total=total, desc="projecting", unit="B", unit_scale=True, disable=None) as bar:
        readers = [_Reader(files, device, bar) for files in experts]
        first = readers[0]
        times = _watch_time(first, config["freq_dim"])
        channels, norm_scale = _choose_channels(readers, times, config["hidden_size"], channels, report)
        _project_time(first, times, channels, norm_scale, target)
        words = _project_text(first, config, text_samples, target, report)
        target["patch_embedding.weight"] = first("patch_embedding.weight")[channels]
        target["patch_embedding.bias"] = first("patch_embedding.bias")[channels]
        projector = BlockProjector(config, teacher, channels, norm_scale, times, words)
        for index, span in enumerate(spans):
            bar.set_postfix_str(f"block {index + 1} of {len(spans)}")
            _project_span(projector, readers, span, index, target, report)
        _project_head(first, channels, norm_scale, times, target)
        bar.update(bar.total - bar.n)
    report.channels = channels.cpu()
    _check_coverage(readers, target, report)
    report.seconds = time.perf_counter() - began
    return report


class _Reader:
    """Reads teacher tensors in float32 onto a device and remembers what was read."""

    def __init__(self, files, device, bar):
        self.files, self.device, self.bar, self.read = files, device, bar, set()
        self.bytes_each = files.num_bytes / files.num_parameters

    def __call__(self, name, rows=None):
        tensor = self.files.read(name, rows=rows).to(self.device)
        if tensor.data_ptr() % 64:  # float32 as the file has it: sums would depend on where it lies
            tensor = tensor.clone()
        self.read.add(name)
        self.bar.update(round(tensor.numel() * self.bytes_each))
        return tensor


class _Target:
    """The student's tensors: each is written once, in its shape and with finite values."""

    def __init__(self, student):
        self.tensors = student.state_dict()
        self.unwritten = set(self.tensors)

    def __setitem__(self, name, tensor):
        if tensor.shape != self.tensors[name].shape or not torch.isfinite(tensor).all():
            raise AssertionError(
                f"projection made {name} {tuple(tensor.shape)} of {tuple(self.tensors[name].shape)}, or "
                f"values in "
                "it that are not finite"
            )
        self.unwritten.remove(name)
        self.tensors[name].copy_(tensor)


def _check_coverage(readers, target, report):
    """Stop where a teacher tensor found no place or a student tensor got no value; of a second expert only
    blocks are used.
    """
    for position, reader in enumerate(readers):
        unread = sorted(reader.files.places.keys() - reader.read)
        lost = [name for name in unread if position == 0 or name.startswith("blocks.")]
        if lost:
            raise ValueError(
                f"{reader.files.folder}: {len(lost)} tensors found no place in the student: {lost[:5]}."
            )
        report.dropped += [f"{reader.files.name}: {name}" for name in unread]
    if target.unwritten:
        raise ValueError(
            f"{len(target.unwritten)} tensors of the student got no value: {sorted(target.unwritten)[:5]}."
        )
    report.num_read, report.num_written = sum(len(reader.read) for reader in readers), len(target.tensors)


# ---- which channels ----------------------------------------------------------------------------------------


def _choose_channels(readers, times, width, channels, report):
    """Return the residual channels to keep, and how much larger their deviation is than that of all channels.

    A channel counts by the variance that is read of it: what was written to it up to there, every writer in
    equal shares, divided by the LayerNorm and multiplied by the modulation. The head counts as much as all
    blocks, it alone says the velocity.
    """
    mean, power = times["modulation"].mean(0), times["modulation"].square().mean(0)  # (6, D)
    read = present = 0.0
    for reader in readers:
        written = _share(reader("patch_embedding.weight").flatten(1).square().sum(1))  # (D,)
        for block in range(reader.files.config["num_layers"]):
            prefix = f"blocks.{block}."
            table = reader(f"{prefix}scale_shift_table")[0]
            offset = table + torch.tensor([0.0, 1, 0, 0, 1, 0], device=table.device)[:, None]  # of a scale: 1
            square = offset.square() + 2 * offset * mean + power  # over time
            scales, gates = (
                (square[SCALE[0]], reader(f"{prefix}norm2.weight").square(), square[SCALE[1]]),
                (square[GATE[0]], 1.0, square[GATE[1]]),
            )
            for scale, writer, gate in zip(scales, WRITERS, gates):
                present = present + _share(written)
                read = read + _share(written) * scale
                written = written + _share(reader(f"{prefix}{writer}.weight").square().sum(1) * gate)
        scale = (1 + reader("scale_shift_table")[0, 1] + times["embedding"]).square().mean(0)
        read = read + 3 * (block + 1) * _share(written) * scale
    channels = (top(read, width) if channels is None else torch.as_tensor(channels)).to(read.device)
    report.kept["residual"] = [float(read[channels].sum() / read.sum())]
    return channels, float((present[channels].mean() / present.mean()).sqrt())


def _share(energy):
    return energy / energy.sum()


# ---- time and text -----------------------------------------------------------------------------------------

TIME_LAYERS = [
    f"condition_embedder.{layer}"
    for layer in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")
]


def _watch_time(reader, freq_dim):
    """Return what the time path computes on a grid of timesteps: neurons and embedding (grid, D), modulation
    (grid, 6, D).
    """
    first, second = ((reader(f"{layer}.weight"), reader(f"{layer}.bias")) for layer in TIME_LAYERS[:2])
    grid = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)(
        torch.linspace(0, 1000, 1001, device=first[0].device)
    )
    neurons = F.silu(F.linear(grid, *first))
    embedding = F.linear(neurons, *second)
    bias = reader(f"{TIME_LAYERS[2]}.bias").unflatten(0, (6, -1))
    rows = [F.linear(F.silu(embedding), weight, bias[row]) for row, weight in enumerate(_six_rows(reader))]
    return {"neurons": neurons, "embedding": embedding, "modulation": torch.stack(rows, 1)}


def _six_rows(reader):
    """Read the matrix of the modulation in six parts, each (D, D): shift, scale and gate of both."""
    width = reader.files.width
    for row in range(6):
        yield reader(f"{TIME_LAYERS[2]}.weight", slice(row * width, (row + 1) * width))


def _project_time(reader, times, channels, norm_scale, target):
    """Keep the neurons that matter and refit the layers behind them on the grid."""
    (first, first_bias), (second, second_bias) = (
        (reader(f"{layer}.weight"), reader(f"{layer}.bias")) for layer in TIME_LAYERS[:2]
    )
    third = torch.cat([weight[channels] for weight in _six_rows(reader)])[:, channels]  # (6d, d)
    third_bias = reader(f"{TIME_LAYERS[2]}.bias").unflatten(0, (6, -1))[:, channels].flatten()
    neurons = top(second[channels].square().sum(0) * first.square().sum(1), len(channels))
    inputs = times["neurons"][:, neurons]
    second = _refit(
        second[channels][:, neurons], second_bias[channels], inputs, times["embedding"][:, channels]
    )
    third, third_bias = _refit(
        third, third_bias, F.silu(F.linear(inputs, *second)), times["modulation"][:, :, channels].flatten(1)
    )
    stretch = torch.ones(6, len(channels), device=channels.device)  # the kept channels' LayerNorm statistic
    stretch[list(SCALE)] = norm_scale
    stretch = stretch.flatten()
    for layer, (weight, bias) in zip(
        TIME_LAYERS,
        ((first[neurons], first_bias[neurons]), second, (third * stretch[:, None], third_bias * stretch)),
    ):
        target[f"{layer}.weight"], target[f"{layer}.bias"] = weight, bias


def _project_text(reader, config, samples, target, report):
    """Keep the text embedder's neurons that matter and the basis that its words span; returns that basis (D,
    d).
    """
    prefix = "condition_embedder.text_embedder."
    first, first_bias = reader(f"{prefix}linear_1.weight"), reader(f"{prefix}linear_1.bias")
    second, second_bias = reader(f"{prefix}linear_2.weight"), reader(f"{prefix}linear_2.bias")
    width, device = config["hidden_size"], first.device
    if width == len(second):
        basis, kept = torch.eye(width, device=device), (first, first_bias, second, second_bias)
        report.kept["text"] = [1.0]
    else:
        samples = _text_samples(samples, first.shape[1]).to(device)
        hidden = F.gelu(samples @ first.T + first_bias, approximate="tanh")
        states = hidden @ second.T + second_bias
        energy, basis = torch.linalg.eigh(states.T @ states)
        basis = basis[:, -width:] * torch.where(
            basis[:, -width:].sum(0) < 0, -1.0, 1.0
        )  # one sign, whatever the LAPACK
        report.kept["text"] = [float(energy[-width:].sum() / energy.sum())]
        neurons = top(second.square().sum(0) * hidden.square().mean(0), width)
        weight, bias = _refit(
            basis.T @ second[:, neurons], basis.T @ second_bias, hidden[:, neurons], states @ basis
        )
        kept = (first[neurons], first_bias[neurons], weight, bias)
    for name, tensor in zip(("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"), kept):
        target[prefix + name] = tensor
    return basis


def _text_samples(samples, width):
    """Return at most TEXT_SAMPLES words, evenly picked, and as many zeros as padding deserves; normal ones
    where none are given.
    """
    if samples is None:
        samples = torch.randn(TEXT_SAMPLES, width, generator=torch.Generator().manual_seed(0))
    samples = samples[:: max(1, len(samples) // TEXT_SAMPLES)].float()
    return torch.cat([samples, torch.zeros(max(1, len(samples) // 16), width)])


def _refit(weight, bias, inputs, wanted, ridge=1e-6):
    """Return weight and bias whose outputs are nearest to `wanted`, near the given ones where the inputs say
    nothing.
    """
    residual = wanted - (inputs @ weight.T + bias)
    if residual.abs().max() <= 1e-5 * wanted.abs().max():
        return weight, bias
    weight_change, bias_change = solve_ridge(inputs, residual, ridge)
    return weight + weight_change, bias + bias_change


# ---- blocks, head ------------------------------------------------------------------------------------------


def _project_span(projector, readers, span, index, target, report):
    """Project the teacher blocks of a span into one student block, from the expert whose cut keeps more
    energy.
    """
    found = [cut_span(projector, reader, span) for reader in readers]
    tensors, cut, kept, name = max(found, key=lambda each: sum(each[2].values()))  # ties go to the first
    for short, tensor in tensors.items():
        target[f"blocks.{index}.{short}"] = tensor
    report.cuts.append(cut)
    report.experts.append(name)
    for group, share in kept.items():
        report.kept.setdefault(group, []).append(round(share, 4))


def _project_head(reader, channels, norm_scale, times, target):
    """Cut the output layer; its scale is table + time embedding, so norm_scale goes to the table, for the
    mean embedding.
    """
    full, embedding = reader("scale_shift_table"), times["embedding"].mean(0)
    table = full[:, :, channels]
    table[:, 1] += (norm_scale - 1) * (1 + table[:, 1] + embedding[channels])
    target["scale_shift_table"] = table
    weight, silent = reader("proj_out.weight"), full[0, 0] + embedding
    silent[channels] = 0
    target["proj_out.weight"] = weight[:, channels]
    target["proj_out.bias"] = reader("proj_out.bias") + weight @ silent
