"""Pixels <-> latents: a single frame equals the stock autoencoder's, and scenes survive the round trip."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import TINY_TEACHER, change, refuse_pickle
from tests.test_official import AUTOENCODERS
from wanlite.data.autoencoder import (
    decode_latents,
    encode_images,
    load_autoencoder,
    to_images,
    to_pixels,
    use_single_frame_path,
)
from wanlite.data.single_frame import SingleFrameAutoencoder
from wanlite.planning.simulation import MemoryMeter
from wanlite.world import shapes


@pytest.fixture(scope="module")
def scenes():
    return shapes.scenes(3, 200) + shapes.scenes(3, 100, held_out=True)


@pytest.fixture(scope="module")
def images(scenes):
    random = np.random.default_rng(0)
    return np.stack([shapes.draw(scene, random) for scene in scenes])


FORMS = {
    "tiny": AutoencoderKLWan.load_config(TINY_TEACHER / "vae"),
    "Wan2.1": {},
    "Wan2.2": AUTOENCODERS["Wan2.2_VAE.pth"],
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_single_frame_equals_that_of_the_stock_autoencoder(form):
    torch.manual_seed(0)
    stock = AutoencoderKLWan.from_config(FORMS[form])
    for name, weight in stock.named_parameters():  # new norms are ones, new biases of attention small
        weight.add_(torch.randn_like(weight), alpha=0.1 * ("gamma" in name))
    ours = SingleFrameAutoencoder(stock)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    raw_latents = stock.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
    assert (ours.encode(pixels) - raw_latents).abs().max() < 5e-6
    raw_latents = torch.randn_like(raw_latents)
    decoded = stock.decode(raw_latents.unsqueeze(2)).sample.squeeze(2)
    assert decoded.std() > 0.01 and (ours.decode(raw_latents) - decoded).abs().max() < 5e-6
    assert (ours.to(torch.bfloat16).decode(raw_latents) - decoded).abs().mean() < 0.01


@torch.no_grad()
def test_decoding_takes_at_most_a_third_of_the_memory_of_the_stock_autoencoder():
    def peak_of(make, decode):
        latents = torch.empty(1, 16, 32, 32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            autoencoder = make(AutoencoderKLWan(base_dim=8)).requires_grad_(False)
            with MemoryMeter() as meter:
                decode(autoencoder, latents)
            return meter.peak_bytes

    stock = peak_of(lambda stock: stock, lambda stock, latents: stock.decode(latents.unsqueeze(2)))
    assert peak_of(SingleFrameAutoencoder, SingleFrameAutoencoder.decode) < stock / 3


@torch.no_grad()
def test_the_form_that_trains_an_autoencoder_equals_the_stock_autoencoder():
    torch.manual_seed(0)
    stock = AutoencoderKLWan.from_pretrained(TINY_TEACHER / "vae")
    pixels = torch.rand(2, 3, 1, 64, 64) * 2 - 1
    raw_latents = stock.encode(pixels).latent_dist.mode()
    decoded = stock.decode(raw_latents).sample
    use_single_frame_path(stock)
    assert torch.allclose(stock.encode(pixels).latent_dist.mode(), raw_latents, atol=1e-4)
    assert torch.allclose(stock.decode(raw_latents).sample, decoded, atol=1e-4)


@torch.no_grad()
def test_several_frames_take_the_stock_path():
    torch.manual_seed(0)
    config = dict(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    stock = AutoencoderKLWan(**config)
    pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    raw_latents = stock.encode(pixels).latent_dist.mode()
    assert torch.allclose(
        use_single_frame_path(stock).encode(pixels).latent_dist.mode(), raw_latents, atol=1e-4
    )


@torch.no_grad()
def test_scenes_survive_the_round_trip(scenes, images):
    autoencoder = load_autoencoder(TINY_TEACHER)
    seen = np.concatenate(
        [
            to_images(decode_latents(autoencoder, encode_images(autoencoder, to_pixels(part))))
            for part in np.array_split(images, 6)
        ]
    )
    assert np.mean([shapes.read_image(image) == scene for image, scene in zip(seen, scenes)]) >= 0.98


@torch.no_grad()
def test_latents_are_normalised_per_channel(images):
    latents = encode_images(load_autoencoder(TINY_TEACHER), to_pixels(images[:200]))
    assert latents.mean((0, 2, 3)).abs().max() < 0.25 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.25


def test_images_and_pixels_convert_back_and_forth(images):
    assert np.array_equal(to_images(to_pixels(images[:4])), images[:4])


def test_a_pickle_in_place_of_the_autoencoder_is_never_opened(tmp_path, monkeypatch):
    shutil.copytree(TINY_TEACHER / "vae", tmp_path / "vae")
    refuse_pickle(
        tmp_path / "vae",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
        load_autoencoder,
        monkeypatch,
    )


def drop_first_level(tensors):
    for name in [name for name in tensors if name.startswith("decoder.up_blocks.0.")]:
        del tensors[name]


@pytest.mark.parametrize(
    "how, words",
    [
        (drop_first_level, "lacks decoder.up_blocks.0"),
        (lambda tensors: tensors.update({"quant.bias": torch.zeros(3)}), "holds unknown quant.bias"),
        (
            lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(3)}),
            "holds in another shape quant_conv.bias",
        ),
        (
            lambda tensors: tensors["quant_conv.bias"].fill_(float("inf")),
            "quant_conv.bias holds NaN or infinity",
        ),
    ],
)
def test_an_autoencoder_with_missing_foreign_or_infinite_weights_is_refused_by_name(how, words, tmp_path):
    shutil.copytree(TINY_TEACHER / "vae", tmp_path / "vae")
    change(tmp_path / "vae", how)
    with pytest.raises(ValueError, match=f"vae: .*{words}"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("name", ["scale_factor_spatial", "scale_factor_temporal"])
def test_a_stride_that_the_layers_do_not_imply_is_refused(name, tmp_path):
    shutil.copytree(TINY_TEACHER / "vae", tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 16}))
    with pytest.raises(OSError, match=f"vae/config.json: {name} is 16, expected"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_an_autoencoder_that_cannot_be_loaded_is_one_line_with_its_folder(name, tmp_path):
    shutil.copytree(TINY_TEACHER / "vae", tmp_path / "vae")
    (tmp_path / "vae" / name).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(OSError, match="vae: cannot be loaded .*again") as refused:
        load_autoencoder(tmp_path)
    assert "\n" not in str(refused.value)
