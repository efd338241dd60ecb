"""The teacher's velocity: routing at the boundary, guidance, and the same values wherever its experts
are.
"""

import gc
import weakref

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.conftest import A14B, TINY_TEACHER, write_sparse_wan
from wanlite.network import unpack_text
from wanlite.planning.simulation import MemoryMeter
from wanlite.teacher import pinned
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import RESIDENCIES, Teacher, choose_residency, load_expert, load_fp8_expert
from wanlite.teacher.pinned import pin_together


@pytest.fixture(scope="module")
def stock():
    return {
        name: WanTransformer3DModel.from_pretrained(TINY_TEACHER / folder).eval()
        for name, folder in (("high", "transformer"), ("low", "transformer_2"))
    }


def test_both_layouts_hold_the_same_teacher(official_teacher, teacher, prompt_embeddings, noisy):
    official = Teacher(open_teacher_files(official_teacher))
    assert official.files.layout == "official" and teacher.files.layout == "diffusers"
    assert official.boundary == teacher.boundary == 0.875
    timestep = torch.tensor([990.0, 875.0, 874.0, 30.0])
    ours, theirs = (
        each.velocity(noisy, timestep, *prompt_embeddings, 4.0, 3.0)[0] for each in (teacher, official)
    )
    assert torch.equal(ours, theirs)


def test_guided_velocity_equals_stock_networks_with_classifier_free_guidance(
    teacher, stock, prompt_embeddings, noisy
):
    text, negative = (unpack_text(each) for each in prompt_embeddings)
    timestep = torch.tensor([999.0, 875.0, 874.9, 20.0])
    velocity, _ = teacher.velocity(noisy, timestep, *prompt_embeddings, guidance_high=4.0, guidance_low=3.0)
    for row, (expert, guidance) in enumerate([("high", 4.0), ("high", 4.0), ("low", 3.0), ("low", 3.0)]):
        with torch.no_grad():
            wanted, unwanted = (
                stock[expert](
                    noisy[row : row + 1, :, None], timestep[row : row + 1], tokens[row : row + 1]
                ).sample
                for tokens in (text, negative)
            )
        expected = (unwanted + guidance * (wanted - unwanted))[0, :, 0]
        assert torch.allclose(velocity[row], expected, atol=1e-4)


def test_a_teacher_in_bfloat16_agrees_with_itself_in_float32(teacher, prompt_embeddings, noisy):
    timestep = torch.tensor([999.0, 875.0, 874.0, 20.0])
    half = Teacher(open_teacher_files(TINY_TEACHER), dtype=torch.bfloat16)
    exact, _ = teacher.velocity(noisy, timestep, *prompt_embeddings, 2.0, 2.0)
    found, _ = half.velocity(noisy, timestep, *prompt_embeddings, 2.0, 2.0)
    assert found.dtype == torch.float32 and (found - exact).norm() / exact.norm() < 0.05


def test_guidance_of_one_calls_the_network_once(teacher, prompt_embeddings, noisy):
    plain, _ = teacher.velocity(noisy, torch.full((4,), 500.0), prompt_embeddings[0])
    guided, _ = teacher.velocity(noisy, torch.full((4,), 500.0), *prompt_embeddings, 1.0001, 1.0001)
    assert (plain - guided).abs().max() < 1e-2


def test_features_come_from_the_conditional_pass_in_the_order_of_the_rows(teacher, prompt_embeddings, noisy):
    timestep = torch.tensor([990.0, 20.0, 990.0, 20.0])
    _, (mixed,) = teacher.velocity(noisy, timestep, *prompt_embeddings, 4.0, 3.0, feature_blocks=(2,))
    for row in range(4):
        _, (alone,) = teacher.velocity(
            noisy[row : row + 1],
            timestep[row : row + 1],
            prompt_embeddings[0].rows(slice(row, row + 1)),
            feature_blocks=(2,),
        )
        assert torch.allclose(mixed[row], alone[0], atol=1e-4)


