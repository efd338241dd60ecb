"""Teacher tensors -> student tensors, from weights alone and one teacher block in memory at a time, with a report of it.

The student keeps a set of the teacher's residual channels, whole heads, whole rotary pairs and the neurons that matter;
a student block stands for a contiguous span of teacher blocks. What the cut would change is put back where it is known from the
weights: the LayerNorm statistic, the RMSNorm statistic of queries and keys, the modulation of a span, the values of dropped heads,
the text path and the time path. A student of the teacher's own shape is therefore the teacher.

Legend: D d teacher and student width, h e heads and head size, F f feed-forward neurons, T text width; capital = teacher.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers.models.embeddings import Timesteps
from torch.nn import functional as F
from tqdm import tqdm

from .teacher import open_teacher_files

SHIFT, SCALE, GATE = (0, 3), (1, 4), (2, 5)  # rows of the modulation: of self-attention, of the feed-forward
ATTENTIONS = ("attn1", "attn2")


@dataclass
class Report:
    """What a projection did: `kept` is the share of energy (squared norm) that the kept rows and columns hold, per group."""

    expert: str
    hidden_size: int
    spans: list
    kept: dict = field(default_factory=dict)
    cosines: dict = field(default_factory=dict)     # between the weights of two experts, per group; empty for one
    channels: torch.Tensor | None = None            # residual channels that were kept
    cuts: list = field(default_factory=list)        # of each student block: {"attn1.q": [(block in the span, rows), ...], ...}

    def __str__(self):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.kept.items())
        alike = ", ".join(f"{name} {cosine:.2f}" for name, cosine in self.cosines.items())
        return (f"projected the {self.expert} expert into {self.hidden_size} x {len(self.spans)}; energy kept: {shares}"
                + (f"; cosine of the experts: {alike}" if alike else ""))


def project_into(student, folder, expert="low", text_samples=None, channels=None):
    """Fill a student with a teacher's weights, in place; returns the Report."""
    files = open_teacher_files(folder).experts
    if expert not in ("low", "high"):
        raise ValueError(f"--expert {expert!r} is unknown, expected low or high; a teacher with one expert has only that.")
    tensors, report = project(files.get(expert) or files["only"], dict(student.config), text_samples, channels)
    student.load_state_dict(tensors, strict=True)
    report.cosines = compare_experts(*files.values()) if len(files) == 2 else {}
    return report


def compare_experts(high, low):
    """Return the cosine between two experts' weights, per group, reading one tensor of each at a time."""
    sums = {}
    for name in sorted(high.places):
        group = next((part for part in (*ATTENTIONS, "ffn") if f".{part}." in name), "rest")
        ours, theirs = high.read(name).flatten(), low.read(name).flatten()
        found = torch.stack([ours @ theirs, ours @ ours, theirs @ theirs]).double()
        sums[group] = sums.get(group, 0) + found
    return {group: float(both / (ours * theirs).sqrt()) for group, (both, ours, theirs) in sorted(sums.items())}


@torch.no_grad()
def project(files, config, text_samples=None, channels=None):
    """Return the student's tensors for a config, and a Report.

    `text_samples` (n, T) are embeddings of real prompts' words; without them, normal ones stand in. `channels` are the residual
    channels to keep, in rising order; None = those that the weights write and read most.
    Raises ValueError for a shape that cannot be cut from this teacher, and for a tensor that is not finite or finds no place.
    """
    check_shape(files.config, config)
    reader = _Reader(files)
    spans = [part.tolist() for part in np.array_split(np.arange(files.config["num_layers"]), config["depth"])]
    report = Report(files.name, config["hidden_size"], spans)
    channels, norm_scale = _choose_channels(reader, config["hidden_size"], channels, report)
    report.channels = channels
    student = {}
    times = _project_time(reader, channels, norm_scale, config, student)
    words = _project_text(reader, config, text_samples, student)
    student["patch_embedding.weight"] = reader("patch_embedding.weight")[channels]
    student["patch_embedding.bias"] = reader("patch_embedding.bias")[channels]
    for index, span in enumerate(tqdm(spans, desc="projecting", unit="block", disable=None)):
        _project_span(reader, span, index, channels, norm_scale, times, words, config, student, report)
    _project_head(reader, channels, norm_scale, times, student)
    _check_coverage(reader, student, config)
    return student, report


