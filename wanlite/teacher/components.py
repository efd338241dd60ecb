"""The components of an official or a ComfyUI folder -> diffusers' components, converted once; no torch until something
is converted.

    official                          ComfyUI, in these folders of models/ or all in one        diffusers
    Wan2.1_VAE.pth, Wan2.2_VAE.pth    vae/wan_2.1_vae.safetensors, wan2.2_vae.safetensors       vae/          AutoencoderKLWan
    models_t5_umt5-xxl-enc-bf16.pth   text_encoders/umt5_xxl_fp16.safetensors, fp8 as well      text_encoder/ UMT5EncoderModel
    google/umt5-xxl/                  in the text encoder, as the tensor spiece_model           tokenizer/

Sizes are read off the tensors. A pickle is opened for tensors alone, mapped, and no code in it runs. A
ComfyUI file is known by its tensors, whatever its name; only of an autoencoder it has to say wan, for Qwen's
has the same tensors. Facts: Wan-Video/Wan2.2, wan/modules/vae2_1.py, vae2_2.py and t5.py; ComfyUI,
comfy/text_encoders/wan.py and comfy/sd.py.
"""

import math
import re
import shutil
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from ..files.atomic import (
    broken_download,
    broken_safetensors,
    find_corruption,
    first_bytes,
    new_folder,
    open_regular,
    read_downloaded_json,
    unwrapped,
    visible,
    weights_by_depth,
    what_came_instead,
    why_not_read,
)

AUTOENCODERS = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
TEXT_ENCODER = "models_t5_*.pth"
TOKENIZER = Path("google") / "umt5-xxl"
COMPONENTS = ("tokenizer", "text_encoder", "vae")  # diffusers' names of them
STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model"}  # of their weights' names
TIED = {"shared.weight", "encoder.embed_tokens.weight"}
SINGLE_FILES = (
    "",
    "diffusion_models",
    "unet",
    "text_encoders",
    "clip",
    "vae",
)  # where ComfyUI's lie, in one folder or models/
SPIECE = "spiece_model"  # of its text encoder: sentencepiece's own file, as bytes
FP8_SCALES = ("scale_weight", "weight_scale")  # value = X.weight * X.scale
FP8_MARKS = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")  # not weights's value
EXPECTED = {
    "tokenizer": f"tokenizer/, {TOKENIZER}/ or {SPIECE} in ComfyUI's text encoder",
    "text_encoder": f"text_encoder/, {TEXT_ENCODER} or ComfyUI's umt5_xxl_*.safetensors",
    "vae": f"vae/, {' or '.join(AUTOENCODERS)}, or ComfyUI's wan*vae.safetensors",
}
FOUND_BY = {
    "text_encoder": re.compile("(?i)t5|text"),
    "vae": re.compile("(?i)vae"),
}  # files in formats that are not read
PATCH = 2  # latents across a token, in every Wan

