"""WanLiteStudent: its output, its arguments, and loading."""

import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel

from tests.conftest import loud_student
from train_distillation import WanLiteStudent
from wanlite.network import PatchEmbedding, one_frame_velocity, pack_text, unpack_text

SMALL = dict(
    hidden_size=32, depth=2, num_heads=2, ffn_dim=64, num_channels=4, text_dim=8, rope_max_seq_len=32
)


@pytest.fixture(scope="module")
def student():
    return loud_student(**SMALL)


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    text = pack_text([torch.randn(length, 8) for length in (3, 7)])
    return torch.randn(2, 4, 8, 6), torch.tensor([999.0, 40.0]), text


@pytest.fixture
def saved(student, tmp_path):
    student.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_one_zero_token_with_a_bias_equals_padding_to_512(student, inputs):
    latents, timestep, text = inputs
    cheap = student(latents, timestep, text.tokens, text_logit_bias=text.logit_bias).sample
    padded = student(latents, timestep, unpack_text(text)).sample
    trimmed = student(latents, timestep, text.tokens[:, :-1]).sample
    assert torch.equal(cheap, student(latents, timestep, text).sample)
    assert (cheap - padded).abs().max() < 1e-5 < (cheap - trimmed).abs().max()


def test_patches_are_embedded_by_a_matrix_product_as_by_the_convolution():
    convolution = torch.nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 3))
    embedding, latents = PatchEmbedding(4, 6, (1, 2, 3), (1, 2, 3)), torch.randn(2, 4, 1, 8, 9)
    embedding.load_state_dict(convolution.state_dict())
    assert torch.equal(embedding(latents), convolution(latents))
    found = embedding.multiply(latents)
    torch.testing.assert_close(found, convolution(latents), atol=1e-5, rtol=0)
    tokens = found.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous() and found.shape == (2, 6, 1, 4, 3)


def test_saved_student_is_a_stock_wan_transformer(student, saved, inputs):
    latents, timestep, text = inputs
    stock = WanTransformer3DModel.from_pretrained(saved)
    assert stock.state_dict().keys() == student.state_dict().keys()
    velocity = stock(latents.unsqueeze(2), timestep, unpack_text(text)).sample
    assert torch.allclose(
        velocity, student(latents.unsqueeze(2), timestep, unpack_text(text)).sample, atol=1e-6
    )


def test_output_latents_have_the_rank_of_the_input(student, inputs):
    latents, timestep, text = inputs
    assert student(latents, timestep, text.tokens, return_dict=False)[0].shape == latents.shape
    assert student(latents.unsqueeze(2), timestep, text.tokens).sample.shape == latents.unsqueeze(2).shape
    with pytest.raises(ValueError, match="3 frames"):
        student(latents.unsqueeze(2).repeat(1, 1, 3, 1, 1), timestep, text.tokens)


def test_a_timestep_for_every_token_equals_one_for_the_image(student, inputs):
    latents, timestep, text = inputs
    assert torch.equal(
        student(latents, timestep[:, None].repeat(1, 12), text.tokens).sample,
        student(latents, timestep, text.tokens).sample,
    )
    with pytest.raises(ValueError, match="timesteps differ"):
        student(latents, timestep[:, None] * torch.linspace(0, 1, 12), text.tokens)


def test_features_are_the_hidden_states_after_the_named_blocks(student, inputs):
    latents, timestep, text = inputs
    velocity, features = student(latents, timestep, text.tokens, feature_blocks=(0, 1), return_dict=False)
    assert [state.shape for state in features] == [(2, 12, 32)] * 2
    assert torch.equal(velocity, one_frame_velocity(student, latents, timestep, text.tokens)[0])


def test_gradient_checkpointing_gives_the_same_gradient(inputs):
    latents, timestep, text = inputs
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        student = WanLiteStudent(**SMALL).train()
        torch.nn.init.normal_(student.proj_out.weight)
        if is_checkpointed:
            student.enable_gradient_checkpointing()
        student(latents, timestep, text.tokens).sample.square().sum().backward()
        gradients.append(student.blocks[0].attn1.to_q.weight.grad)
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, rtol=1e-5)


