"""Projection: exact at the teacher's shape, the same from every layout, complete, and better than random
weights.
"""

import inspect
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import A14B, TI2V_5B, TINY_TEACHER, WAN_1_3B, change, write_official, write_sparse_wan
from train_distillation import Settings, WanLiteStudent
from wanlite.network import one_frame_velocity
from wanlite.student import projection, pruning
from wanlite.student.initialization import project_into
from wanlite.student.shape import DEFAULT_EXPERT, check_shape_fits
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.experts import check_experts

TEXT = {"num_channels": 16, "text_dim": 64, "rope_max_seq_len": 64}
PRUNED = {"hidden_size": 64, "depth": 4, "num_heads": 2} | TEXT
CONFIG = PRUNED | {"ffn_dim": 256, "freq_dim": 256, "patch_size": (1, 2, 2)}  # entries of a student config


def own_shape(config):
    return {
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "ffn_dim": config["ffn_dim"],
    } | TEXT


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_student_as_large_as_the_teacher_reproduces_its_frame(
    expert, layout, official_teacher, teacher, prompt_embeddings, noisy
):
    folder = official_teacher if layout == "official" else TINY_TEACHER
    student = WanLiteStudent(**own_shape(teacher.config), teacher_checkpoint_path=folder, expert=expert)
    for timestep in (999.0, 880.0, 500.0, 20.0):
        arguments = (
            noisy,
            torch.full((4,), timestep),
            prompt_embeddings[0].tokens,
            prompt_embeddings[0].logit_bias,
        )
        expected, _ = one_frame_velocity(teacher.expert(expert), *arguments)
        with torch.no_grad():
            found = student(*arguments[:3], text_logit_bias=prompt_embeddings[0].logit_bias).sample
        assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("num_shards", [1, 5])