# Official name -> diffusers' name, one after the other.
_AUTOENCODER_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"\.conv1\.(?=weight|bias)", ".conv_in."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (
            r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.(?=resample|time_conv)",
            r".down_blocks.\1.downsampler.",
        ),
        (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.(?=resample|time_conv)", r".up_blocks.\1.upsampler."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
        (r"\.downsamples\.(\d+)\.", r".down_blocks.\1."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )
]
_TEXT_ENCODER_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.", "encoder.block."),
        (r"\.norm1\.", ".layer.0.layer_norm."),
        (r"\.norm2\.", ".layer.1.layer_norm."),
        (r"\.attn\.([qkvo])\.", r".layer.0.SelfAttention.\1."),
        (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
        (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
        (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
        (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
    )
]
_STATISTICS_48 = {  # of Wan2.2's autoencoder; diffusers' defaults are Wan2.1's
    "latents_mean": [
        -0.2289,
        -0.0052,
        -0.1323,
        -0.2339,
        -0.2799,
        0.0174,
        0.1838,
        0.1557,
        -0.1382,
        0.0542,
        0.2813,
        0.0891,
        0.1570,
        -0.0098,
        0.0375,
        -0.1825,
        -0.2246,
        -0.1207,
        -0.0698,
        0.5109,
        0.2665,
        -0.2108,
        -0.2158,
        0.2502,
        -0.2055,
        -0.0322,
        0.1109,
        0.1567,
        -0.0729,
        0.0899,
        -0.2799,
        -0.1230,
        -0.0313,
        -0.1649,
        0.0117,
        0.0723,
        -0.2839,
        -0.2083,
        -0.0520,
        0.3748,
        0.0152,
        0.1957,
        0.1433,
        -0.2944,
        0.3573,
        -0.0548,
        -0.1681,
        -0.0667,
    ],
    "latents_std": [
        0.4765,
        1.0364,
        0.4514,
        1.1677,
        0.5313,
        0.4990,
        0.4818,
        0.5013,
        0.8158,
        1.0344,
        0.5894,
        1.0901,
        0.6885,
        0.6165,
        0.8454,
        0.4978,
        0.5759,
        0.3523,
        0.7135,
        0.6804,
        0.5833,
        1.4146,
        0.8986,
        0.5659,
        0.7069,
        0.5338,
        0.4889,
        0.4917,
        0.4069,
        0.4999,
        0.6866,
        0.4093,
        0.5709,
        0.6065,
        0.6415,
        0.4944,
        0.5726,
        1.2042,
        0.5458,
        1.6887,
        0.3971,
        1.0600,
        0.3943,
        0.5537,
        0.5444,
        0.4089,
        0.7468,
        0.7744,
    ],
}


def find_components(folder):
    """Return {component: where it lies}, a folder in diffusers' layout or what convert_components() makes one of.

    Raises OSError that names all that is missing and ValueError where several files could be meant.
    """
    folder, found, others = Path(folder), {}, {}
    for component, places in {
        "tokenizer": [folder / TOKENIZER],
        "text_encoder": visible(folder.glob(TEXT_ENCODER)),
        "vae": [folder / name for name in AUTOENCODERS],
    }.items():
        is_own = (
            folder / component / ("config.json" if component == "vae" else "")
        ).exists()  # ComfyUI's vae/ is full of other files
        place = folder / component if is_own else next((place for place in places if place.exists()), None)
        if place is not None:
            found[component] = place
    if lacking := [component for component in COMPONENTS if component not in found]:
        single, others = _single_components(folder, lacking)
        found |= single
    if missing := [
        f"{component} ({EXPECTED[component]}{others.get(component, '')})"
        for component in COMPONENTS
        if component not in found
    ]:
        raise OSError(
            f"{folder}: lacks {', '.join(missing)}, which training and inference need. Download the folder "
            f"again, or "
            "put them there from another layout of the same model."
        )
    return found


def is_converted(found, component):
    """Whether a component that find_components() found is in diffusers' layout as it lies there."""
    return found[component].name == component


def convert_components(found, folder, say=print):
    """Make vae/, text_encoder/ and tokenizer/ of diffusers' layout in `folder` of what find_components() found,
    where they are not yet.

    Raises OSError for a file that is not whole and ValueError for one of another model.
    """
    convert = {
        "tokenizer": _convert_tokenizer,
        "text_encoder": _convert_text_encoder,
        "vae": _convert_autoencoder,
    }
    for component in COMPONENTS:
        place = Path(folder) / component
        if find_corruption(place, sizes_only=True) is None:  # all of it would be read at every start of a run
            continue
        with new_folder(place) as partial:
            if found[component].is_dir():
                shutil.copytree(
                    found[component], partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*")
                )
                continue
            say(f"converting {found[component]} into {component}/")
            convert[component](found[component]).save_pretrained(partial)


def check_components(found, teacher):
    """Refuse components that find_components() found and that are not whole, or not those of a teacher of this config.

    Headers are held against configs, no tensor is read. A pickled text encoder is not opened for it: that
    takes long.
    """
    place, channels = found["vae"], autoencoder_config(found["vae"]).get("z_dim", 16)
    if channels != teacher["in_channels"]:
        raise ValueError(
            f"{place}: has {channels} latent channels, the teacher's experts {teacher['in_channels']}. Put "
            f"the "
            "autoencoder of the same model there: TI2V-5B has Wan2.2's with 48, every other Wan has Wan2.1's "
            "with 16."
        )
    place = found["text_encoder"]
    if place.suffix != ".pth":
        config = (
            read_downloaded_json(place / "config.json")
            if place.is_dir()
            else {"model_type": "umt5", "d_model": _recognise(place)[1]}
        )
        if (config.get("model_type"), config.get("d_model")) != ("umt5", teacher["text_dim"]):
            raise ValueError(
                f"{place}: is a {config.get('model_type')} of width {config.get('d_model')}, the teacher's "
                f"experts "
                f"expect a umt5 of width {teacher['text_dim']}. Put the text encoder of the same model there."
            )
    for component in COMPONENTS:
        if found[component].is_dir():
            _check_tokenizer(found[component]) if component == "tokenizer" else _check_weights(
                component, found[component]
            )
        elif found[component].suffix == ".pth":
            open_regular(found[component]).close()
            if not is_zipfile(found[component]):  # its table of contents is its end
                raise broken_download(found[component], "not a whole file of torch.save()")


def _check_tokenizer(folder):
    """Refuse a tokenizer that has no words, or whose JSON cannot be read."""
    words = [path for path in (folder / "tokenizer.json", *visible(folder.glob("*.model"))) if path.exists()]
    if not words:
        raise OSError(f"{folder}: lacks tokenizer.json, and spiece.model as well. Download the folder again.")
    for path in (path for path in (words[0], folder / "tokenizer_config.json") if path.exists()):
        if path.suffix == ".json":
            if "model" not in read_downloaded_json(path) and path.name == "tokenizer.json":
                raise OSError(f"{path}: has no model, which holds a tokenizer's words. Download it again.")
        elif what_came_instead(first_bytes(path)):
            raise broken_download(path, "no sentencepiece model")


def _check_weights(component, folder):
    """Refuse a component in diffusers' layout whose files are not whole, or hold other tensors than its
    config.json implies.
    """
    config, held = read_downloaded_json(folder / "config.json"), {}
    for path in _files_of(component, folder):
        held |= {name: shape for name, (_, shape) in _header(path).items()}
    for name in (
        "num_layers",
        "num_res_blocks",
    ):  # networks are made of them, and those of millions take hours
        if isinstance(config.get(name), int) and config[name] > len(held):
            raise ValueError(
                f"{folder / 'config.json'}: {name} is {config[name]!r:.60}, expected no more than the "
                f"{len(held)} "
                "tensors beside it. Download it again."
            )
    if component == "vae":
        _check_statistics(config, folder / "config.json")
    expected = _implied_shapes(component, config, folder / "config.json")
    if TIED & held.keys():  # one tensor, of which files hold either or both
        expected, held = (
            {name: shape for name, shape in shapes.items() if name not in TIED} for shapes in (expected, held)
        )
    _check_shapes(folder, expected, held)


def _check_statistics(config, path):
    """Refuse statistics of latents that are not one number a channel; where there are none, diffusers has
    Wan2.1's.
    """
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0)):
        values, channels = config.get(name, [1.0] * 16), config.get("z_dim", 16)
        is_list = isinstance(values, list) and all(
            type(value) in (int, float) and least < value < math.inf for value in values
        )
        if not is_list or len(values) != channels:
            raise ValueError(
                f"{path}: {name} is {values!r:.60}, expected {channels} finite "
                f"numbers{'' if least else ' above 0'}, "
                "one a latent channel. Download it again."
            )