def test_diffusers_caches_recognise_a_block(inputs):
    cached, (latents, timestep, text) = loud_student(**SMALL), inputs
    with torch.no_grad():
        expected = cached(latents, timestep, text).sample
    cached.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with torch.no_grad(), cached.cache_context("drawing"):
        first = cached(latents, timestep, text).sample
        torch.nn.init.zeros_(
            cached.blocks[1].ffn.net[2].weight
        )  # of a block that is not called again for the same input
        assert torch.equal(first, expected) and torch.allclose(
            cached(latents, timestep, text).sample, first, atol=1e-6
        )


def test_a_config_dict_builds_the_same_student_as_keywords(student):
    public = {name: value for name, value in student.config.items() if not name.startswith("_")}
    for config in (SMALL, dict(student.config), WanLiteStudent(SMALL).config):
        assert public.items() <= dict(WanLiteStudent(config).config).items()
    again = WanLiteStudent.from_config(student.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items()
    }


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"num_heads": 3}, "num_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"depth": "4"}, "depth"),
        ({"num_heads": 32}, "rotary"),
        ({"ffn_dim": 10**7}, "ffn_dim"),
        ({"depth": True}, "depth"),
        ({"eps": "small"}, "eps"),
        ({"patch_size": (2, 2, 2)}, "patch_size"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        WanLiteStudent(**SMALL | changes)


# ---- loading -----------------------------------------------------------------------------------------------


def test_loading_gives_bitwise_the_saved_weights_in_eval_mode_without_meta_tensors(student, saved):
    before = torch.get_default_dtype()
    loaded = WanLiteStudent.from_pretrained(saved)
    assert all(
        torch.equal(tensor, student.state_dict()[name]) for name, tensor in loaded.state_dict().items()
    )
    assert not loaded.training and not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded.rope.freqs_cos, student.rope.freqs_cos) and torch.get_default_dtype() == before
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_either_file_name_is_read_and_the_first_wins(student, saved):
    (saved / "diffusion_pytorch_model.safetensors").rename(saved / "diffusion_model.safetensors")
    assert torch.equal(WanLiteStudent.from_pretrained(saved).proj_out.weight, student.proj_out.weight)
    other = WanLiteStudent(**SMALL)
    other.save_pretrained(saved)
    assert torch.equal(WanLiteStudent.from_pretrained(saved).proj_out.weight, other.proj_out.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_a_dtype_applies_except_to_the_float32_modules_of_wan(saved, dtype):
    loaded = WanLiteStudent.from_pretrained(saved, torch_dtype=dtype, device_map={"": "cpu"})
    assert loaded.proj_out.weight.dtype in (torch.bfloat16, torch.float16)
    assert loaded.scale_shift_table.dtype == loaded.blocks[0].norm2.weight.dtype == torch.float32


def test_a_weight_that_a_dtype_cannot_hold_is_refused(student, tmp_path):
    large = WanLiteStudent(student.config)
    torch.nn.init.constant_(large.proj_out.bias, 1e6)
    large.save_pretrained(tmp_path)
    assert (
        WanLiteStudent.from_pretrained(tmp_path, dtype="bfloat16").proj_out.bias[0]
        == torch.tensor(1e6).bfloat16()
    )
    with pytest.raises(ValueError, match="proj_out.bias holds NaN or infinity as torch.float16"):
        WanLiteStudent.from_pretrained(tmp_path, dtype="float16")


def test_loading_never_projects(saved, monkeypatch):
    config = json.loads((saved / "config.json").read_text())
    assert "teacher_checkpoint_path" not in config
    (saved / "config.json").write_text(json.dumps(config | {"teacher_checkpoint_path": "/no/such/teacher"}))
    with pytest.warns(UserWarning, match="never projects"):
        WanLiteStudent.from_pretrained(saved)
    with pytest.raises(TypeError, match="never projects"):
        WanLiteStudent.from_pretrained(saved, teacher_checkpoint_path="/no/such/teacher")


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"subfolder": "../.."}, ValueError),
        ({"variant": "../x"}, ValueError),
        ({"dtype": "int8"}, ValueError),
        ({"device": "gpu7"}, ValueError),
        ({"local_file_only": True}, TypeError),
    ],
)
def test_a_wrong_argument_is_refused(saved, arguments, error):
    with pytest.raises(error):
        WanLiteStudent.from_pretrained(saved, **arguments)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    student = WanLiteStudent(**SMALL)
    student.proj_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="proj_out.bias"):
        student.save_pretrained(tmp_path / "student")
    assert not (tmp_path / "student").exists()