def test_layout_and_shards_make_bitwise_no_difference(num_shards, tmp_path):
    write_official(TINY_TEACHER, tmp_path, num_shards)
    ours, theirs = (
        WanLiteStudent(**PRUNED, teacher_checkpoint_path=folder).state_dict()
        for folder in (TINY_TEACHER, tmp_path)
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_command_line_and_the_constructor_have_one_default_expert():
    constructor = inspect.signature(WanLiteStudent.__init__).parameters["expert"].default
    assert Settings().expert == constructor == DEFAULT_EXPERT


def test_projecting_twice_gives_the_same_student_from_any_random_state():
    torch.manual_seed(1)
    first = WanLiteStudent(**PRUNED, teacher_checkpoint_path=TINY_TEACHER).state_dict()
    torch.manual_seed(2)
    second = WanLiteStudent(**PRUNED, teacher_checkpoint_path=TINY_TEACHER).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("expert", projection.EXPERTS)
def test_every_teacher_tensor_is_read_and_every_student_tensor_written(expert):
    student, files = WanLiteStudent(**PRUNED), open_teacher_files(TINY_TEACHER)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    report = projection.project(student, projection.choose_experts(files, expert))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    outer = [name for name in files.experts["high"].places if not name.startswith("blocks.")]
    expected = {
        f"high: {name}" for name in outer if name not in ("patch_embedding.weight", "scale_shift_table")
    }
    assert set(report.dropped) == (expected if expert == "best_per_block" else set())
    assert report.num_read + len(report.dropped) == len(files.experts["high"].places) * (
        2 if expert == "best_per_block" else 1
    )
    assert report.num_written == len(before)


def test_a_student_tensor_without_a_value_stops_the_projection():
    student = WanLiteStudent(**PRUNED)
    student.register_buffer("forgotten", torch.zeros(1))
    with pytest.raises(ValueError, match="forgotten"):
        projection.project(student, [open_teacher_files(TINY_TEACHER).experts["low"]])


def test_the_report_has_the_energy_of_each_block_and_the_cosines_of_the_experts():
    report = project_into(WanLiteStudent(**PRUNED), TINY_TEACHER)
    assert report.kept_energy.keys() == {"residual", "text", "attn1", "attn2", "ffn"}
    assert (
        all(0 < share <= 1 for shares in report.kept_energy.values() for share in shares)
        and len(report.kept_energy["ffn"]) == 4
    )
    assert report.experts == [DEFAULT_EXPERT] * 4 and report.cosines == check_experts(
        open_teacher_files(TINY_TEACHER)
    )
    assert json.loads(json.dumps(report.as_dict()))["energy_kept"] == report.kept_energy and "cosine" in str(
        report
    )


def test_each_block_comes_from_the_expert_that_preserves_more_energy():
    files, kept = open_teacher_files(TINY_TEACHER).experts, {}
    spans = projection.project(WanLiteStudent(**PRUNED), [files["low"], files["high"]])
    for name, expert in files.items():
        report = projection.project(WanLiteStudent(**PRUNED), [expert], channels=spans.channels)
        kept[name] = [
            sum(report.kept_energy[group][block] for group in ("attn1", "attn2", "ffn")) for block in range(4)
        ]
    best = ["low" if low >= high else "high" for low, high in zip(kept["low"], kept["high"])]
    assert spans.experts == best


def test_an_unknown_expert_is_refused():
    with pytest.raises(ValueError, match="'middle' is unknown"):
        project_into(WanLiteStudent(**PRUNED), TINY_TEACHER, "middle")


def test_a_teacher_tensor_without_a_place_stops_the_projection(monkeypatch):
    files = open_teacher_files(TINY_TEACHER).experts["low"]
    files.places["blocks.9.extra.weight"] = files.places["proj_out.bias"]
    with pytest.raises(ValueError, match="blocks.9.extra.weight"):
        projection.project(WanLiteStudent(**PRUNED), [files])


@pytest.mark.parametrize(
    "shape",
    [
        {"depth": 2},
        {"depth": 3},
        {"hidden_size": 96, "num_heads": 3},
        {"num_heads": 4},
        {"ffn_dim": 100},
        {"hidden_size": 128, "num_heads": 4},
        {"depth": 2, "num_heads": 8, "ffn_dim": 1024},
    ],
)
def test_every_shape_that_fits_gives_finite_velocities(shape, prompt_embeddings, noisy):
    student = WanLiteStudent(**PRUNED | shape, teacher_checkpoint_path=TINY_TEACHER)
    assert torch.isfinite(student(noisy, torch.full((4,), 500.0), prompt_embeddings[0].tokens).sample).all()


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"hidden_size": 256, "num_heads": 8}, "hidden_size 256 is more"),
        ({"depth": 5}, "depth 5 is more"),
        ({"hidden_size": 64, "num_heads": 1}, "1 heads of 64 channels"),
        ({"ffn_dim": 4096}, "ffn_dim 4096"),
        ({"hidden_size": 60, "num_heads": 4}, "4 heads of 15 channels"),
        ({"hidden_size": 16, "num_heads": 4}, "4 heads of 4 channels"),
        ({"text_dim": 32}, "text_dim is 32"),
        ({"num_channels": 48}, "num_channels is 48"),
    ],
)
def test_an_impossible_shape_is_refused(shape, words, teacher):
    with pytest.raises(ValueError, match=words):
        check_shape_fits(teacher.config, CONFIG | shape)


def test_an_impossible_student_is_refused_before_any_tensor_is_read(copied):
    for folder in ("transformer", "transformer_2"):
        change(copied / folder, lambda tensors: [tensor.fill_(math.nan) for tensor in tensors.values()])
    with pytest.raises(ValueError, match="holds NaN"):
        WanLiteStudent(**PRUNED, teacher_checkpoint_path=copied)
    with pytest.raises(ValueError, match="depth 5 is more"):
        WanLiteStudent(**PRUNED | {"depth": 5}, teacher_checkpoint_path=copied)


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 256, "num_heads": 8},
        {"depth": 5},
        {"hidden_size": 64, "num_heads": 1},
        {"ffn_dim": 4096},
        {"hidden_size": 60, "num_heads": 4},
    ],
)
def test_the_nearest_shapes_in_the_message_can_be_projected(shape, teacher):
    with pytest.raises(ValueError, match="nearest possible shapes") as refused:
        check_shape_fits(teacher.config, CONFIG | shape)
    named = re.findall(
        r"--hidden_size (\d+) --num_heads (\d+) --depth (\d+) --ffn_dim (\d+)", str(refused.value)
    )
    assert len(named) == 3
    for numbers in named:
        nearest = dict(zip(("hidden_size", "num_heads", "depth", "ffn_dim"), map(int, numbers)))
        check_shape_fits(teacher.config, dict(WanLiteStudent(**PRUNED | nearest).config))