def check_shape(teacher, student):
    """Refuse a student that cannot be cut from a teacher, naming the nearest that can."""
    width = teacher["num_attention_heads"] * teacher["attention_head_dim"]
    head_dim = student["hidden_size"] // student["num_heads"]
    limits = {"hidden_size": width, "depth": teacher["num_layers"], "ffn_dim": teacher["ffn_dim"],
              "num_heads": teacher["num_attention_heads"]}
    for name, most in limits.items():
        if student[name] > most:
            raise ValueError(f"--{name} {student[name]} is more than the teacher's {most}. Choose at most {most}, or "
                             "--projection none for a random start.")
    if head_dim > teacher["attention_head_dim"] or head_dim % 2:
        raise ValueError(f"{student['num_heads']} heads of {head_dim} channels cannot be cut from heads of "
                         f"{teacher['attention_head_dim']}. Choose --num_heads "
                         f"{max(1, student['hidden_size'] // teacher['attention_head_dim'])} or a multiple of it.")
    for ours, theirs in (("num_channels", "in_channels"), ("text_dim", "text_dim"), ("freq_dim", "freq_dim")):
        if student[ours] != teacher[theirs]:
            raise ValueError(f"the student's {ours} is {student[ours]}, the teacher's {teacher[theirs]}; they must agree.")
    if tuple(student["patch_size"]) != tuple(teacher["patch_size"]):
        raise ValueError(f"patch_size is {student['patch_size']}, the teacher's {teacher['patch_size']}; they must agree.")


class _Reader:
    """Reads teacher tensors in float32, refuses NaN, and remembers what was read."""

    def __init__(self, files):
        self.files, self.read = files, set()

    def __call__(self, name):
        tensor = self.files.read(name)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.files.folder}: {name} holds NaN or infinity. Download the expert again.")
        self.read.add(name)
        return tensor

    def block(self, index):
        """Read one block as a dict of short names."""
        prefix = f"blocks.{index}."
        return {name.removeprefix(prefix): self(name) for name in self.files.places if name.startswith(prefix)}


def _check_coverage(reader, student, config):
    unread = reader.files.places.keys() - reader.read
    if unread:
        raise ValueError(f"{reader.files.folder}: {len(unread)} tensors found no place in the student: {sorted(unread)[:5]}.")
    broken = [name for name, tensor in student.items() if not torch.isfinite(tensor).all()]
    assert not broken, f"projection made values that are not finite: {broken[:5]}"


# ---- which channels ------------------------------------------------------------------------------------------------------

def _choose_channels(reader, width, channels, report):
    """Return the residual channels to keep, and how much larger their deviation is than that of all channels.

    A channel counts by what is written to it times what is read from it, each tensor weighted alike.
    """
    written = _share(reader("patch_embedding.weight").flatten(1).square().sum(1))
    read = _share(reader("proj_out.weight").square().sum(0))
    for index in range(reader.files.config["num_layers"]):
        block = reader.block(index)
        written += sum(_share(block[name].square().sum(1)) for name in
                       ("attn1.to_out.0.weight", "attn2.to_out.0.weight", "ffn.net.2.weight"))
        read += sum(_share(block[name].square().sum(0)) for name in
                    ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight", "attn2.to_q.weight",
                     "ffn.net.0.proj.weight"))
    channels = _top(written * read, width) if channels is None else channels
    report.kept["residual"] = float(written[channels].sum() / written.sum())
    norm_scale = float((written[channels].mean() / written.mean()).sqrt())
    return channels, norm_scale