def test_the_teacher_is_frozen_complete_and_not_on_meta(teacher):
    parameters = [*teacher.expert("high").parameters(), *teacher.expert("low").parameters()]
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in parameters)
    assert (
        not any(buffer.is_meta for buffer in teacher.expert("high").buffers())
        and not teacher.expert("high").training
    )


def test_a_teacher_with_one_expert_works_at_every_noise_level(tmp_path, stock, prompt_embeddings, noisy):
    stock["low"].save_pretrained(tmp_path / "transformer")
    only = Teacher(open_teacher_files(tmp_path))
    assert only.boundary is None and list(only.files.experts) == ["only"]
    velocity, _ = only.velocity(noisy, torch.tensor([999.0, 900.0, 500.0, 1.0]), *prompt_embeddings, 2.0)
    assert torch.isfinite(velocity).all()


# ---- residency ---------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def arguments(prompt_embeddings, noisy):
    """Arguments for a teacher: rows of both experts, prompts, negative prompts, and hidden states of one
    block.
    """
    text, negative = prompt_embeddings
    return {
        "latents": noisy,
        "timestep": torch.tensor([990.0, 100.0, 900.0, 500.0]),
        "text": text,
        "negative": negative,
        "guidance_high": 4.0,
        "guidance_low": 3.0,
        "feature_blocks": (2,),
    }


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_velocity_does_not_depend_on_where_experts_are(residency, dtype, arguments):
    files = open_teacher_files(TINY_TEACHER)
    (expected, (states,)), (found, (own,)) = (
        Teacher(files, dtype=dtype, residency=where).velocity(**arguments) for where in ("both", residency)
    )
    assert torch.equal(found, expected) and torch.equal(own, states)


def test_float8_storage_takes_a_quarter_of_float32_and_stays_near(arguments, teacher):
    small = Teacher(open_teacher_files(TINY_TEACHER), dtype=torch.bfloat16, is_fp8=True)
    (found, _), (expected, _) = small.velocity(**arguments), teacher.velocity(**arguments)
    assert 1e-4 < (found - expected).square().mean() / expected.square().mean() < 0.02
    kept = {tensor.dtype for name, tensor in small.expert("low").named_parameters() if ".to_q.weight" in name}
    assert kept == {torch.float8_e4m3fn}
    assert small.expert("low").scale_shift_table.dtype == torch.float32


@pytest.mark.parametrize("residency", ["both", "one", "streamed"])
def test_float8_weights_equal_those_cast_after_loading(residency):
    files = open_teacher_files(TINY_TEACHER)
    found = Teacher(files, dtype=torch.bfloat16, is_fp8=True, residency=residency).expert("low").state_dict()
    wide = load_expert(files.experts["low"], dtype=torch.bfloat16)
    wide.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for name, tensor in wide.state_dict().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name


class RealMemory(MemoryMeter):
    """Counts no tensors on meta."""

    def _count(self, storage):
        if storage.device.type != "meta":
            super()._count(storage)


def test_an_expert_in_float8_is_never_in_memory_in_another_dtype():
    files = open_teacher_files(TINY_TEACHER).experts["low"]
    largest = max(torch.Size(shape).numel() for *_, shape in files.places.values())
    with RealMemory() as meter:
        expert = load_fp8_expert(files, "cpu", torch.bfloat16)
    kept = sum(tensor.nbytes for tensor in (*expert.parameters(), *expert.buffers()))
    assert kept <= meter.peak_bytes < kept + 8 * largest


def test_weights_in_shared_buffers_are_equal_and_fill_them():
    files = open_teacher_files(TINY_TEACHER).experts["low"]
    for expert in (load_expert(files, dtype=torch.bfloat16), load_fp8_expert(files, "cpu", torch.bfloat16)):
        before = {name: weight.detach().clone() for name, weight in expert.named_parameters()}
        pin_together(expert, is_pinned=False)
        buffers = {weight.untyped_storage().data_ptr() for weight in expert.parameters()}
        assert len(buffers) == 1
        for name, weight in expert.named_parameters():
            assert weight.dtype == before[name].dtype and torch.equal(weight.float(), before[name].float())
            assert weight.data_ptr() % 16 == 0


