"""Attention of the blocks: norms, the rotary embedding and the processor."""

import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import loud_student
from train_distillation import WanLiteStudent
from wanlite import network
from wanlite.network import (
    TEXT_MULTIPLES,
    OneFrameAttnProcessor,
    OneFrameBlock,
    RMSNorm,
    TextTokens,
    pack_text,
    pad_length,
    rotate,
    use_cudnn_self_attention,
)
from wanlite.runtime.devices import capability_of, prefers_cudnn_attention, use_deterministic_kernels

SMALL = dict(hidden_size=32, depth=2, num_heads=2, text_dim=48)


def watch_norms(network):
    """Return a list to which each norm of queries or keys appends (input dtype, output dtype)."""
    seen = []
    for name, norm in network.named_modules():
        if name.endswith(("norm_q", "norm_k")):
            norm.register_forward_hook(
                lambda module, given, found: seen.append((given[0].dtype, found.dtype))
            )
    return seen


def test_under_autocast_norms_of_queries_and_keys_stay_in_bfloat16():
    student = WanLiteStudent(hidden_size=32, depth=2, num_heads=2, text_dim=48)
    seen, latents, text = watch_norms(student), torch.randn(2, 16, 8, 8), torch.randn(2, 5, 48)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # torch warns about a weight in another dtype and uses an unfused kernel
        student(latents, torch.tensor([9.0, 1.0]), text)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 8


def test_under_autocast_on_cuda_norms_of_queries_and_keys_stay_in_bfloat16():
    """Meta tensors need no GPU: CUDA's list of float32 operations is longer than the CPU's."""
    with torch.device("meta"):
        block = OneFrameBlock(32, 64, 2, "rms_norm_across_heads", True, 1e-6).requires_grad_(False)
    seen = watch_norms(block)
    with FakeTensorMode(allow_non_fake_inputs=True):  # its weights are on meta
        block.to_empty(device="cuda")
        states, text = (torch.empty(2, length, 32, device="cuda", dtype=torch.bfloat16) for length in (16, 5))
        rotary = torch.empty(1, 16, 1, 16, device="cuda"), torch.empty(1, 16, 1, 16, device="cuda")
        try:
            torch.set_autocast_enabled("cuda", True)  # torch.autocast is disabled without a GPU
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            with Attended() as attended:
                block(states, text, torch.empty(2, 6, 32, device="cuda"), rotary)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 4
    assert attended.dtypes == [(torch.bfloat16,) * 3] * 2


def test_a_norm_works_on_devices_without_autocast():
    assert RMSNorm(8, 1e-6).to("meta")(torch.empty(2, 8, device="meta")).shape == (2, 8)


class Attended(TorchFunctionMode):
    """Lists the dtypes of queries, keys and values before autocast casts them."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            tensors = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))
            self.dtypes.append(tuple(tensor.dtype for tensor in tensors[:3]))
        return function(*args, **kwargs)


def rotary_of(dtype=torch.float32):
    return tuple(
        table.to(dtype) for table in WanRotaryPosEmbed(16, (1, 2, 2), 64)(torch.empty(1, 1, 1, 8, 8))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_attention_processor_agrees_with_that_of_diffusers(dtype):
    block = OneFrameBlock(32, 64, 2, "rms_norm_across_heads", True, 1e-6).to(dtype)
    states, rotary = torch.randn(2, 16, 32).to(dtype), rotary_of(torch.promote_types(dtype, torch.float32))
    found = block.attn1(states, None, None, rotary)
    block.attn1.set_processor(WanAttnProcessor())
    torch.testing.assert_close(found, block.attn1(states, None, None, rotary))
    assert found.dtype == dtype


class Listed(TorchDispatchMode):
    """Lists the names and result dtypes of elementwise products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mul:
            self.dtypes.append(found.dtype)
        return found


def test_the_rotary_embedding_is_one_complex_product():
    rotary = rotary_of()
    with Listed() as products:
        found = rotate(torch.randn(2, 16, 2, 16, dtype=torch.bfloat16), rotary)
    assert products.dtypes == [torch.complex64] and found.dtype == torch.bfloat16


