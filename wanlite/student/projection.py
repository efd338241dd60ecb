"""Teacher tensors -> student tensors and a report, from weights alone, with one teacher tensor in memory at a time.

The student keeps some of the teacher's residual channels, whole heads, whole rotary pairs, and the neurons with
the largest outputs; each student block represents a contiguous span of teacher blocks. Effects of pruning that
follow from the weights are compensated: the statistics of LayerNorm and of the RMSNorm of queries and keys, the
modulation of a span, the values of dropped heads, the text embedder and the time embedder. A student of the
teacher's shape therefore equals the teacher.

Legend: D d teacher and student width, T text width, G timesteps of the time embedder's grid; capital = teacher.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .embedders import TimeStates, embed_timesteps, project_text, project_time
from .pruning import GATE, SCALE, BlockProjector, project_span, top_indices
from .tensors import TensorReader, TensorWriter, check_coverage

EXPERTS = ("low", "high", "best_per_block")  # the last: for each student block, the one with more energy kept
WRITERS = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")  # layers that write to the residual


@dataclass
class Report:
    """The facts of a projection.

    `kept_energy` is the share of energy (squared norm) in the kept rows and columns or, for the text embedder,
    in the kept directions of its outputs.
    """

    spans: list[list[int]]  # teacher blocks of each student block
    kept_energy: dict[str, list[float]] = field(default_factory=dict)  # {group: [share of each block]}
    experts: list[str] = field(default_factory=list)  # source of each student block
    cosines: dict[str, float] = field(default_factory=dict)  # {group: cosine of the weights of two experts}
    channels: Tensor = field(default_factory=lambda: torch.arange(0))  # kept residual channels
    kept_rows: list[dict] = field(default_factory=list)  # of each student block; see ProjectedBlock
    num_read: int = 0  # teacher tensors
    dropped: list[str] = field(default_factory=list)  # teacher tensors that are not needed
    num_written: int = 0  # student tensors
    seconds: float = 0.0

    def __str__(self):
        shares = ", ".join(f"{name} {np.mean(share):.0%}" for name, share in self.kept_energy.items())
        cosines = ", ".join(f"{name} {cosine:.2f}" for name, cosine in self.cosines.items())
        return (
            f"projected {' and '.join(sorted(set(self.experts)))} expert into {len(self.channels)} x "
            f"{len(self.spans)} in {self.seconds:.0f} s: {self.num_read} tensors -> {self.num_written}; energy "
            f"kept: {shares}" + (f"; cosine of the experts: {cosines}" if cosines else "")
        )

    def as_dict(self) -> dict:
        """Return the entries for run.json."""
        return {
            "experts": self.experts,
            "spans": self.spans,
            "energy_kept": self.kept_energy,
            "expert_cosines": self.cosines,
            "channels": self.channels.tolist(),
            "teacher_tensors_used": self.num_read,
            "teacher_tensors_dropped": self.dropped,
            "student_tensors_written": self.num_written,
            "student_tensors_new": [],
            "seconds": round(self.seconds, 1),
        }


def choose_experts(files, expert: str) -> list:
    """Return the files of the experts to project from: one or, for "best_per_block", the low and the high one."""
    if expert not in EXPERTS:
        raise ValueError(
            f"--expert {expert!r} is unknown, expected {', '.join(EXPERTS)}; a teacher with a single expert accepts "
            "all of them."
        )
    if "only" in files.experts:
        return [files.experts["only"]]
    return [files.experts[name] for name in (("low", "high") if expert == "best_per_block" else (expert,))]


@torch.no_grad()
def project(student, experts, text_samples=None, channels=None, device="cpu") -> Report:
    """Project one expert, or for each block the better one of two, into a student in place.

    `text_samples` (n, T) are prompt embeddings; without them, normal random numbers are used. `channels` are the
    residual channels to keep, in ascending order; by default those with the largest variance at the inputs of
    layers, as estimated from the weights. The text, time and output layers come from the first expert. The
    arithmetic runs on `device`, in float32. Raises ValueError for a tensor that is not finite or not expected.
    """
    began = time.perf_counter()
    config, teacher = dict(student.config), experts[0].config
    blocks = np.array_split(np.arange(teacher["num_layers"]), config["depth"])
    report, writer = Report([span.tolist() for span in blocks]), TensorWriter(student)
    total = 2 * sum(files.num_bytes for files in experts)  # read twice, first to choose channels
    with tqdm(total=total, desc="projecting", unit="B", unit_scale=True, disable=None) as progress:
        readers = [TensorReader(files, device, progress) for files in experts]
        first = readers[0]
        times = embed_timesteps(first, config["freq_dim"])
        channels, norm_scale = _choose_channels(readers, times, config["hidden_size"], channels, report)
        project_time(first, times, channels, norm_scale, writer)
        basis, share = project_text(first, config["hidden_size"], text_samples, writer)
        report.kept_energy["text"] = [share]
        for name in ("weight", "bias"):
            writer[f"patch_embedding.{name}"] = first(f"patch_embedding.{name}")[channels]
        projector = BlockProjector(config, teacher, channels, norm_scale, times.modulation, basis)
        for index in range(len(report.spans)):
            progress.set_postfix_str(f"block {index + 1} of {len(report.spans)}")
            _project_block(projector, readers, index, writer, report)
        _project_head(first, channels, norm_scale, times, writer)
        progress.update(progress.total - progress.n)
    report.channels = channels.cpu()
    report.dropped = check_coverage(readers, writer)
    report.num_read = sum(len(reader.names) for reader in readers)
    report.num_written = len(writer.tensors)
    report.seconds = time.perf_counter() - began
    return report


def _choose_channels(readers, times: TimeStates, width, channels, report) -> tuple[Tensor, float]:
    """Return the residual channels to keep, and the ratio of their deviation to that of all channels.

    The score of a channel is its variance at the inputs of layers: the normalised sum of all earlier writers,
    multiplied by the modulation. The output layer has the weight of all blocks together.
    """
    mean = times.modulation.mean(0)  # (6, D)
    power = times.modulation.square().mean(0)  # (6, D)
    read = present = torch.zeros((), device=mean.device)
    for reader in readers:
        written = _share(reader("patch_embedding.weight").flatten(1).square().sum(1))  # (D,)
        for block in range(reader.files.config["num_layers"]):
            prefix = f"blocks.{block}."
            scales, gates = _mean_squares(reader, prefix, mean, power)
            for scale, name, gate in zip(scales, WRITERS, gates):
                present = present + _share(written)
                read = read + _share(written) * scale
                written = written + _share(reader(f"{prefix}{name}.weight").square().sum(1) * gate)
        scale = (1 + reader("scale_shift_table")[0, 1] + times.embedding).square().mean(0)
        read = read + 3 * (block + 1) * _share(written) * scale
    channels = (top_indices(read, width) if channels is None else torch.as_tensor(channels)).to(read.device)
    report.kept_energy["residual"] = [float(read[channels].sum() / read.sum())]
    return channels, float((present[channels].mean() / present.mean()).sqrt())


def _mean_squares(reader, prefix, mean, power):
    """Return the mean squares over time of the scales (D,) of a block's three inputs, and of its gates."""
    table = reader(f"{prefix}scale_shift_table")[0]  # (6, D)
    offset = table + torch.tensor([0.0, 1, 0, 0, 1, 0], device=table.device)[:, None]  # a scale is 1 + table
    square = offset.square() + 2 * offset * mean + power
    norm = reader(f"{prefix}norm2.weight").square()
    return (square[SCALE[0]], norm, square[SCALE[1]]), (square[GATE[0]], 1.0, square[GATE[1]])