@pytest.mark.parametrize(
    "model, shapes",
    [
        (A14B, [(16, 16), (16, 8), (40, 40)]),
        (WAN_1_3B, [(16, 8), (15, 16), (30, 12)]),
        (TI2V_5B, [(16, 16), (16, 8), (30, 24)]),
    ],
    ids=["A14B and 2.1-14B", "2.1-1.3B", "2.2-5B"],
)
def test_students_of_both_head_sizes_can_be_projected_from_every_wan(model, shapes, tmp_path):
    write_sparse_wan(tmp_path / "wan", model, "official", 6)
    config = open_teacher_files(tmp_path / "wan").config
    for depth, num_heads in shapes:
        student = {
            "hidden_size": 1024 // num_heads // 2 * 2 * num_heads,
            "depth": depth,
            "num_heads": num_heads,
            "ffn_dim": 4096,
            "text_dim": 4096,
            "freq_dim": 256,
            "num_channels": model["channels"],
            "patch_size": (1, 2, 2),
        }
        check_shape_fits(config, student)


def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path):
    write_official(TINY_TEACHER, tmp_path, 1)
    path = next((tmp_path / "low_noise_model").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["blocks.1.ffn.0.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="blocks.1.ffn.net.0.proj.weight holds NaN"):
        WanLiteStudent(**PRUNED, teacher_checkpoint_path=tmp_path)


def test_a_smaller_head_keeps_complete_rotary_pairs_of_every_axis():
    layers = {kind: (torch.randn(128, 8), torch.randn(128)) for kind in "qk"}
    rows = pruning._rotary_rows(layers, torch.arange(128), 64, has_rotary=True)
    assert len(rows.unique()) == 64 and torch.equal(rows[1::2], rows[::2] + 1) and (rows[::2] % 2 == 0).all()
    pairs = rows[::2] // 2
    assert [int((pairs < 22).sum()), int(((pairs >= 22) & (pairs < 43)).sum()), int((pairs >= 43).sum())] == [
        12,
        10,
        10,
    ]
    assert pairs[12:22].tolist() == [22 + step for step in (0, 2, 4, 6, 8, 10, 13, 15, 17, 19)]


@pytest.fixture
def attention():
    """A block's attention with 4 heads of size 4 and width 8; the last two heads have larger queries and
    keys, the first two output only their biases.
    """
    generator = torch.Generator().manual_seed(0)
    loud = torch.tensor([0.2, 0.2, 1.0, 1.0]).repeat_interleave(4)[:, None]
    layers = {kind: (loud * torch.randn(16, 8, generator=generator), torch.zeros(16)) for kind in "qk"}
    value = (loud == 1.0) * torch.randn(16, 8, generator=generator)
    layers["v"] = value, torch.randn(16, generator=generator)
    output, output_bias = torch.randn(8, 16, generator=generator), torch.randn(8, generator=generator)
    energy = pruning._head_energy(output, value, 4)
    return pruning._Attention(
        layers,
        output,
        output_bias,
        gains={kind: torch.rand(16, generator=generator) + 0.5 for kind in "qk"},
        powers={kind: pruning._row_power(*layers[kind]).mean() for kind in "qk"},
        rows=torch.arange(16),
        head_energy=energy,
        block_energy=energy.sum(),
    )


def joined(attention):
    three = pruning._keep_heads(attention, pruning.top_indices(attention.head_energy, 3))
    block = pruning.ProjectedBlock("low", {})
    pruning._join_heads([three], {"num_heads": 2, "hidden_size": 8}, 4, "attn1", block)
    return {name.removeprefix("attn1."): tensor for name, tensor in block.tensors.items()}


def test_attention_keeps_its_temperature_when_heads_are_dropped(attention):
    tensors, inputs = joined(attention), torch.randn(20000, 8, generator=torch.Generator().manual_seed(1))
    for kind in "qk":
        queries = inputs @ attention.layers[kind][0].T
        theirs = (queries / queries.square().mean(-1, keepdim=True).sqrt() * attention.gains[kind])[:, 8:]
        queries = inputs @ tensors[f"to_{kind}.weight"].T
        ours = queries / queries.square().mean(-1, keepdim=True).sqrt() * tensors[f"norm_{kind}.weight"]
        assert 0.98 < (ours.square().mean() / theirs.square().mean()).sqrt() < 1.02


def test_the_constant_output_of_a_dropped_head_is_preserved(attention):
    expected = attention.output_bias + attention.output[:, :8] @ attention.layers["v"][1][:8]
    assert torch.allclose(joined(attention)["to_out.0.bias"], expected, atol=1e-6)