def _share(energy):
    return energy / energy.sum()


def _top(score, count):
    """Return the indices of the `count` largest scores, in rising order; ties go to the lower index."""
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values


# ---- time and text -------------------------------------------------------------------------------------------------------

def _project_time(reader, channels, norm_scale, config, student):
    """Refit the time path on a grid of timesteps; returns the teacher's modulation there, (grid, 6, d), before norm_scale."""
    prefix = "condition_embedder."
    names = [f"{prefix}{layer}.{kind}" for layer in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")
             for kind in ("weight", "bias")]
    first, first_bias, second, second_bias, third, third_bias = (reader(name) for name in names)
    rows = (torch.arange(6)[:, None] * len(second) + channels).flatten()         # six modulation rows of each channel
    grid = Timesteps(config["freq_dim"], flip_sin_to_cos=True, downscale_freq_shift=0)(torch.linspace(0, 1000, 1001))
    hidden = F.silu(grid @ first.T + first_bias)
    embedding = hidden @ second.T + second_bias
    modulation = F.silu(embedding) @ third[rows].T + third_bias[rows]
    neurons = _top(second[channels].square().sum(0) * first.square().sum(1), len(channels))
    student[names[0]], student[names[1]] = first[neurons], first_bias[neurons]
    student[names[2]], student[names[3]] = _refit(second[channels][:, neurons], second_bias[channels], hidden[:, neurons],
                                                  embedding[:, channels])
    seen = F.silu(F.silu(grid @ student[names[0]].T + student[names[1]]) @ student[names[2]].T + student[names[3]])
    weight, bias = _refit(third[rows][:, channels], third_bias[rows], seen, modulation)
    stretch = _stretch_scales(len(channels), norm_scale)
    student[names[4]], student[names[5]] = weight * stretch[:, None], bias * stretch
    return {"embedding": embedding[:, channels].mean(0), "modulation": modulation.unflatten(1, (6, -1))}


def _stretch_scales(width, norm_scale):
    """Return a factor (6*d) for each modulation row: norm_scale for the two scales, 1 for shifts and gates."""
    stretch = torch.ones(6, width)
    stretch[list(SCALE)] = norm_scale
    return stretch.flatten()