def test_buffers_are_powers_of_two_of_bounded_size(monkeypatch):
    monkeypatch.setattr(pinned, "BUFFER_BYTES", 2**12)
    network = torch.nn.ParameterList([torch.randn(size) for size in (100, 600, 600, 5000, 7)])
    before = [weight.detach().clone() for weight in network]
    pin_together(network, is_pinned=False)
    assert all(map(torch.equal, network, before))
    sizes = [len(weight.untyped_storage()) for weight in network]
    assert sizes == [4096, 4096, 4096, 20480, 512]


def test_one_expert_at_a_time_is_in_memory_and_none_when_idle(arguments):
    found = Teacher(open_teacher_files(TINY_TEACHER), residency="one")
    held = weakref.ref(found.expert("high").blocks[0].ffn.net[0].proj)
    found.expert("low")
    assert held() is None
    held = weakref.ref(found.expert("low").blocks[0].ffn.net[0].proj)
    found.unload()
    assert held() is None
    found.velocity(**arguments)  # and reads it again on the next call


def test_idle_streamed_experts_are_freed_despite_reference_cycles():
    found = Teacher(open_teacher_files(TINY_TEACHER), residency="streamed")
    held = weakref.ref(found.expert("high").blocks[0].ffn.net[0].proj.weight)
    gc.disable()
    try:
        found.unload()
        assert held() is None
    finally:
        gc.enable()


def test_a_few_rows_at_a_time_equal_all_at_once(arguments, teacher):
    few = Teacher(open_teacher_files(TINY_TEACHER), tokens_at_once=1)
    (found, (own,)), (expected, (states,)) = few.velocity(**arguments), teacher.velocity(**arguments)
    assert torch.allclose(found, expected, atol=1e-4) and torch.allclose(
        own, states, atol=1e-4
    )  # of values up to 22 and 60
    seen = []
    few.expert("low").register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    few.velocity(**arguments)
    assert seen == [2, 2]  # one image, conditional and unconditional


@pytest.mark.parametrize(
    "is_fp8, free_device, free_host, is_cpu, expected",
    [
        (False, 78, 200, False, "both"),
        (False, 47, 200, False, "one"),
        (False, 23, 200, False, "streamed"),
        (False, 23, 70, False, "disk"),
        (True, 47, 200, False, "both"),
        (True, 31, 200, False, "one"),
        (False, 47, 40, False, "disk"),
        (False, 78, 78, True, "both"),
        (False, 47, 47, True, "one"),
        (False, 23, 23, True, "disk"),
    ],
)
def test_the_residency_of_a14b_follows_free_memory(
    is_fp8, free_device, free_host, is_cpu, expected, tmp_path
):
    for name in ("high_noise_model", "low_noise_model"):
        write_sparse_wan(tmp_path / name, A14B, "official", 6)
    files = open_teacher_files(tmp_path)
    assert (
        choose_residency(files, torch.bfloat16, is_fp8, free_device * GIB, free_host * GIB, is_cpu)
        == expected
    )


def test_gpus_shard_the_experts_of_a14b_if_neither_they_nor_the_cpu_can_hold_one(tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        write_sparse_wan(tmp_path / name, A14B, "official", 6)
    files = open_teacher_files(tmp_path)
    chosen = [
        choose_residency(files, torch.bfloat16, is_fp8, free * GIB, 41 * GIB, shares=shares)
        for is_fp8, free, shares in ((False, 23, 1), (False, 23, 2), (False, 23, 8), (True, 18, 8))
    ]
    assert chosen == ["disk", "disk", "sharded", "streamed"]
