"""Wan's autoencoders: the official network's shapes -> AutoencoderKLWan's config and the converted network.

Facts: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py. No torch until something is converted.
"""

import math
import re
from pathlib import Path
from typing import Any

from ..files.file_names import CONFIG
from ..files.json_files import DOWNLOADED, read_json
from .component_weights import fill, read_pickle, read_weights, shapes_of
from .headers import Shape, read_shapes
from .keys import rename
from .names import AUTOENCODER_NAMES

_MEAN_48 = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891
    0.1570 -0.0098 0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502
    -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723
    -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667
"""
_STD_48 = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
    0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
    0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
    0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""
_STATISTICS = {  # by latent channels: those of Wan2.2's autoencoder; diffusers' defaults are Wan2.1's
    48: {
        "latents_mean": [float(value) for value in _MEAN_48.split()],
        "latents_std": [float(value) for value in _STD_48.split()],
    }
}
LATENT_CHANNELS = (16, 48)  # Wan2.1's and Wan2.2's


def autoencoder_config(place: Path) -> dict[str, Any]:
    """Return the config of the autoencoder at `place`, a folder or a file, without reading its weights."""
    if place.is_dir():
        return read_json(place / CONFIG, DOWNLOADED)
    if place.suffix == ".pth":
        return _config_of(shapes_of(read_pickle(place)), place)
    return _config_of(read_shapes(place), place)


def check_statistics(config: dict[str, Any], path: Path) -> None:
    """Refuse statistics that are not one finite number for each latent channel; diffusers' defaults are Wan2.1's."""
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0)):
        values, channels = config.get(name, [1.0] * 16), config.get("z_dim", 16)
        is_list = isinstance(values, list) and all(
            type(value) in (int, float) and least < value < math.inf for value in values
        )
        if not is_list or len(values) != channels:
            raise ValueError(
                f"{path}: {name} is {values!r:.60}, expected {channels} finite "
                f"numbers{'' if least else ' above 0'}, one for each latent channel. Download it again."
            )


def check_strides(config: dict[str, Any], path: Path) -> None:
    """Refuse scale factors that differ from those of the network that the config describes."""
    multiples, downsampled = (
        config.get("dim_mult", [1, 2, 4, 4]),
        config.get("temperal_downsample", [0, 1, 1]),
    )
    patch = config.get("patch_size") or 1
    if not isinstance(multiples, list) or not isinstance(downsampled, list) or type(patch) is not int:
        raise ValueError(
            f"{path}: does not describe a Wan's vae (dim_mult, temperal_downsample or patch_size). Download it again."
        )
    spatial = patch * 2 ** (len(multiples) - 1)
    temporal = 2 ** sum(map(bool, downsampled))
    for name, default, expected in (
        ("scale_factor_spatial", 8, spatial),
        ("scale_factor_temporal", 4, temporal),
    ):
        if (found := config.get(name, default)) != expected:
            raise ValueError(
                f"{path}: {name} is {found!r:.60}, expected {expected}, which its layers imply. Download it again."
            )


def convert_autoencoder(path: Path) -> Any:
    """Return an AutoencoderKLWan with the weights of an official or a ComfyUI file."""
    import torch
    from diffusers import AutoencoderKLWan

    tensors = read_weights(path, torch.float16)
    config = _config_of(shapes_of(tensors), path)
    if config["z_dim"] not in LATENT_CHANNELS:
        raise ValueError(
            f"{path}: has {config['z_dim']} latent channels, expected Wan2.1's 16 or Wan2.2's 48, whose "
            "statistics are known. Put a vae/ of diffusers' layout beside it."
        )
    if not config["is_residual"]:
        num_modules = config["num_res_blocks"] + 2
        tensors = {_place_in_level(name, num_modules): tensor for name, tensor in tensors.items()}
    return fill(AutoencoderKLWan, config, rename(tensors, AUTOENCODER_NAMES), path)


def _config_of(shapes: dict[str, Shape], path: Path) -> dict[str, Any]:
    """Return AutoencoderKLWan's config: all but the statistics follow from the official names and shapes."""
    try:
        return _sizes_of(shapes) | _STATISTICS.get(shapes["conv2.weight"][0], {})
    except (LookupError, ValueError, ZeroDivisionError):
        raise ValueError(
            f"{path}: lacks tensors that every Wan autoencoder has, or their sizes. Download it again."
        ) from None


def _sizes_of(shapes: dict[str, Shape]) -> dict[str, Any]:
    width, channels = shapes["encoder.conv1.weight"][:2]
    samplers, convolutions = _find_samplers(shapes), _find_last_convolutions(shapes)
    num_levels = len(samplers) + 1
    num_blocks = len(convolutions) // num_levels
    is_downsampled = [f"{name}time_conv.weight" in shapes for name in samplers]  # in time
    patch = round((channels / 3) ** 0.5)
    return {
        "base_dim": width,
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "z_dim": shapes["conv2.weight"][0],
        "num_res_blocks": num_blocks,
        "attn_scales": [],
        "dim_mult": [shapes[name][0] // width for name in convolutions[num_blocks - 1 :: num_blocks]],
        "dropout": 0.0,
        "temperal_downsample": is_downsampled,
        "is_residual": any(".downsamples.0.downsamples." in name for name in shapes),
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": patch * 2 ** (num_levels - 1),
        "scale_factor_temporal": 2 ** sum(is_downsampled),
    }


def _find_samplers(shapes: dict[str, Shape]) -> list[str]:
    """Return the prefixes of the encoder's downsamplers in order."""
    end = "resample.1.weight"
    names = [name.removesuffix(end) for name in shapes if name.startswith("encoder.") and name.endswith(end)]
    return sorted(names, key=_numbers)


def _find_last_convolutions(shapes: dict[str, Shape]) -> list[str]:
    """Return the names of the last convolution of each of the encoder's residual blocks in order."""
    pattern = re.compile(r"encoder\.downsamples\.[\d.a-z]*residual\.6\.weight")
    return sorted(filter(pattern.match, shapes), key=lambda name: _numbers(name)[:-1])


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _place_in_level(name: str, num_modules: int) -> str:
    """Return a 2.1 decoder's name with its level.

    Official names count through all levels; each has `num_modules`, and the last of a level is the upsampler.
    """

    def place(match: re.Match[str]) -> str:
        level, index = divmod(int(match[1]), num_modules)
        module = "upsamplers.0" if index == num_modules - 1 else f"resnets.{index}"
        return f"decoder.up_blocks.{level}.{module}."

    return re.sub(r"^decoder\.upsamples\.(\d+)\.", place, name)