def _files_of(component, folder):
    """Return the safetensors files that a component's loader reads; an index is taken where there is no single
    file.
    """
    single = folder / f"{STEMS[component]}.safetensors"
    index = folder / f"{single.name}.index.json"
    if single.exists() or not index.exists():
        if not single.exists():
            others = [
                path.name
                for path in visible(folder.iterdir())
                if path.suffix == ".safetensors" or why_not_read(path)
            ]
            raise OSError(
                f"{folder}: lacks {single.name}; found {', '.join(others) or 'no weights'}. Download it; one "
                f"in another "
                "precision, as *.fp16.safetensors, will do under this name."
            )
        return [single]
    shards = read_downloaded_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(f"{index}: has no weight_map of tensors and files beside it. Download it again.")
    shards = [folder / name for name in sorted(set(shards.values()))]
    if missing := [path.name for path in shards if not path.exists()]:
        raise OSError(
            f"{folder}: shard {missing[0]} is missing, {index.name} promises it ({len(missing)} of "
            f"{len(shards)} are "
            "missing). Download it again."
        )
    return shards


def _implied_shapes(component, config, path):
    """Return {name: shape} of the network that a config of diffusers' layout describes."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    make = {
        "vae": AutoencoderKLWan.from_config,
        "text_encoder": lambda config: UMT5EncoderModel(UMT5Config.from_dict(config)),
    }
    try:
        with init_empty_weights():
            return {
                name: tuple(tensor.shape) for name, tensor in make[component](config).state_dict().items()
            }
    except Exception as error:
        raise ValueError(
            f"{path}: describes no {component} of a Wan ({' '.join(str(error).split())}). Download it again."
        ) from None


def autoencoder_config(place):
    """Return the config of an autoencoder that find_components() found, whose weights are not read."""
    if place.is_dir():
        return read_downloaded_json(place / "config.json")
    if place.suffix == ".pth":
        return _autoencoder_config(
            {name: tuple(tensor.shape) for name, tensor in read_pickle(place).items()}, place
        )
    return _autoencoder_config(_shapes(place), place)


def pixels_per_token(place, read_config=autoencoder_config):
    """Return how many pixels across a token of the autoencoder in `place` has, by which sizes of images divide.

    16, also where `place` is None, or 32 with Wan2.2's autoencoder. Raises ValueError where its config does
    not have it.
    """
    if place is None:
        return PATCH * 8
    if place.suffix == ".pth":  # opened only once torch is there
        return PATCH * (16 if place.name == AUTOENCODERS[1] else 8)
    stride = read_config(place).get("scale_factor_spatial", 8)
    if type(stride) is not int or stride < 1:
        raise ValueError(f"{place}: does not say the autoencoder's stride. Download the folder again.")
    return PATCH * stride


def has_two_experts(folder):
    """Whether the teacher in a folder of official or ComfyUI's layout has two experts."""
    return (Path(folder) / "high_noise_model").is_dir() or len(_single_files(Path(folder))["expert"]) > 1


