"""Pixels <-> latents: the fast path is the stock autoencoder, and scenes survive the round trip."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.conftest import TINY_TEACHER, change, refuse_pickle
from wanlite.data.autoencoder import (
    decode_latents,
    encode_images,
    load_autoencoder,
    to_images,
    to_pixels,
    use_single_frame_path,
)
from wanlite.world import shapes


@pytest.fixture(scope="module")
def scenes():
    return shapes.scenes(3, 200) + shapes.scenes(3, 100, held_out=True)


@pytest.fixture(scope="module")
def images(scenes):
    random = np.random.default_rng(0)
    return np.stack([shapes.draw(scene, random) for scene in scenes])


@pytest.mark.parametrize("config", [None, dict(base_dim=8, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)])
@torch.no_grad()
def test_single_frame_path_equals_the_stock_autoencoder(config):
    torch.manual_seed(0)
    stock = AutoencoderKLWan(**config) if config else AutoencoderKLWan.from_pretrained(TINY_TEACHER / "vae")
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


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_an_autoencoder_that_cannot_be_loaded_is_one_line_with_its_folder(name, tmp_path):
    shutil.copytree(TINY_TEACHER / "vae", tmp_path / "vae")
    (tmp_path / "vae" / name).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(OSError, match="vae: cannot be loaded .*again") as refused:
        load_autoencoder(tmp_path)
    assert "\n" not in str(refused.value)
