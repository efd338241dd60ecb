"""A compiled student computes the same as an uncompiled one, and a fused optimizer the same as a plain
one.
"""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from tests.conftest import ROOT, TINY_TEACHER, loud_student, run_script
from train_distillation import Settings, WanLiteStudent
from wanlite.network import pack_text
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher, load_expert, run_expert
from wanlite.training.optimizers import make_optimizers

TEXT = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))


def make_student():
    return loud_student(hidden_size=32, depth=1, num_heads=2, text_dim=48)


def gradients(student):
    bias = torch.zeros(2, 5)
    (velocity,) = student(
        LATENTS, torch.tensor([900.0, 100.0]), TEXT, text_logit_bias=bias, return_dict=False
    )
    velocity.square().mean().backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_student_has_the_same_names_gradients_and_files(tmp_path):
    plain, compiled = make_student(), make_student()
    compiled.compile_repeated_blocks()
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)
    expected, found = gradients(plain), gradients(compiled)
    assert list(found) == list(expected) and list(compiled.state_dict()) == list(plain.state_dict())
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-4), name
    assert any(
        not torch.equal(gradient, expected[name]) for name, gradient in found.items()
    )  # the student was compiled
    compiled.save_pretrained(tmp_path / "student")
    loaded = WanLiteStudent.from_pretrained(tmp_path / "student")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_compiled_expert_of_the_teacher_gives_its_own_velocity():
    expert = load_expert(next(iter(open_teacher_files(TINY_TEACHER).experts.values())))
    text = pack_text([torch.randn(5, expert.config.text_dim)] * 2)
    given = (torch.randn(2, expert.config.in_channels, 8, 8), torch.tensor([900.0, 100.0]), text)
    with torch.no_grad():
        expected, _ = run_expert(expert, *given)
        expert.compile_repeated_blocks(backend="eager")
        found, _ = run_expert(expert, *given)
    assert all(block._compiled_call_impl is not None for block in expert.blocks)
    assert torch.allclose(found, expected, atol=1e-4)  # norms of the CPU are composed of others when compiled


@pytest.mark.parametrize(
    "residency, is_fp8, expected",
    [("both", False, True), ("one", False, True), ("streamed", False, False), ("both", True, False)],
)
def test_a_compiled_teacher_has_compiled_experts_where_they_stay(residency, is_fp8, expected):
    files = open_teacher_files(TINY_TEACHER)
    for is_compiled in (True, False):
        teacher = Teacher(files, residency=residency, is_fp8=is_fp8, is_compiled=is_compiled)
        blocks = [*teacher.expert("high").blocks, *teacher.expert("low").blocks]
        assert all((block._compiled_call_impl is not None) == (is_compiled and expected) for block in blocks)


def test_swapping_the_weights_of_a_compiled_expert_compiles_nothing_again():
    expert = load_expert(next(iter(open_teacher_files(TINY_TEACHER).experts.values())))
    text = pack_text([torch.randn(5, expert.config.text_dim)] * 2)
    given = (torch.randn(2, expert.config.in_channels, 8, 8), torch.tensor([900.0, 100.0]), text)
    expert.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        expected, _ = run_expert(expert, *given)
        num_graphs = counters["stats"]["unique_graphs"]
        state = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
        expert.load_state_dict(state, assign=True)
        found, _ = run_expert(expert, *given)
    assert torch.equal(found, expected) and counters["stats"]["unique_graphs"] == num_graphs


def test_compiling_without_a_compiler_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    process = run_script(ROOT / "train_distillation.py", "--compile", "--output_dir", tmp_path / "run")
    assert (
        process.returncode == 2
        and process.stderr.count("\n") == 1
        and "--compile needs a C++ compiler" in process.stderr
    )
    assert not (tmp_path / "run").exists()


def test_fused_adamw_equals_plain_adamw_and_is_used_only_on_request():
    weights = {}
    for is_fused in (False, True):
        student = make_student()
        (optimizer,) = make_optimizers(Settings(muon_learning_rate=0.0), student, is_fused=is_fused)
        assert optimizer.defaults["fused"] is (True if is_fused else None)
        for _ in range(3):
            gradients(student)
            optimizer.step()
            optimizer.zero_grad()
        weights[is_fused] = student.state_dict()
    assert all(
        torch.allclose(tensor, weights[False][name], atol=1e-5) for name, tensor in weights[True].items()
    )