def num_bytes(place):
    """Return how large the weights of a component are in diffusers' layout."""
    if place.is_dir():
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    if place.suffix == ".pth":
        return place.stat().st_size
    return sum(math.prod(shape) * (4 if dtype == "F32" else 2) for dtype, shape in _header(place).values())


# ---- ComfyUI's single files --------------------------------------------------------------------------------


def _single_components(folder, lacking):
    """Return {component: file} of what is lacking and ComfyUI's files hold, and {component: which others lie there, in
    words}.
    """
    files, found, others = _single_files(folder), {}, {}
    channels = set(files["expert"].values())
    fitting = {
        "text_encoder": list(files["text_encoder"]),
        "vae": [path for path, latents in files["vae"].items() if not channels or latents in channels],
    }
    for component in (component for component in lacking if component in fitting):
        if len(fitting[component]) > 1:
            raise ValueError(
                f"{folder}: {' and '.join(path.name for path in fitting[component])} could each be its {component}, "
                f"expected "
                "one, in one precision. Put the files of one teacher into a folder of their own (links will "
                "do) and "
                "name that."
            )
        if fitting[component]:
            (found[component],) = fitting[component]
    if (
        "tokenizer" in lacking
        and len(fitting["text_encoder"]) == 1
        and SPIECE in _header(fitting["text_encoder"][0])
    ):
        (found["tokenizer"],) = fitting["text_encoder"]
    for component, kind, what in (("text_encoder", "t5", "a T5"), ("vae", "vae", "another Wan's")):
        others[component] = "".join(
            f"; {path.name} is {what}" for path in files[kind] if path not in found.values()
        )
        others[component] += _not_read(folder, component)
    return found, others


def _not_read(folder, component):
    """Return in words which files of a component lie in a folder where or as they are not read."""
    paths = [
        path
        for place in SINGLE_FILES
        if (folder / place).is_dir()
        for path in visible((folder / place).iterdir())
        if FOUND_BY[component].search(path.name) and path.is_file()
    ]
    misplaced = [
        path
        for path in paths
        if path.parent != folder and (path.name in AUTOENCODERS or path.match(TEXT_ENCODER))
    ]
    said = [f"; {path.name} lies in {path.parent.name}/, expected in {folder}" for path in misplaced]
    said += [
        f"; found {path.name}: {reason[0]}"
        for path in paths
        if path not in misplaced and (reason := why_not_read(path))
    ]
    return "".join(said[:3])


def _single_files(folder):
    """Return {what it is: {file: its width or latent channels}} of ComfyUI's files, whatever their names and
    where they lie.

    Of a kind, those that lie deepest are taken only where there are no others.
    """
    found = {"expert": {}, "text_encoder": {}, "t5": {}, "vae": {}}
    for paths in weights_by_depth(folder, SINGLE_FILES):
        recognised = [(path, *_recognise(path)) for path in paths]
        for kind in [kind for kind, files in found.items() if not files]:
            found[kind] |= {path: width for path, its_kind, width in recognised if its_kind == kind}
        if found["expert"] and found["text_encoder"] and found["vae"]:
            break
    return found