def _project_text(reader, config, samples, student):
    """Keep the text embedder's neurons that matter and the basis that its words span; returns that basis (D, d)."""
    prefix = "condition_embedder.text_embedder."
    first, first_bias = reader(f"{prefix}linear_1.weight"), reader(f"{prefix}linear_1.bias")
    second, second_bias = reader(f"{prefix}linear_2.weight"), reader(f"{prefix}linear_2.bias")
    width = config["hidden_size"]
    if width == len(second):
        basis, kept = torch.eye(width), (first, first_bias, second, second_bias)
    else:
        if samples is None:
            samples = torch.randn(4096, first.shape[1], generator=torch.Generator().manual_seed(0))
        samples = torch.cat([samples.float(), torch.zeros(max(1, len(samples) // 16), first.shape[1])])  # padding counts
        hidden = F.gelu(samples @ first.T + first_bias, approximate="tanh")
        states = hidden @ second.T + second_bias
        basis = torch.linalg.eigh(states.T @ states).eigenvectors[:, -width:]
        basis = basis * torch.where(basis.sum(0) < 0, -1.0, 1.0)                 # one sign, whatever the LAPACK
        neurons = _top(second.square().sum(0) * hidden.square().mean(0), width)
        weight, bias = _refit(basis.T @ second[:, neurons], basis.T @ second_bias, hidden[:, neurons], states @ basis)
        kept = (first[neurons], first_bias[neurons], weight, bias)
    for name, tensor in zip(("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"), kept):
        student[prefix + name] = tensor
    return basis


def _refit(weight, bias, inputs, wanted, ridge=1e-6):
    """Return weight and bias whose outputs are nearest to `wanted`, near the given ones where the inputs say nothing."""
    residual = wanted - (inputs @ weight.T + bias)
    if residual.abs().max() <= 1e-5 * wanted.abs().max():
        return weight, bias
    rows = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    gram = rows.T @ rows
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram, rows.T @ residual.double()).T.float()
    return weight + change[:, :-1], bias + change[:, -1]


# ---- blocks ---------------------------------------------------------------------------------------------------------------

def _project_span(reader, span, index, channels, norm_scale, times, words, config, student, report):
    """Project the teacher blocks of a span into one student block."""
    blocks = [reader.block(number) for number in span]
    prefix = f"blocks.{index}."
    tables = torch.stack([block["scale_shift_table"][0, :, channels] for block in blocks])           # (span, 6, d)
    table = tables.mean(0)
    stretched = table.clone()
    stretched[list(SCALE)] = norm_scale * (1 + table[list(SCALE)]) - 1
    student[prefix + "scale_shift_table"] = stretched[None]
    norm = [torch.stack([block[f"norm2.{kind}"][channels] for block in blocks]) for kind in ("weight", "bias")]
    student[prefix + "norm2.weight"], student[prefix + "norm2.bias"] = norm[0].mean(0) * norm_scale, norm[1].mean(0)

    report.cuts.append({})
    parts = {name: [] for name in ("attn1", "attn2", "ffn")}
    for number, block in enumerate(blocks):
        readers, gates = _modulation_ratios(tables[number], table, times["modulation"])
        for attention, text_basis in zip(ATTENTIONS, (None, words)):
            scale, shift, gate = ((readers["attn1"][0], readers["attn1"][1], gates["attn1"]) if attention == "attn1" else
                                  _affine_ratio(norm[0][number], norm[1][number], norm[0].mean(0), norm[1].mean(0)))
            parts[attention].append(_cut_attention(block, attention, channels, text_basis, scale, shift, gate))
        parts["ffn"].append(_cut_feed_forward(block, channels, *readers["ffn"], gates["ffn"]))
    for attention in ATTENTIONS:
        heads = _join_heads(parts[attention], config, reader.files.config, attention, report)
        student |= {f"{prefix}{attention}.{name}": tensor for name, tensor in heads.items()}
    neurons = _join_neurons(parts["ffn"], config["ffn_dim"], report)
    student.update({f"{prefix}ffn.net.{name}": tensor for name, tensor in neurons.items()})


def _modulation_ratios(own, shared, over_time):
    """Return what turns the span's shared modulation into a block's own: ({reader: (scale ratio, shift)}, {writer: gate ratio}).

    Least squares over timesteps, per channel; exactly 1, 0 and 1 for a span of one block.
    """
    readers, gates = {}, {}
    for part, name in enumerate(("attn1", "ffn")):
        shift, scale, gate = SHIFT[part], SCALE[part], GATE[part]
        own_scale, shared_scale = 1 + own[scale] + over_time[:, scale], 1 + shared[scale] + over_time[:, scale]
        ratio = _ratio(own_scale, shared_scale)
        readers[name] = (ratio, (own[shift] + over_time[:, shift]).mean(0)
                         - ratio * (shared[shift] + over_time[:, shift]).mean(0))
        gates[name] = _ratio(own[gate] + over_time[:, gate], shared[gate] + over_time[:, gate])
    return readers, gates


def _ratio(own, shared):
    """Least squares of own = ratio * shared over the first dimension; 1 where they are equal or the shared one vanishes."""
    power = shared.square().sum(0)
    return torch.where((own == shared).all(0) | (power <= 1e-8 * power.mean()), torch.ones_like(power),
                       (own * shared).sum(0) / power.clamp(min=1e-12)).clamp(-4, 4)


def _affine_ratio(own_weight, own_bias, weight, bias):
    ratio = _ratio(own_weight[None], weight[None])
    return ratio, own_bias - ratio * bias, torch.ones_like(ratio)


def _read(weight, bias, channels, scale, shift):
    """Cut a reader of the residual: keep its columns, fold a block's own scale and shift in."""
    return weight[:, channels] * scale, bias + weight[:, channels] @ shift


def _cut_attention(block, name, channels, text_basis, scale, shift, gate):
    """Return one block's attention with every head, between the student's residual channels (or text basis) and its own rows."""
    cut = {"q": _read(block[f"{name}.to_q.weight"], block[f"{name}.to_q.bias"], channels, scale, shift)}
    for kind in "kv":
        weight, bias = block[f"{name}.to_{kind}.weight"], block[f"{name}.to_{kind}.bias"]
        cut[kind] = _read(weight, bias, channels, scale, shift) if text_basis is None else (weight @ text_basis, bias)
    cut["o"] = gate[:, None] * block[f"{name}.to_out.0.weight"][channels]                            # (d, D)
    cut["o_bias"] = gate * block[f"{name}.to_out.0.bias"][channels]
    cut["gain"] = {kind: block[f"{name}.norm_{kind}.weight"] for kind in "qk"}
    cut["power"] = {kind: _row_power(*cut[kind]).mean() for kind in "qk"}    # what the teacher's RMSNorm divides by
    return cut


def _row_power(weight, bias):
    """Return the expected square of each output for inputs of unit variance."""
    return weight.square().sum(1) + bias.square()


def _join_heads(cuts, config, teacher, name, report):
    """Keep the heads that write most, of all blocks in a span, and their rotary pairs; returns a student attention's tensors."""
    num_heads, size = config["num_heads"], config["hidden_size"] // config["num_heads"]
    full = teacher["attention_head_dim"]
    scores = torch.cat([_head_scores(cut, full) for cut in cuts])
    heads = _top(scores, num_heads)
    report.kept[name] = round(float(scores[heads].sum() / scores.sum()), 4)
    joined = {key: [] for key in ("q", "k", "v", "o", "q_gain", "k_gain", "q_power", "k_power")}
    picks = {kind: [] for kind in "qkv"}
    output_bias = sum(cut["o_bias"] for cut in cuts)
    for head in range(len(scores)):
        number, head_in_block = divmod(head, teacher["num_attention_heads"])
        cut, rows = cuts[number], _head_rows(head_in_block, full)
        if head not in heads:
            output_bias = output_bias + cut["o"][:, rows] @ cut["v"][1][rows]        # what it writes whatever it looks at
            continue
        pairs = rows[_rotary_rows(cut, rows, full, size, has_rotary=name == "attn1")]
        picks["v"].append((number, rows))
        for kind in "qk":
            picks[kind].append((number, pairs))
            joined[kind].append([tensor[pairs] for tensor in cut[kind]])
            joined[f"{kind}_gain"].append(cut["gain"][kind][pairs] * (size / full) ** 0.25)
            joined[f"{kind}_power"].append(cut["power"][kind].expand(size))
        value, value_bias, output, lost = _cut_value(cut["v"][0][rows], cut["v"][1][rows], cut["o"][:, rows], size)
        joined["v"].append((value, value_bias))
        joined["o"].append(output)
        output_bias = output_bias + lost
    tensors = {"to_out.0.weight": torch.cat(joined["o"], 1), "to_out.0.bias": output_bias}
    for kind in "qkv":
        weights, biases = zip(*joined[kind])
        tensors[f"to_{kind}.weight"], tensors[f"to_{kind}.bias"] = torch.cat(weights), torch.cat(biases)
    if size == full:                                             # values of a smaller head are no rows of the teacher's
        report.cuts[-1][f"{name}.v"] = picks["v"]
    for kind in "qk":
        power = _row_power(tensors[f"to_{kind}.weight"], tensors[f"to_{kind}.bias"]).mean()   # what the student divides by
        report.cuts[-1] |= {f"{name}.{kind}": picks[kind], f"{name}.{kind}.gain": torch.cat(joined[f"{kind}_gain"])}
        tensors[f"norm_{kind}.weight"] = torch.cat(joined[f"{kind}_gain"]) * (power / torch.cat(joined[f"{kind}_power"])).sqrt()
    return tensors


def _head_rows(head, size):
    return torch.arange(head * size, (head + 1) * size)


def _head_scores(cut, size):
    """Return what each head writes: the squared norm of its output matrix times its value matrix."""
    outputs, values = cut["o"].unflatten(1, (-1, size)), cut["v"][0].unflatten(0, (-1, size))
    return torch.stack([(outputs[:, head] @ values[head]).square().sum() for head in range(len(values))])


def _rotary_rows(cut, rows, full, size, has_rotary):
    """Choose `size` of a head's `full` query and key channels as whole rotary pairs, each axis with the share that Wan gives it.

    Per head Wan lays out [time | height | width]; a smaller head has fewer and coarser-spaced frequencies, so each of its spatial
    pairs takes the teacher's pair of nearest log-frequency. Time pairs stand still at one frame: the strongest are kept.
    """
    if size == full:
        return torch.arange(full)
    strength = sum(_row_power(cut[kind][0][rows], cut[kind][1][rows]) for kind in "qk").unflatten(0, (-1, 2)).sum(1)
    if not has_rotary:
        pairs = _top(strength, size // 2)
    else:
        axes, axes_full = _axis_pairs(size), _axis_pairs(full)
        pairs, start = [_top(strength[:axes_full[0]], axes[0])], axes_full[0]
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
    return small_value, torch.zeros(size), small_output, output @ bias


def _cut_feed_forward(block, channels, scale, shift, gate):
    first, first_bias = _read(block["ffn.net.0.proj.weight"], block["ffn.net.0.proj.bias"], channels, scale, shift)
    return {"first": first, "first_bias": first_bias, "second": gate[:, None] * block["ffn.net.2.weight"][channels],
            "second_bias": gate * block["ffn.net.2.bias"][channels]}


def _join_neurons(cuts, count, report):
    """Keep the neurons that write most, of all blocks in a span; what the others write on average goes to the bias."""
    first, bias = torch.cat([cut["first"] for cut in cuts]), torch.cat([cut["first_bias"] for cut in cuts])
    second = torch.cat([cut["second"] for cut in cuts], 1)
    mean, power = _gelu_moments(bias, first.square().sum(1).sqrt())
    score = second.square().sum(0) * power
    neurons = _top(score, count)
    width = len(cuts[0]["first"])
    report.cuts[-1]["ffn"] = [(number, neurons[neurons // width == number] % width) for number in range(len(cuts))]
    report.kept["ffn"] = round(float(score[neurons].sum() / score.sum()), 4)
    rest = torch.ones(len(bias), dtype=torch.bool)
    rest[neurons] = False
    output_bias = sum(cut["second_bias"] for cut in cuts) + second[:, rest] @ mean[rest]
    return {"0.proj.weight": first[neurons], "0.proj.bias": bias[neurons], "2.weight": second[:, neurons],
            "2.bias": output_bias}


def _gelu_moments(mean, deviation):
    """Return mean and mean square of gelu of a normal variable, by nine-point Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = torch.tensor(weights / weights.sum(), dtype=mean.dtype)
    values = F.gelu(mean[:, None] + deviation[:, None] * torch.tensor(points, dtype=mean.dtype), approximate="tanh")
    return values @ weights, values.square() @ weights


# ---- head -----------------------------------------------------------------------------------------------------------------

def _project_head(reader, channels, norm_scale, times, student):
    """Cut the output layer; its scale is table + time embedding, so norm_scale goes to the table, for the mean embedding."""
    table = reader("scale_shift_table")[:, :, channels].clone()
    table[:, 1] += (norm_scale - 1) * (1 + table[:, 1] + times["embedding"])
    student["scale_shift_table"] = table
    student["proj_out.weight"] = reader("proj_out.weight")[:, channels]
    student["proj_out.bias"] = reader("proj_out.bias")
