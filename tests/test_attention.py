"""Attention of the blocks: norms, the rotary embedding and the processor."""

import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from train_distillation import WanLiteStudent
from wanlite.network import OneFrameAttnProcessor, OneFrameBlock, RMSNorm, rotate

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