def _recognise(path):
    """Return what a safetensors file is by its tensors, and its width or latent channels; (None, None) for
    anything else.
    """
    shapes = _shapes(path)
    texts = _rename(shapes, _TEXT_ENCODER_NAMES)
    if "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in texts and "shared.weight" in texts:
        each_has_positions = (
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in texts
        )  # UMT5, unlike T5
        return "text_encoder" if each_has_positions else "t5", texts["shared.weight"][-1]
    if {"decoder.middle.0.residual.0.gamma", "conv2.weight"} <= shapes.keys() and re.search(
        "(?i)wan", path.name
    ):
        return "vae", shapes["conv2.weight"][0]
    entry, rows = (
        shapes.get("patch_embedding.weight", ()),
        shapes.get("head.head.weight", shapes.get("proj_out.weight", (0,)))[0],
    )
    return ("expert", entry[1]) if len(entry) == 5 and rows == math.prod(entry[1:]) else (None, None)


def _shapes(path):
    """Return {name: shape} of a safetensors file, without a wrapper's words in the names."""
    header = _header(path)
    return {name: header[stored][1] for stored, name in unwrapped(header, path).items()}


def _header(path):
    """Return {tensor: (dtype, shape)} of a safetensors file; raises OSError for half a one."""
    open_regular(path).close()  # safetensors waits for a pipe, and calls what it may not read missing
    try:
        with safe_open(path, "np") as file:
            stored = {name: file.get_slice(name) for name in file.keys()}
            return {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in stored.items()}
    except SafetensorError as error:
        raise broken_safetensors(path, error) from None


def _read_weights(path, half):
    """Return a component's weights by name; of a safetensors file those in float16, or in float8 times their
    scale, come in `half`.
    """
    if path.suffix == ".pth":
        return read_pickle(path)
    with safe_open(path, "pt") as file:
        kinds = {name: name.rpartition(".") for name in file.keys()}
        scales = {
            f"{layer}.weight": file.get_tensor(name)
            for name, (layer, _, kind) in kinds.items()
            if kind in FP8_SCALES
        }
        names = [name for name, (*_, kind) in kinds.items() if kind not in (*FP8_SCALES, *FP8_MARKS, SPIECE)]
        if lost := sorted(scales.keys() - set(names)):
            raise ValueError(f"{path}: there is a scale of {lost[0]} but no such weight. Download it again.")
        bare = unwrapped(names, path)
        return {
            bare[name]: _in_half(file.get_tensor(name), scales.get(name), half, f"{path}: {name}")
            for name in names
        }


def _in_half(tensor, scale, half, what):
    import torch

    if not tensor.is_floating_point():
        raise ValueError(
            f"{what} is stored as {tensor.dtype}, expected floats. Choose a file in fp16, bf16 or scaled fp8."
        )
    if scale is not None:
        if scale.numel() not in (1, len(tensor)) or not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f"{what} has a scale of {tuple(scale.shape)} with {scale.min().item()}, expected finite "
                f"numbers above "
                "0, one or one a row. Download it again."
            )
        return (tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))).to(half)
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.to(half)