def test_the_compiled_rotary_embedding_has_no_complex_numbers():
    dtypes = []

    def backend(module, inputs):
        found = [node.meta.get("example_value") for node in module.graph.nodes]
        dtypes.extend(tensor.dtype for tensor in found if isinstance(tensor, torch.Tensor))
        return module.forward

    states = torch.randn(2, 16, 2, 16)
    found = torch.compile(rotate, backend=backend)(states, rotary_of())
    assert dtypes and not any(dtype.is_complex for dtype in dtypes)
    torch.testing.assert_close(found, rotate(states, rotary_of()))


def test_backends_and_adapters_reach_the_attention_processor():
    student = WanLiteStudent(**SMALL)
    with attention_backend("native"):  # setting a backend also changes that of all other networks
        student.set_attention_backend("_native_math")
    assert {each._attention_backend for each in student.attn_processors.values()} == {"_native_math"}
    assert all(type(each) is OneFrameAttnProcessor for each in student.attn_processors.values())


def test_text_is_padded_to_a_multiple_without_a_change_of_the_velocity():
    student, text = loud_student(**SMALL), pack_text([torch.randn(length, 48) for length in (3, 7)])
    latents, timestep = torch.randn(2, 16, 8, 8), torch.tensor([900.0, 100.0])
    padded = TextTokens(*pad_length(*text, 16))
    assert padded.tokens.shape == (2, 16, 48) and padded.logit_bias.shape == (2, 16)
    assert pad_length(*padded, 16)[0] is padded.tokens
    expected, found = (student(latents, timestep, each).sample for each in (text, padded))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_networks_text_has_the_multiple_of_its_device(monkeypatch):
    student, lengths = loud_student(**SMALL), []
    student.blocks[0].attn2.register_forward_pre_hook(lambda module, given: lengths.append(given[1].shape[1]))
    text = pack_text([torch.randn(5, 48)])
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(network, "TEXT_MULTIPLES", {"cpu": TEXT_MULTIPLES.get(device, 1)})
        student(torch.randn(1, 16, 8, 8), torch.tensor([9.0]), text)
    assert lengths == [6, 16]


@pytest.mark.parametrize(
    "capability, is_deterministic, expected",
    [((9, 0), False, True), ((9, 0), True, False), ((8, 0), False, False), ((10, 0), False, False)],
)
def test_cudnn_attention_is_for_hopper(capability, is_deterministic, expected, monkeypatch):
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: is_deterministic)
    assert prefers_cudnn_attention(capability) is expected
    assert capability_of("cpu") is None and not prefers_cudnn_attention(None)


def test_only_self_attention_in_half_precision_uses_cudnn(monkeypatch):
    backends = []

    def attend(*tensors, backend, **options):
        backends.append(backend and AttentionBackendName(backend))
        return dispatch_attention_fn(*tensors, **options)

    monkeypatch.setattr(network, "dispatch_attention_fn", attend)
    student = WanLiteStudent(**SMALL | {"depth": 1})
    use_cudnn_self_attention(student)
    for is_half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            student(torch.randn(1, 16, 8, 8), torch.tensor([9.0]), torch.randn(1, 5, 48))
    assert backends == [AttentionBackendName._NATIVE_CUDNN, None, None, None]


def test_norms_of_the_cpu_are_torchs_and_so_are_their_gradients():
    generator = torch.Generator().manual_seed(0)
    states, weight, gradient = (
        torch.randn(shape, generator=generator) for shape in ((3, 5, 32), (32,), (3, 5, 32))
    )
    norm, found, expected = RMSNorm(32, 1e-6), states.clone(), states.clone()
    norm.weight.data.copy_(weight)
    stock_weight = weight.clone().requires_grad_()
    norm(found.requires_grad_()).backward(gradient)
    torch.nn.functional.rms_norm(expected.requires_grad_(), (32,), stock_weight, 1e-6).backward(gradient)
    assert torch.allclose(found.grad, expected.grad, atol=1e-5)
    assert torch.allclose(norm.weight.grad, stock_weight.grad, atol=1e-5)
    assert torch.allclose(norm(states), torch.nn.functional.rms_norm(states, (32,), weight, 1e-6), atol=1e-6)


def test_deterministic_kernels_are_used_on_request():
    before = torch.utils.deterministic.fill_uninitialized_memory
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
