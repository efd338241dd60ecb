"""Teacher tensors -> student tensors, from weights alone and one teacher tensor in memory at a time, with a report of it.

The student keeps a set of the teacher's residual channels, whole heads, whole rotary pairs and the neurons that matter;
a student block stands for a contiguous span of teacher blocks. What the cut would change is put back where it is known from the
weights: the LayerNorm statistic, the RMSNorm statistic of queries and keys, the modulation of a span, the values of dropped heads,
the text path and the time path. A student of the teacher's own shape is therefore the teacher.

Legend: D d teacher and student width, h e heads and head size, F f feed-forward neurons, T text width; capital = teacher.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers.models.embeddings import Timesteps
from torch.nn import functional as F
from tqdm import tqdm

SHIFT, SCALE, GATE = (0, 3), (1, 4), (2, 5)  # rows of the modulation: of self-attention, of the feed-forward
ATTENTIONS = ("attn1", "attn2")
EXPERTS = ("low", "high", "span")            # span: for each student block the expert that keeps more energy
TEXT_SAMPLES = 4096                          # words that the text path is refitted on
READERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ffn.net.0.proj")     # of the residual
WRITERS = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")


@dataclass
class Report:
    """What a projection did. `kept` is the share of energy (squared norm) that the kept rows and columns hold, per group and
    student block; for the text path, of the states of the sampled words."""

    spans: list                                     # of each student block: the teacher blocks that it stands for
    kept: dict = field(default_factory=dict)        # {group: [share of each student block]}
    experts: list = field(default_factory=list)     # of each student block: the expert that it came from
    cosines: dict = field(default_factory=dict)     # between the weights of two experts, per group; empty for one
    channels: torch.Tensor | None = None            # residual channels that were kept
    cuts: list = field(default_factory=list)        # of each student block: {"attn1.q": [(block in the span, rows), ...], ...}
    num_read: int = 0                               # teacher tensors that were used
    dropped: list = field(default_factory=list)     # teacher tensors that were left out on purpose
    num_written: int = 0                            # student tensors; none is left as it was
    seconds: float = 0.0

    def __str__(self):
        shares = ", ".join(f"{name} {np.mean(share):.0%}" for name, share in self.kept.items())
        alike = ", ".join(f"{name} {cosine:.2f}" for name, cosine in self.cosines.items())
        return (f"projected {' and '.join(sorted(set(self.experts)))} expert into {len(self.channels)} x {len(self.spans)} in "
                f"{self.seconds:.0f} s: {self.num_read} tensors -> {self.num_written}; energy kept: {shares}"
                + (f"; cosine of the experts: {alike}" if alike else ""))

    def as_dict(self):
        """Return what run.json keeps."""
        return {"experts": self.experts, "spans": self.spans, "energy_kept": self.kept, "expert_cosines": self.cosines,
                "channels": self.channels.tolist(), "teacher_tensors_used": self.num_read,
                "teacher_tensors_dropped": self.dropped, "student_tensors_written": self.num_written, "student_tensors_new": [],
                "seconds": round(self.seconds, 1)}


def choose_experts(files, expert):
    """Return the expert files to project from: one, or for "span" both, the low one first."""
    if expert not in EXPERTS:
        raise ValueError(f"--expert {expert!r} is unknown, expected {', '.join(EXPERTS)}; a teacher with one expert has only that.")
    if "only" in files.experts:
        return [files.experts["only"]]
    return [files.experts[name] for name in (("low", "high") if expert == "span" else (expert,))]


@torch.no_grad()
def project(student, experts, text_samples=None, channels=None, device="cpu"):
    """Fill a student with the tensors of an expert, in place, or span by span with those of the better of two; returns the Report.

    `text_samples` (n, T) are embeddings of real prompts' words; without them, normal ones stand in. `channels` are the residual
    channels to keep, in rising order; None = those that vary most where they are read, as far as weights tell. What a span's
    experts share, the text, time and output paths, is the first one's. The arithmetic runs on `device`, in float32.
    Raises ValueError for a tensor that is not finite or finds no place.
    """
    began, config, teacher = time.perf_counter(), dict(student.config), experts[0].config
    spans = [part.tolist() for part in np.array_split(np.arange(teacher["num_layers"]), config["depth"])]
    report, target = Report(spans), _Target(student)
    total = 2 * sum(files.num_bytes for files in experts)                     # once for the channels, once for the rest
    with tqdm(total=total, desc="projecting", unit="B", unit_scale=True, disable=None) as bar:
        readers = [_Reader(files, device, bar) for files in experts]
        first = readers[0]
        times = _watch_time(first, config["freq_dim"])
        channels, norm_scale = _choose_channels(readers, times, config["hidden_size"], channels, report)
        _project_time(first, times, channels, norm_scale, target)
        words = _project_text(first, config, text_samples, target, report)
        target["patch_embedding.weight"] = first("patch_embedding.weight")[channels]
        target["patch_embedding.bias"] = first("patch_embedding.bias")[channels]
        cutter = _Cutter(config, teacher, channels, norm_scale, times, words)
        for index, span in enumerate(spans):
            bar.set_postfix_str(f"block {index + 1} of {len(spans)}")
            _project_span(cutter, readers, span, index, target, report)
        _project_head(first, channels, norm_scale, times, target)
        bar.update(bar.total - bar.n)
    report.channels = channels.cpu()
    _check_coverage(readers, target, report)
    report.seconds = time.perf_counter() - began
    return report


def check_shape(teacher, student):
    """Refuse a student that cannot be cut from a teacher, naming the nearest that can."""
    for ours, theirs in (("num_channels", "in_channels"), ("text_dim", "text_dim"), ("freq_dim", "freq_dim")):
        if student[ours] != teacher[theirs]:
            raise ValueError(f"the student's {ours} is {student[ours]}, the teacher's {teacher[theirs]}; they must agree.")
    if tuple(student["patch_size"]) != tuple(teacher["patch_size"]):
        raise ValueError(f"patch_size is {student['patch_size']}, the teacher's {teacher['patch_size']}; they must agree.")
    limits = _limits(teacher, student["depth"])
    reasons = [f"--{name} {student[name]} is more than the teacher's {most}"
               for name, most in limits.items() if student[name] > most]
    if not reasons and not _can_be_cut(teacher, student["hidden_size"], student["num_heads"]):
        head_dim = student["hidden_size"] / student["num_heads"]
        reasons.append(f"{student['num_heads']} heads of {head_dim:g} channels cannot be cut from heads of "
                       f"{teacher['attention_head_dim']}: a head keeps whole rotary pairs of every axis, an even number from 6 to "
                       f"{teacher['attention_head_dim']}")
    if reasons:
        raise ValueError(f"{'; '.join(reasons)}. The nearest shapes that can be cut: {_nearest(teacher, student)}; or take "
                         "--projection none for a random start.")


def student_shape(teacher, hidden_size=None, depth=None, num_heads=None, ffn_dim=None):
    """Return the arguments of a student for a teacher of this config; where a size is None, the teacher's decides."""
    width = _width(teacher)
    hidden_size = hidden_size or (1024 if width >= 1024 else width // 2)
    depth = depth or min(16, teacher["num_layers"])
    return {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads or default_heads(teacher, hidden_size, depth),
            "ffn_dim": ffn_dim or 4 * hidden_size, "num_channels": teacher["in_channels"], "text_dim": teacher["text_dim"],
            "freq_dim": teacher["freq_dim"], "patch_size": teacher["patch_size"],
            "rope_max_seq_len": teacher.get("rope_max_seq_len", 1024)}


def default_heads(teacher, hidden_size, depth):
    """Return the most heads that can be cut, of half the teacher's head size or more: measured better than fewer whole heads."""
    counts = [heads for heads in range(1, _limits(teacher, depth)["num_heads"] + 1)
              if _can_be_cut(teacher, hidden_size, heads) and 2 * hidden_size // heads >= teacher["attention_head_dim"]]
    return max(counts, default=1)


def _width(teacher):
    return teacher["num_attention_heads"] * teacher["attention_head_dim"]


def _limits(teacher, depth):
    """Return the largest shape that can be cut; a student block pools the heads and neurons of all blocks in its span."""
    pooled = max(1, teacher["num_layers"] // depth)
    return {"hidden_size": _width(teacher), "depth": teacher["num_layers"], "ffn_dim": pooled * teacher["ffn_dim"],
            "num_heads": pooled * teacher["num_attention_heads"]}


def _can_be_cut(teacher, hidden_size, num_heads):
    head_dim, rest = divmod(hidden_size, num_heads)
    return rest == 0 and head_dim % 2 == 0 and 6 <= head_dim <= teacher["attention_head_dim"]


def _nearest(teacher, student, count=3):
    """Return the flags of the shapes nearest in width, then in heads."""
    depth = min(student["depth"], teacher["num_layers"])
    most = _limits(teacher, depth)
    sizes = [(heads * size, heads) for heads in range(1, most["num_heads"] + 1)
             for size in range(6, teacher["attention_head_dim"] + 1, 2) if heads * size <= most["hidden_size"]]
    sizes.sort(key=lambda shape: (abs(shape[0] - student["hidden_size"]), abs(shape[1] - student["num_heads"])))
    return " or ".join(f"--hidden_size {width} --num_heads {heads} --depth {depth} "
                       f"--ffn_dim {min(student['ffn_dim'], most['ffn_dim'])}" for width, heads in sizes[:count])


class _Reader:
    """Reads teacher tensors in float32 onto a device and remembers what was read."""

    def __init__(self, files, device, bar):
        self.files, self.device, self.bar, self.read = files, device, bar, set()
        self.bytes_each = files.num_bytes / files.num_parameters

    def __call__(self, name, rows=None):
        tensor = self.files.read(name, rows=rows).to(self.device)
        if tensor.data_ptr() % 64:                            # float32 as the file has it: sums would depend on where it lies
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
            raise AssertionError(f"projection made {name} {tuple(tensor.shape)} of {tuple(self.tensors[name].shape)}, or values in "
                                 "it that are not finite")
        self.unwritten.remove(name)
        self.tensors[name].copy_(tensor)


def _check_coverage(readers, target, report):
    """Stop where a teacher tensor found no place or a student tensor got no value; of a second expert only blocks are used."""
    for position, reader in enumerate(readers):
        unread = sorted(reader.files.places.keys() - reader.read)
        lost = [name for name in unread if position == 0 or name.startswith("blocks.")]
        if lost:
            raise ValueError(f"{reader.files.folder}: {len(lost)} tensors found no place in the student: {lost[:5]}.")
        report.dropped += [f"{reader.files.name}: {name}" for name in unread]
    if target.unwritten:
        raise ValueError(f"{len(target.unwritten)} tensors of the student got no value: {sorted(target.unwritten)[:5]}.")
    report.num_read, report.num_written = sum(len(reader.read) for reader in readers), len(target.tensors)


# ---- which channels ------------------------------------------------------------------------------------------------------

def _choose_channels(readers, times, width, channels, report):
    """Return the residual channels to keep, and how much larger their deviation is than that of all channels.

    A channel counts by the variance that is read of it: what was written to it up to there, every writer in equal shares, divided
    by the LayerNorm and multiplied by the modulation. The head counts as much as all blocks, it alone says the velocity.
    """
    mean, power = times["modulation"].mean(0), times["modulation"].square().mean(0)                         # (6, D)
    read = present = 0.0
    for reader in readers:
        written = _share(reader("patch_embedding.weight").flatten(1).square().sum(1))                       # (D,)
        for block in range(reader.files.config["num_layers"]):
            prefix = f"blocks.{block}."
            table = reader(f"{prefix}scale_shift_table")[0]
            offset = table + torch.tensor([0.0, 1, 0, 0, 1, 0], device=table.device)[:, None]               # of a scale: 1
            square = offset.square() + 2 * offset * mean + power                                            # over time
            scales, gates = (square[SCALE[0]], reader(f"{prefix}norm2.weight").square(), square[SCALE[1]]), (
                square[GATE[0]], 1.0, square[GATE[1]])
            for scale, writer, gate in zip(scales, WRITERS, gates):
                present = present + _share(written)
                read = read + _share(written) * scale
                written = written + _share(reader(f"{prefix}{writer}.weight").square().sum(1) * gate)
        scale = (1 + reader("scale_shift_table")[0, 1] + times["embedding"]).square().mean(0)
        read = read + 3 * (block + 1) * _share(written) * scale
    channels = (_top(read, width) if channels is None else torch.as_tensor(channels)).to(read.device)
    report.kept["residual"] = [float(read[channels].sum() / read.sum())]
    return channels, float((present[channels].mean() / present.mean()).sqrt())


def _share(energy):
    return energy / energy.sum()


def _top(score, count):
    """Return the indices of the `count` largest scores, in rising order; ties go to the lower index."""
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values


# ---- time and text -------------------------------------------------------------------------------------------------------

TIME_LAYERS = [f"condition_embedder.{layer}" for layer in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")]


def _watch_time(reader, freq_dim):
    """Return what the time path computes on a grid of timesteps: neurons and embedding (grid, D), modulation (grid, 6, D)."""
    first, second = ((reader(f"{layer}.weight"), reader(f"{layer}.bias")) for layer in TIME_LAYERS[:2])
    grid = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.linspace(0, 1000, 1001, device=first[0].device))
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
    (first, first_bias), (second, second_bias) = ((reader(f"{layer}.weight"), reader(f"{layer}.bias"))
                                                  for layer in TIME_LAYERS[:2])
    third = torch.cat([weight[channels] for weight in _six_rows(reader)])[:, channels]                      # (6d, d)
    third_bias = reader(f"{TIME_LAYERS[2]}.bias").unflatten(0, (6, -1))[:, channels].flatten()
    neurons = _top(second[channels].square().sum(0) * first.square().sum(1), len(channels))
    inputs = times["neurons"][:, neurons]
    second = _refit(second[channels][:, neurons], second_bias[channels], inputs, times["embedding"][:, channels])
    third, third_bias = _refit(third, third_bias, F.silu(F.linear(inputs, *second)), times["modulation"][:, :, channels].flatten(1))
    stretch = torch.ones(6, len(channels), device=channels.device)            # the kept channels' LayerNorm statistic
    stretch[list(SCALE)] = norm_scale
    stretch = stretch.flatten()
    for layer, (weight, bias) in zip(TIME_LAYERS, ((first[neurons], first_bias[neurons]), second,
                                                   (third * stretch[:, None], third_bias * stretch))):
        target[f"{layer}.weight"], target[f"{layer}.bias"] = weight, bias


def _project_text(reader, config, samples, target, report):
    """Keep the text embedder's neurons that matter and the basis that its words span; returns that basis (D, d)."""
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
        basis = basis[:, -width:] * torch.where(basis[:, -width:].sum(0) < 0, -1.0, 1.0)     # one sign, whatever the LAPACK
        report.kept["text"] = [float(energy[-width:].sum() / energy.sum())]
        neurons = _top(second.square().sum(0) * hidden.square().mean(0), width)
        weight, bias = _refit(basis.T @ second[:, neurons], basis.T @ second_bias, hidden[:, neurons], states @ basis)
        kept = (first[neurons], first_bias[neurons], weight, bias)
    for name, tensor in zip(("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"), kept):
        target[prefix + name] = tensor
    return basis


def _text_samples(samples, width):
    """Return at most TEXT_SAMPLES words, evenly picked, and as many zeros as padding deserves; normal ones where none are given."""
    if samples is None:
        samples = torch.randn(TEXT_SAMPLES, width, generator=torch.Generator().manual_seed(0))
    samples = samples[:: max(1, len(samples) // TEXT_SAMPLES)].float()
    return torch.cat([samples, torch.zeros(max(1, len(samples) // 16), width)])


def _refit(weight, bias, inputs, wanted, ridge=1e-6):
    """Return weight and bias whose outputs are nearest to `wanted`, near the given ones where the inputs say nothing."""
    residual = wanted - (inputs @ weight.T + bias)
    if residual.abs().max() <= 1e-5 * wanted.abs().max():
        return weight, bias
    rows = F.pad(inputs, (0, 1), value=1.0).double()
    gram = rows.T @ rows
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(gram, rows.T @ residual.double()).T.float()
    return weight + change[:, :-1], bias + change[:, -1]


# ---- blocks ---------------------------------------------------------------------------------------------------------------

@dataclass
class _Cutter:
    """What every block is cut with."""

    config: dict                      # the student's
    teacher: dict                     # the teacher's
    channels: torch.Tensor
    norm_scale: float
    times: dict
    words: torch.Tensor


def _project_span(cutter, readers, span, index, target, report):
    """Project the teacher blocks of a span into one student block, from the expert whose cut keeps more energy."""
    found = [_cut_span(cutter, reader, span) for reader in readers]
    tensors, cut, kept, name = max(found, key=lambda each: sum(each[2].values()))        # ties go to the first
    for short, tensor in tensors.items():
        target[f"blocks.{index}.{short}"] = tensor
    report.cuts.append(cut)
    report.experts.append(name)
    for group, share in kept.items():
        report.kept.setdefault(group, []).append(round(share, 4))


def _cut_span(cutter, reader, span):
    """Return one student block's tensors, what rows of which block they are, the energy kept per group, and the expert's name."""
    channels, norm_scale, rows = cutter.channels, cutter.norm_scale, list(SCALE)
    prefixes = [f"blocks.{number}." for number in span]
    full_tables = torch.stack([reader(f"{prefix}scale_shift_table")[0] for prefix in prefixes])              # (span, 6, D)
    tables = full_tables[:, :, channels]
    table = tables.mean(0)
    stretched = table.clone()
    stretched[rows] = norm_scale * (1 + table[rows]) - 1
    full_norms = [torch.stack([reader(f"{prefix}norm2.{kind}") for prefix in prefixes]) for kind in ("weight", "bias")]
    norms = [each[:, channels] for each in full_norms]
    weight, bias = norms[0].mean(0), norms[1].mean(0)
    tensors = {"scale_shift_table": stretched[None], "norm2.weight": weight * norm_scale, "norm2.bias": bias}
    parts, cut, kept = {name: [] for name in (*ATTENTIONS, "ffn")}, {}, {}
    over_time = cutter.times["modulation"]
    dropped = torch.ones(over_time.shape[-1], device=channels.device)
    dropped[channels] = 0
    for number, prefix in enumerate(prefixes):
        folds = _fold_modulation(tables[number], table, over_time[:, :, channels])
        folds["attn2"] = _fold_affine(norms[0][number], norms[1][number], weight, bias)
        silent = full_tables[number] + over_time.mean(0)                      # what dropped channels say whatever the input
        for name, constant in (("attn1", silent[SHIFT[0]]), ("attn2", full_norms[1][number]), ("ffn", silent[SHIFT[1]])):
            folds[name].silent = dropped * constant
        for name, text_basis in zip(ATTENTIONS, (None, cutter.words)):
            parts[name].append(_cut_attention(reader, f"{prefix}{name}.", channels, text_basis, folds[name],
                                              cutter.config["num_heads"]))
        parts["ffn"].append(_cut_feed_forward(reader, f"{prefix}ffn.net.", channels, folds["ffn"], cutter.config["ffn_dim"]))
    for name in ATTENTIONS:
        tensors |= _join_heads(parts.pop(name), cutter.config, cutter.teacher["attention_head_dim"], name, cut, kept)
    tensors |= _join_neurons(parts.pop("ffn"), cutter.config["ffn_dim"], cut, kept)
    return tensors, cut, kept, reader.files.name


@dataclass
class _Fold:
    """What a block's matrices take up so that the modulation of its span serves it: exactly 1, 0, 1 for a span of one block."""

    scale: torch.Tensor                       # (d,) for the columns of its readers
    shift: torch.Tensor                       # (d,)
    gate: torch.Tensor                        # (d,) for the rows of its writer
    silent: torch.Tensor | None = None        # (D,) the constant that its readers miss of dropped channels


def _fold_modulation(own, shared, over_time):
    """Return the folds of self-attention and feed-forward, by least squares over timesteps, per channel."""
    folds = {}
    for part, name in enumerate(("attn1", "ffn")):
        shift, scale, gate = SHIFT[part], SCALE[part], GATE[part]
        ratio = _ratio(1 + own[scale] + over_time[:, scale], 1 + shared[scale] + over_time[:, scale])
        offset = (own[shift] + over_time[:, shift]).mean(0) - ratio * (shared[shift] + over_time[:, shift]).mean(0)
        folds[name] = _Fold(ratio, offset, _ratio(own[gate] + over_time[:, gate], shared[gate] + over_time[:, gate]))
    return folds


def _ratio(own, shared):
    """Least squares of own = ratio * shared over the first dimension; 1 where they are equal or the shared one vanishes."""
    power = shared.square().sum(0)
    return torch.where((own == shared).all(0) | (power <= 1e-8 * power.mean()), torch.ones_like(power),
                       (own * shared).sum(0) / power.clamp(min=1e-12)).clamp(-4, 4)


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
    """Return one block's attention, of the heads that write most, between the student's residual channels (or text basis) and
    the teacher's own rows."""
    cut = {"q": _cut_reader(reader, f"{prefix}to_q", channels, fold)}
    for kind in "kv":
        cut[kind] = (_cut_reader(reader, f"{prefix}to_{kind}", channels, fold) if text_basis is None else
                     (reader(f"{prefix}to_{kind}.weight") @ text_basis, reader(f"{prefix}to_{kind}.bias")))
    cut["o"], cut["o_bias"] = _cut_writer(reader, f"{prefix}to_out.0", channels, fold.gate)                  # (d, D), (d,)
    cut["gain"] = {kind: reader(f"{prefix}norm_{kind}.weight") for kind in "qk"}
    cut["power"] = {kind: _row_power(*cut[kind]).mean() for kind in "qk"}    # what the teacher's RMSNorm divides by
    return _weigh_heads(cut, reader.files.config["attention_head_dim"], num_heads)


def _weigh_heads(cut, full, num_heads):
    """Note what each head writes, the squared norm of its output times its value matrix, and keep the heads that write most."""
    outputs, values = cut["o"].unflatten(1, (-1, full)), cut["v"][0].unflatten(0, (-1, full))
    writes = torch.stack([(outputs[:, head] @ values[head]).square().sum() for head in range(len(values))])
    cut |= {"writes": writes, "energy": writes.sum(), "rows": torch.arange(cut["o"].shape[1], device=writes.device)}
    return _take_heads(cut, _top(writes, min(num_heads, len(writes))))


def _take_heads(cut, heads):
    """Drop all other heads; what they write whatever they look at goes to the bias."""
    rows = torch.arange(len(cut["rows"]), device=heads.device).unflatten(0, (len(cut["writes"]), -1))[heads].flatten()
    silent = cut["v"][1].clone()
    silent[rows] = 0
    return cut | {kind: (cut[kind][0][rows], cut[kind][1][rows]) for kind in "qkv"} | {
        "o": cut["o"][:, rows], "o_bias": cut["o_bias"] + cut["o"] @ silent, "rows": cut["rows"][rows],
        "gain": {kind: gain[rows] for kind, gain in cut["gain"].items()}, "writes": cut["writes"][heads]}


def _share_out(scores, count):
    """Return, of the `count` largest scores in several lists together, the places in each list."""
    chosen, found = _top(torch.cat(scores), count), []
    for score in scores:
        found.append(chosen[(chosen >= 0) & (chosen < len(score))])
        chosen = chosen - len(score)
    return found


def _row_power(weight, bias):
    """Return the expected square of each output for inputs of unit variance."""
    return weight.square().sum(1) + bias.square()


def _join_heads(cuts, config, full, name, picked, kept):
    """Keep the heads that write most, of all blocks in a span, and their rotary pairs; returns a student attention's tensors."""
    num_heads, size = config["num_heads"], config["hidden_size"] // config["num_heads"]
    joined = {key: [] for key in ("q", "k", "v", "o", "q_gain", "k_gain", "q_power", "k_power")}
    picks, energy, total = {kind: [] for kind in "qkv"}, 0.0, float(sum(cut["energy"] for cut in cuts))
    cuts = [_take_heads(cut, heads) for cut, heads in zip(cuts, _share_out([cut["writes"] for cut in cuts], num_heads))]
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
            value, value_bias, output, lost = _cut_value(cut["v"][0][rows], cut["v"][1][rows], cut["o"][:, rows], size)
            energy += float((output @ value).square().sum())
            joined["v"].append((value, value_bias))
            joined["o"].append(output)
            output_bias = output_bias + lost
    kept[name] = energy / total
    tensors = {f"{name}.to_out.0.weight": torch.cat(joined["o"], 1), f"{name}.to_out.0.bias": output_bias}
    for kind in "qkv":
        weights, biases = zip(*joined[kind])
        tensors[f"{name}.to_{kind}.weight"], tensors[f"{name}.to_{kind}.bias"] = torch.cat(weights), torch.cat(biases)
    if size == full:                                             # values of a smaller head are no rows of the teacher's
        picked[f"{name}.v"] = picks["v"]
    for kind in "qk":
        power = _row_power(tensors[f"{name}.to_{kind}.weight"], tensors[f"{name}.to_{kind}.bias"]).mean()   # the student's
        gain = torch.cat(joined[f"{kind}_gain"])
        picked |= {f"{name}.{kind}": picks[kind], f"{name}.{kind}.gain": gain}
        tensors[f"{name}.norm_{kind}.weight"] = gain * (power / torch.cat(joined[f"{kind}_power"])).sqrt()
    return tensors


def _rotary_rows(cut, rows, full, size, has_rotary):
    """Choose `size` of a head's `full` query and key channels as whole rotary pairs, each axis with the share that Wan gives it.

    Per head Wan lays out [time | height | width]; a smaller head has fewer and coarser-spaced frequencies, so each of its spatial
    pairs takes the teacher's pair of nearest log-frequency. Time pairs stand still at one frame: the strongest are kept.
    """
    if size == full:
        return torch.arange(full)
    strength = sum(_row_power(cut[kind][0][rows], cut[kind][1][rows]) for kind in "qk").unflatten(0, (-1, 2)).sum(1)
    if not has_rotary:
        pairs = _top(strength, size // 2).cpu()
    else:
        axes, axes_full = _axis_pairs(size), _axis_pairs(full)
        pairs, start = [_top(strength[:axes_full[0]], axes[0]).cpu()], axes_full[0]
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
    """Shrink a head's values to `size` channels by the best low-rank form of output @ value; returns also the bias it loses."""
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
    cut = {"first": first, "first_bias": first_bias, "second": second, "second_bias": second_bias, "mean": mean, "writes": writes,
           "energy": writes.sum(), "rows": torch.arange(len(writes), device=writes.device)}
    return _take_neurons(cut, _top(writes, min(count, len(writes))))


def _take_neurons(cut, neurons):
    """Drop all other neurons; what they write on average goes to the bias."""
    silent = cut["mean"].clone()
    silent[neurons] = 0
    return cut | {name: cut[name][neurons] for name in ("first", "first_bias", "mean", "writes", "rows")} | {
        "second": cut["second"][:, neurons], "second_bias": cut["second_bias"] + cut["second"] @ silent}


def _join_neurons(cuts, count, picked, kept):
    """Keep the neurons that write most, of all blocks in a span."""
    total = float(sum(cut["energy"] for cut in cuts))
    cuts = [_take_neurons(cut, neurons) for cut, neurons in zip(cuts, _share_out([cut["writes"] for cut in cuts], count))]
    kept["ffn"] = float(sum(cut["writes"].sum() for cut in cuts)) / total
    picked["ffn"] = [(number, cut["rows"]) for number, cut in enumerate(cuts)]
    return {"ffn.net.0.proj.weight": torch.cat([cut["first"] for cut in cuts]),
            "ffn.net.0.proj.bias": torch.cat([cut["first_bias"] for cut in cuts]),
            "ffn.net.2.weight": torch.cat([cut["second"] for cut in cuts], 1),
            "ffn.net.2.bias": sum(cut["second_bias"] for cut in cuts)}


def _gelu_moments(mean, deviation):
    """Return mean and mean square of gelu of a normal variable, by nine-point Gauss-Hermite quadrature."""
    points, weights = (torch.tensor(part, dtype=mean.dtype, device=mean.device) for part in np.polynomial.hermite_e.hermegauss(9))
    values = F.gelu(mean[:, None] + deviation[:, None] * points, approximate="tanh")
    weights = weights / weights.sum()
    return values @ weights, values.square() @ weights


# ---- head -----------------------------------------------------------------------------------------------------------------

def _project_head(reader, channels, norm_scale, times, target):
    """Cut the output layer; its scale is table + time embedding, so norm_scale goes to the table, for the mean embedding."""
    full, embedding = reader("scale_shift_table"), times["embedding"].mean(0)
    table = full[:, :, channels]
    table[:, 1] += (norm_scale - 1) * (1 + table[:, 1] + embedding[channels])
    target["scale_shift_table"] = table
    weight, silent = reader("proj_out.weight"), full[0, 0] + embedding
    silent[channels] = 0
    target["proj_out.weight"] = weight[:, channels]
    target["proj_out.bias"] = reader("proj_out.bias") + weight @ silent
