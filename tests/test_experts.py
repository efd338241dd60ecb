"""The comparison of two experts: copies and swapped ones are refused, others are accepted, and their
similarity is reported.
"""

import shutil
import weakref

import pytest
import torch

from tests.conftest import TINY_TEACHER, change
from wanlite.network import one_frame_velocity
from wanlite.teacher import experts as experts_module
from wanlite.teacher import model as blocks_module
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.expert_files import ExpertFiles
from wanlite.teacher.experts import check_experts
from wanlite.teacher.model import load_expert


def exchange(folder, first, second):
    (
        (folder / first).rename(folder / "x"),
        (folder / second).rename(folder / first),
        (folder / "x").rename(folder / second),
    )


def test_the_cosines_of_two_experts_are_those_of_their_weights():
    files = open_teacher_files(TINY_TEACHER)
    high, low = ({name: expert.read(name) for name in expert.places} for expert in files.experts.values())
    names = {group: [name for name in high if f".{group}." in name] for group in ("attn1", "attn2", "ffn")}
    names["rest"] = list(high.keys() - {name for group in names.values() for name in group})
    expected = {
        group: torch.cosine_similarity(
            *(torch.cat([expert[name].flatten() for name in part]).double() for expert in (high, low)), dim=0
        ).item()
        for group, part in names.items()
    }
    assert check_experts(files) == pytest.approx(expected, abs=1e-6) and min(expected.values()) < 0.99


def test_a_teacher_with_one_expert_is_not_compared_and_not_read(tmp_path):
    shutil.copytree(TINY_TEACHER / "transformer", tmp_path / "transformer")
    files = open_teacher_files(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    assert check_experts(files) == {}


def test_the_same_expert_twice_is_refused(copied):
    shutil.rmtree(copied / "transformer_2")
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    with pytest.raises(ValueError, match="transformer and transformer_2 hold the same weights"):
        check_experts(open_teacher_files(copied))


@pytest.mark.parametrize("row", [0, -1])
def test_experts_that_differ_in_one_number_are_not_taken_for_the_same(copied, row):
    def change_one_number(tensors):
        tensors["blocks.3.ffn.net.2.weight"][row, -1] += 1e-3

    shutil.rmtree(copied / "transformer_2")
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    change(copied / "transformer_2", change_one_number)
    cosines = check_experts(open_teacher_files(copied))
    assert cosines == pytest.approx(dict.fromkeys(("attn1", "attn2", "ffn", "rest"), 1.0), abs=1e-5)


def test_swapped_experts_are_refused_in_either_layout(copied, official_copy):
    (
        exchange(copied, "transformer", "transformer_2"),
        exchange(official_copy, "high_noise_model", "low_noise_model"),
    )
    for folder in (copied, official_copy):
        with pytest.raises(
            ValueError, match="hold each other's weights: at noise level 0.3 .* at noise level 0.99"
        ):
            check_experts(open_teacher_files(folder))


@pytest.mark.parametrize("seed", range(3))
def test_the_comparison_of_experts_exceeds_its_margins_for_every_noise(seed):
    experts = open_teacher_files(TINY_TEACHER).experts
    (high_at_low, high_at_high), (low_at_low, low_at_high) = experts_module.measure_noise_left(
        experts_module._PairedExperts(*experts.values(), "cpu"), seed
    )
    assert (
        high_at_low > 2 * experts_module.PROBE_MARGINS[0] * low_at_low
        and low_at_high > 1.1 * experts_module.PROBE_MARGINS[1] * high_at_high
    )
    assert max(low_at_low, high_at_high) < experts_module.PROBE_LIMIT / 5


@pytest.mark.parametrize("folder", ["transformer", "transformer_2"])
def test_an_expert_that_is_worse_at_every_level_is_accepted(copied, folder):
    def blur(tensors):
        for name in tensors:
            tensors[name] += 0.2 * tensors[name].std() * torch.randn(tensors[name].shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    shutil.rmtree(copied / "transformer_2")
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    change(copied / folder, blur)
    check_experts(open_teacher_files(copied))


def test_untrained_experts_are_accepted_in_either_order(copied):
    def scramble(tensors):
        for name in tensors:
            tensors[name] = 0.05 * torch.randn(tensors[name].shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    change(copied / "transformer", scramble), change(copied / "transformer_2", scramble)
    check_experts(open_teacher_files(copied))
    exchange(copied, "transformer", "transformer_2")
    check_experts(open_teacher_files(copied))


@pytest.mark.parametrize(
    "left, changed",
    [
        (((0.01, 0.05), (0.05, 0.01)), True),
        (((0.05, 0.01), (0.01, 0.05)), False),  # exchanged, in order
        (((0.01, 0.01), (0.05, 0.05)), False),
        (((0.05, 0.05), (0.01, 0.01)), False),  # one is worse at all levels
        (((0.01, 0.011), (0.05, 0.01)), False),
        (((0.03, 0.05), (0.05, 0.01)), False),  # clear at one level
        (((0.2, 0.05), (0.9, 0.01)), False),
        (((0.01, 0.9), (0.05, 0.2)), False),  # neither predicts the noise of a level
        (((float("nan"), 0.05), (0.05, 0.01)), False),
        (((0.01, 0.05), (0.05, float("nan"))), False),
    ],
)
def test_experts_are_swapped_only_if_both_levels_show_it(left, changed):
    assert experts_module.are_swapped(left) is changed


def test_two_experts_read_in_parallel_equal_the_two_experts(teacher, noisy):
    experts = teacher.files.experts
    pair = experts_module._PairedExperts(*experts.values(), "cpu")
    latents, timestep = noisy.repeat(4, 1, 1, 1), torch.linspace(10, 990, 16)
    text = torch.randn(16, 3, 64, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(16, 3)
    with torch.no_grad():
        found, _ = one_frame_velocity(pair, latents, timestep, text, bias)
    for name, half in (("high", slice(0, 8)), ("low", slice(8, 16))):
        expected, _ = one_frame_velocity(
            load_expert(experts[name]), latents[half], timestep[half], text[half], bias[half]
        )
        assert torch.allclose(found[half], expected, atol=1e-5)


def test_comparing_reads_each_tensor_once_and_one_block_at_a_time(monkeypatch):
    files, whole, blocks, loaded = open_teacher_files(TINY_TEACHER), [], [], []
    read, empty_block = ExpertFiles.read, blocks_module._empty_block

    def watched_read(expert, name, dtype=torch.float32, rows=None, device="cpu"):
        whole.extend([(expert.name, name)] if rows is None else [])
        alive = [reference() for reference in blocks if reference() is not None]
        loaded.append(sum(not next(block.parameters()).is_meta for block in alive))
        return read(expert, name, dtype, rows, device)

    def watched_block(expert):
        block = empty_block(expert)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(ExpertFiles, "read", watched_read)
    monkeypatch.setattr(blocks_module, "_empty_block", watched_block)
    check_experts(files)
    assert sorted(whole) == sorted(
        (expert.name, name) for expert in files.experts.values() for name in expert.places
    )
    assert len(blocks) == 8 and max(loaded) == 1  # the other expert's block, while one is read