def _share(energy):
    return energy / energy.sum()


def _project_block(projector, readers, index, writer, report):
    """Write the student block `index`, projected from the expert with more energy kept."""
    candidates = [project_span(projector, reader, report.spans[index]) for reader in readers]
    block = max(candidates, key=lambda each: sum(each.kept_energy.values()))  # ties go to the first
    for name, tensor in block.tensors.items():
        writer[f"blocks.{index}.{name}"] = tensor
    report.kept_rows.append(block.kept_rows)
    report.experts.append(block.expert)
    for group, share in block.kept_energy.items():
        report.kept_energy.setdefault(group, []).append(round(share, 4))


def _project_head(reader, channels, norm_scale, times: TimeStates, writer):
    """Slice the output layer.

    Its scale is the sum of a table and the time embedding; `norm_scale` is folded into the table, for the mean
    embedding.
    """
    full = reader("scale_shift_table")  # (1, 2, D)
    embedding = times.embedding.mean(0)  # (D,)
    table = full[:, :, channels]
    table[:, 1] += (norm_scale - 1) * (1 + table[:, 1] + embedding[channels])
    writer["scale_shift_table"] = table
    weight, dropped = reader("proj_out.weight"), full[0, 0] + embedding
    dropped[channels] = 0
    writer["proj_out.weight"] = weight[:, channels]
    writer["proj_out.bias"] = reader("proj_out.bias") + weight @ dropped
