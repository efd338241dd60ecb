"""Muon in batched products gives torch's own weights and state."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train_distillation import Settings, WanLiteStudent
from wanlite.training import muon
from wanlite.training.muon import StackedMuon
from wanlite.training.optimizers import make_optimizers

SHAPES = [(48, 48), (48, 16), (16, 48), (48, 48), (7, 5), (16, 48)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def assert_equal_updates(found, expected):
    """The error of bfloat16 is allowed: batched products may sum in another order, which depends on the CPU."""
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def train(optimizer, weights, num_steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_batched_updates_equal_those_of_torch(options):
    found, expected = matrices(), matrices()
    train(StackedMuon(found, lr=0.02, **options), found)
    train(torch.optim.Muon(expected, lr=0.02, **options), expected)
    assert_equal_updates(found, expected)


def test_large_matrices_are_stacked_in_parts_with_equal_results(monkeypatch):
    found, expected = matrices(), matrices()
    train(StackedMuon(expected, lr=0.02), expected)
    monkeypatch.setattr(muon, "MAX_STACKED", 48 * 48)
    assert len(list(muon.stack_numbers(found))) == 5
    train(StackedMuon(found, lr=0.02), found)
    assert_equal_updates(found, expected)


def test_a_checkpoint_of_torchs_muon_is_continued():
    found, expected = matrices(), matrices()
    first = torch.optim.Muon([{"params": expected, "role": "blocks"}], lr=0.02)
    train(first, expected)
    for weight, other in zip(found, expected):
        weight.data.copy_(other)
    second = StackedMuon([{"params": found, "role": "blocks"}], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state_dict().keys() == first.state_dict().keys()
    assert second.param_groups[0].keys() == first.param_groups[0].keys()
    for optimizer, weights in ((first, expected), (second, found)):
        train(optimizer, weights)
    assert_equal_updates(found, expected)


def test_a_weight_without_a_gradient_stays():
    weights = matrices()
    before = weights[0].detach().clone()
    weights[1].grad = torch.ones_like(weights[1])
    StackedMuon(weights, lr=0.02).step()
    assert torch.equal(weights[0], before)


class Products(TorchDispatchMode):
    """Counts calls of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm")
        return function(*args, **(kwargs or {}))


def test_the_products_of_a_step_do_not_grow_with_the_depth_of_a_student():
    counts = set()
    for depth in (1, 3):
        student = WanLiteStudent(hidden_size=32, depth=depth, num_heads=2, text_dim=48)
        _, optimizer = make_optimizers(Settings(max_train_steps=10), student)
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.randn_like(weight)
        with Products() as products:
            optimizer.step()
        counts.add(products.count)
    assert counts == {3 * 5 * 3}  # shapes, iterations, products of an iteration
