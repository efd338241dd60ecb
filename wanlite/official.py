"""An official Wan folder's pickled parts -> diffusers' parts, converted once; no torch until something is converted.

    Wan2.1_VAE.pth, Wan2.2_VAE.pth            vae/            AutoencoderKLWan
    models_t5_umt5-xxl-enc-bf16.pth           text_encoder/   UMT5EncoderModel
    google/umt5-xxl/                          tokenizer/

Sizes are read off the tensors. A pickle is opened for tensors alone, mapped, and no code in it runs.
Facts: Wan-Video/Wan2.2, wan/modules/vae2_1.py, vae2_2.py and t5.py.
"""

import json
import re
import shutil
from pathlib import Path

from .whole_files import new_folder, why_broken

AUTOENCODERS = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
TEXT_ENCODER = "models_t5_*.pth"
TOKENIZER = Path("google") / "umt5-xxl"
PARTS = ("tokenizer", "text_encoder", "vae")             # diffusers' names of them

# Official name -> diffusers' name, one after the other.
_AUTOENCODER_NAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."), (r"\.conv1\.(?=weight|bias)", ".conv_in."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."), (r"\.head\.2\.", ".conv_out."),
    (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.(?=resample|time_conv)", r".down_blocks.\1.downsampler."),
    (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.(?=resample|time_conv)", r".up_blocks.\1.upsampler."),
    (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.downsamples\.(\d+)\.", r".down_blocks.\1."),
    (r"\.residual\.0\.", ".norm1."), (r"\.residual\.2\.", ".conv1."), (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."), (r"\.shortcut\.", ".conv_shortcut."))]
_TEXT_ENCODER_NAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^token_embedding\.", "shared."), (r"^norm\.", "encoder.final_layer_norm."), (r"^blocks\.", "encoder.block."),
    (r"\.norm1\.", ".layer.0.layer_norm."), (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.attn\.([qkvo])\.", r".layer.0.SelfAttention.\1."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."), (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."))]
_STATISTICS_48 = {                                           # of Wan2.2's autoencoder; diffusers' defaults are Wan2.1's
    "latents_mean": [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
                     0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
                     -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
                     -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
    "latents_std": [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885,
                    0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415,
                    0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089,
                    0.7468, 0.7744]}


def find_parts(folder):
    """Return {part: where it lies}, a folder in diffusers' layout or what convert_parts() makes one of.

    Raises OSError that names all that is missing.
    """
    folder, found = Path(folder), {}
    for part, places in {"tokenizer": [folder / TOKENIZER], "text_encoder": sorted(folder.glob(TEXT_ENCODER)),
                         "vae": [folder / name for name in AUTOENCODERS]}.items():
        place = next((place for place in (folder / part, *places) if place.exists()), None)
        if place is not None:
            found[part] = place
    if missing := [f"{part} ({expected})" for part, expected in
                   {"tokenizer": f"tokenizer/ or {TOKENIZER}/", "text_encoder": f"text_encoder/ or {TEXT_ENCODER}",
                    "vae": f"vae/ or {' or '.join(AUTOENCODERS)}"}.items() if part not in found]:
        raise OSError(f"{folder}: lacks {', '.join(missing)}, which training and inference need. Download the folder again, or "
                      "put them there from another layout of the same model.")
    return found


def is_converted(found, part):
    """Whether a part that find_parts() found is in diffusers' layout as it lies there."""
    return found[part].name == part


def convert_parts(found, folder, say=print):
    """Make vae/, text_encoder/ and tokenizer/ of diffusers' layout in `folder` of what find_parts() found, where they are not yet.

    Raises OSError for a pickle that is not whole and ValueError for one of another model.
    """
    for part in PARTS:
        place = Path(folder) / part
        if why_broken(place) is None:
            continue
        with new_folder(place) as partial:
            if found[part].is_dir():
                shutil.copytree(found[part], partial, dirs_exist_ok=True)
                continue
            say(f"converting {found[part]}")
            convert = _convert_autoencoder if part == "vae" else _convert_text_encoder
            convert(read_pickle(found[part]), found[part]).save_pretrained(partial)


def autoencoder_config(place):
    """Return the config of an autoencoder that find_parts() found, whose weights are not read."""
    if place.is_dir():
        return json.loads((place / "config.json").read_text(encoding="utf-8"))
    return _autoencoder_config({name: tuple(tensor.shape) for name, tensor in read_pickle(place).items()})


def token_pixels(folder):
    """Return how many pixels wide a token of a Wan folder's teacher is: 16, or 32 with Wan2.2's own autoencoder; no weight is read.

    Raises ValueError where vae/config.json does not say it.
    """
    config = Path(folder) / "vae" / "config.json"
    if not config.is_file():
        return 32 if [name for name in AUTOENCODERS if (Path(folder) / name).is_file()] == [AUTOENCODERS[1]] else 16
    try:
        stride = json.loads(config.read_text(encoding="utf-8")).get("scale_factor_spatial", 8)
    except (ValueError, AttributeError):
        stride = None
    if type(stride) is not int or stride < 1:
        raise ValueError(f"{config}: does not say the autoencoder's stride. Download the folder again.")
    return 2 * stride


def num_bytes(place):
    """Return how large the weights of a part are on disk."""
    return place.stat().st_size if place.is_file() else sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def read_pickle(path):
    """Return the tensors of a .pth file by name, mapped; nothing else in it is made."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise OSError(f"{path}: cannot be read as tensors ({str(error).splitlines()[0]}). Download it again.") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds something other than tensors by name. Download it again.")
    return content


# ---- the autoencoder -------------------------------------------------------------------------------------------------------

def _convert_autoencoder(tensors, path):
    from diffusers import AutoencoderKLWan

    try:
        config = _autoencoder_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except (LookupError, ZeroDivisionError):
        raise ValueError(f"{path}: is no Wan autoencoder: tensors that each has are missing. Download it again.") from None
    if config["z_dim"] not in (16, 48):
        raise ValueError(f"{path}: has {config['z_dim']} latent channels, expected Wan2.1's 16 or Wan2.2's 48, whose "
                         "statistics are known. Put a vae/ of diffusers' layout beside it.")
    if not config["is_residual"]:
        tensors = {_place_in_level(name, config["num_res_blocks"] + 2): tensor for name, tensor in tensors.items()}
    return _fill(AutoencoderKLWan, config, _rename(tensors, _AUTOENCODER_NAMES), path)


def _autoencoder_config(shapes):
    """Return AutoencoderKLWan's config of official tensors, whose shapes and names tell all of it but the statistics."""
    is_residual = any(".downsamples.0.downsamples." in name for name in shapes)
    width, channels, decoder_width = shapes["encoder.conv1.weight"][:2] + shapes["decoder.head.0.gamma"][:1]
    samplers = [name.removesuffix("resample.1.weight") for name in shapes
                if name.startswith("encoder.") and name.endswith("resample.1.weight")]
    samplers.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    convolutions = [name for name in shapes if re.match(r"encoder\.downsamples\.[\d.a-z]*residual\.6\.weight", name)]
    convolutions.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)[:-1]])
    levels = len(samplers) + 1
    blocks, latents = len(convolutions) // levels, shapes["conv2.weight"][0]
    patch = round((channels / 3) ** 0.5)
    statistics = {48: _STATISTICS_48}.get(latents, {})
    return {"base_dim": width, "decoder_base_dim": decoder_width, "z_dim": latents, "num_res_blocks": blocks, "attn_scales": [],
            "dim_mult": [shapes[name][0] // width for name in convolutions[blocks - 1::blocks]], "dropout": 0.0,
            "temperal_downsample": [f"{name}time_conv.weight" in shapes for name in samplers], "is_residual": is_residual,
            "in_channels": channels, "out_channels": channels, "patch_size": patch if patch > 1 else None,
            "scale_factor_spatial": patch * 2 ** (levels - 1),
            "scale_factor_temporal": 2 ** sum(f"{name}time_conv.weight" in shapes for name in samplers)} | statistics


def _place_in_level(name, modules):
    """Return a 2.1 decoder's name with its level: `modules` of them, the last of a level the upsampler, are counted through."""
    def place(match):
        level, index = divmod(int(match[1]), modules)
        return f"decoder.up_blocks.{level}.{'upsamplers.0' if index == modules - 1 else f'resnets.{index}'}."
    return re.sub(r"^decoder\.upsamples\.(\d+)\.", place, name)


# ---- the text encoder ------------------------------------------------------------------------------------------------------

def _convert_text_encoder(tensors, path):
    from transformers import UMT5Config, UMT5EncoderModel

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        (words, width), (neurons, _) = shapes["token_embedding.weight"], shapes["blocks.0.ffn.fc1.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        config = UMT5Config(
            vocab_size=words, d_model=width, d_ff=neurons, num_heads=heads, d_kv=shapes["blocks.0.attn.q.weight"][0] // heads,
            num_layers=sum(name.endswith("attn.q.weight") for name in shapes), relative_attention_num_buckets=buckets,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, dtype=str(tensors["norm.weight"].dtype).removeprefix("torch."))
    except LookupError as error:
        raise ValueError(f"{path}: is no UMT5 encoder: it lacks {error}. Download it again.") from None
    renamed = _rename(tensors, _TEXT_ENCODER_NAMES)
    renamed["encoder.embed_tokens.weight"] = renamed["shared.weight"]
    return _fill(UMT5EncoderModel, config, renamed, path)


# ---- both ------------------------------------------------------------------------------------------------------------------

def _rename(tensors, names):
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    return renamed


def _fill(network_class, config, tensors, path):
    """Return a network of exactly these tensors, which take no memory before they are read."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = network_class(**config) if isinstance(config, dict) else network_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name)):
        raise ValueError(f"{path}: {len(wrong)} tensors are not as its sizes imply, first {wrong[0]}: found {held.get(wrong[0])}, "
                         f"expected {expected.get(wrong[0])}. Download it again.")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network