def read_pickle(path):
    """Return the tensors of a .pth file by name, mapped; nothing else in it is made."""
    import torch

    open_regular(path).close()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise broken_download(path, f"cannot be read as tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ValueError(f"{path}: holds something other than tensors by name. Download it again.")
    return {name: content[stored] for stored, name in unwrapped(content, path).items()}


# ---- the autoencoder ---------------------------------------------------------------------------------------


def _convert_autoencoder(path):
    import torch
    from diffusers import AutoencoderKLWan

    tensors = _read_weights(path, torch.float16)
    config = _autoencoder_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    if config["z_dim"] not in (16, 48):
        raise ValueError(
            f"{path}: has {config['z_dim']} latent channels, expected Wan2.1's 16 or Wan2.2's 48, whose "
            "statistics are known. Put a vae/ of diffusers' layout beside it."
        )
    if not config["is_residual"]:
        tensors = {
            _place_in_level(name, config["num_res_blocks"] + 2): tensor for name, tensor in tensors.items()
        }
    return _fill(AutoencoderKLWan, config, _rename(tensors, _AUTOENCODER_NAMES), path)


def _autoencoder_config(shapes, path):
    """Return AutoencoderKLWan's config of official tensors, whose shapes and names tell all of it but the
    statistics.
    """
    try:
        return _sizes_of(shapes)
    except (LookupError, ZeroDivisionError):
        raise ValueError(
            f"{path}: is no Wan autoencoder: tensors that each has are missing. Download it again."
        ) from None


def _sizes_of(shapes):
    is_residual = any(".downsamples.0.downsamples." in name for name in shapes)
    width, channels, decoder_width = shapes["encoder.conv1.weight"][:2] + shapes["decoder.head.0.gamma"][:1]
    samplers = [
        name.removesuffix("resample.1.weight")
        for name in shapes
        if name.startswith("encoder.") and name.endswith("resample.1.weight")
    ]
    samplers.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    convolutions = [
        name for name in shapes if re.match(r"encoder\.downsamples\.[\d.a-z]*residual\.6\.weight", name)
    ]
    convolutions.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)[:-1]])
    levels = len(samplers) + 1
    blocks, latents = len(convolutions) // levels, shapes["conv2.weight"][0]
    patch = round((channels / 3) ** 0.5)
    statistics = {48: _STATISTICS_48}.get(latents, {})
    return {
        "base_dim": width,
        "decoder_base_dim": decoder_width,
        "z_dim": latents,
        "num_res_blocks": blocks,
        "attn_scales": [],
        "dim_mult": [shapes[name][0] // width for name in convolutions[blocks - 1 :: blocks]],
        "dropout": 0.0,
        "temperal_downsample": [f"{name}time_conv.weight" in shapes for name in samplers],
        "is_residual": is_residual,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": patch * 2 ** (levels - 1),
        "scale_factor_temporal": 2 ** sum(f"{name}time_conv.weight" in shapes for name in samplers),
    } | statistics


def _place_in_level(name, modules):
    """Return a 2.1 decoder's name with its level: `modules` of them, the last of a level the upsampler, are
    counted through.
    """

    def place(match):
        level, index = divmod(int(match[1]), modules)
        return f"decoder.up_blocks.{level}.{'upsamplers.0' if index == modules - 1 else f'resnets.{index}'}."

    return re.sub(r"^decoder\.upsamples\.(\d+)\.", place, name)


# ---- the text encoder and its tokenizer --------------------------------------------------------------------


def _convert_text_encoder(path):
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    tensors = _rename(
        _read_weights(path, torch.bfloat16), _TEXT_ENCODER_NAMES
    )  # as Wan's own is; float16 overflows in it
    shapes, attention = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        "encoder.block.0.layer.0.SelfAttention",
    )
    try:
        (words, width), (neurons, _) = (
            shapes["shared.weight"],
            shapes["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"],
        )
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        config = UMT5Config(
            vocab_size=words,
            d_model=width,
            d_ff=neurons,
            num_heads=heads,
            d_kv=shapes[f"{attention}.q.weight"][0] // heads,
            num_layers=sum(name.endswith("SelfAttention.q.weight") for name in shapes),
            relative_attention_num_buckets=buckets,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            dtype=str(tensors["shared.weight"].dtype).removeprefix("torch."),
        )
    except LookupError as error:
        raise ValueError(f"{path}: is no UMT5 encoder: it lacks {error}. Download it again.") from None
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    return _fill(UMT5EncoderModel, config, tensors, path)


def _convert_tokenizer(path):
    """Return the tokenizer that a text encoder's file carries, of which sentencepiece itself makes the same
    words.
    """
    from transformers import T5TokenizerFast
    from transformers.convert_slow_tokenizer import import_protobuf

    with safe_open(path, "np") as file:
        content = file.get_tensor(SPIECE).tobytes()
    try:
        model = import_protobuf().ModelProto.FromString(content)
    except Exception as error:
        raise ValueError(
            f"{path}: {SPIECE} is no sentencepiece model ({error}). Download it again, or put a tokenizer/ "
            f"of "
            "diffusers' layout beside it."
        ) from None
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise ValueError(
            f"{path}: {SPIECE} begins with {[piece for piece, _ in pieces[:3]]}, expected <pad>, </s> and "
            f"<unk>, as "
            "UMT5's does. Put a tokenizer/ of diffusers' layout beside it."
        )
    return T5TokenizerFast(
        vocab=pieces,
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap or None,
        extra_ids=0,
    )


# ---- both --------------------------------------------------------------------------------------------------


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
    _check_shapes(
        path,
        {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )
    network.load_state_dict(tensors, strict=True, assign=True)
    return network


def _check_shapes(path, expected, held):
    if wrong := sorted(
        name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name)
    ):
        raise ValueError(
            f"{path}: {len(wrong)} tensors are not as its sizes imply, first {wrong[0]}: found "
            f"{held.get(wrong[0], 'none')}, expected {expected.get(wrong[0], 'none')}. Download it again."
        )
