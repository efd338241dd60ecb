"""A saved student's folder -> its checked config and weights; everything is refused here, before a model is built.

Never reads outside the folder, never reaches the network, never opens a pickle.
"""

import json
import math
import os
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_model.safetensors")  # the first that is there is read
CLASS_NAMES = ("WanLiteStudent", "WanTransformer3DModel")


def student_folder(path, subfolder=None):
    """Return the absolute folder of a saved student; `subfolder` may not lead out of `path`."""
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip():
        raise OSError(f"{path!r} names no folder. Expected the folder of a saved student, as ./outputs/wan_t2i.")
    root = Path(path).expanduser().absolute()
    folder = root / subfolder if subfolder else root
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"subfolder {subfolder!r} leads out of {root}. Name a folder inside it.")
    if not folder.exists():
        raise OSError(f"{folder}: no such folder. Expected a saved student, as train_distillation.py writes it.")
    if not folder.is_dir():
        raise OSError(f"{folder}: not a folder. Expected the folder that holds {CONFIG_NAME}, not a file in it.")
    return folder


def read_config(folder):
    """Return the config of a saved student as a dict."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise OSError(f"{folder}: no {CONFIG_NAME}. Expected a saved student; found {_listing(folder)}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise OSError(f"{path}: not JSON ({error}). Copy the folder again or save the student again.") from None
    if not isinstance(config, dict):
        raise OSError(f"{path}: holds a {type(config).__name__}, expected an object with the student's settings.")
    if config.get("_class_name", CLASS_NAMES[0]) not in CLASS_NAMES:
        raise ValueError(f"{path}: is the config of a {config['_class_name']}, expected {' or '.join(CLASS_NAMES)}.")
    return config


def student_arguments(config, accepted):
    """Turn a config under our names, the Wan names, or both into the arguments in `accepted`; contradictions are errors."""
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    if "teacher_checkpoint_path" in config:
        warnings.warn("config.json names a teacher_checkpoint_path; it is ignored: loading never projects.", stacklevel=3)
    implied = {"depth": config.get("num_layers"), "num_heads": config.get("num_attention_heads"),
               "num_channels": config.get("in_channels")}
    if "num_attention_heads" in config and "attention_head_dim" in config:
        implied["hidden_size"] = config["num_attention_heads"] * config["attention_head_dim"]
    for ours, value in implied.items():
        if value is not None and config.setdefault(ours, value) != value:
            raise ValueError(f"the config says {ours} {config[ours]}, but its Wan names say {value}. Keep one of them.")
    return {name: value for name, value in config.items() if name in accepted}


def check_shape(patch_size, eps, **sizes):
    """Refuse a shape that no student can have, naming the setting."""
    check_sizes(sizes)
    check_sizes({f"patch_size[{axis}]": size for axis, size in enumerate(patch_size)})
    if len(patch_size) != 3 or patch_size[0] != 1:
        raise ValueError(f"patch_size is {tuple(patch_size)}, expected (1, height, width): the student draws single frames.")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ValueError(f"eps is {eps!r}, expected a small positive number, as 1e-6.")
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise ValueError(f"hidden_size {hidden_size} over {num_heads} heads is {hidden_size / num_heads:g} channels a head, "
                         "expected an even whole number, as rotary pairs need: choose another --num_heads.")


def check_sizes(sizes):
    """Refuse what is no size of a layer: a dict of name -> size."""
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= 65536:
            raise ValueError(f"{name} is {size!r}, expected a whole number from 1 to 65536.")


def find_weights(folder, variant=None):
    """Return the path of the weights inside a saved student's folder."""
    if variant is not None and not variant.isidentifier():
        raise ValueError(f"variant {variant!r} is no part of a file name. Expected a word such as fp16 or bf16.")
    names = [name if variant is None else name.replace(".safetensors", f".{variant}.safetensors") for name in WEIGHT_NAMES]
    for name in names:
        if (folder / name).exists():
            return _checked_file(folder, folder / name)
    raise OSError(f"Error no file named diffusion_pytorch_model.bin found in directory {folder}, nor any of "
                  f"{', '.join(names)}, which are expected; found {_listing(folder)}. Pickles are never opened.")


def check_size(path, config):
    """Refuse a config of far more weights than the file holds, before a model of that size is built."""
    held = sum(math.prod(shape) for shape, _ in _read_header(path).values())
    implied = 8 * config.get("hidden_size", 0) ** 2 * config.get("depth", 0)   # the attention matrices alone
    if implied > held:
        raise ValueError(f"{path}: holds {held:,} weights, but {CONFIG_NAME} implies at least {implied:,}. "
                         "Config and weights are of two students: copy both from one save.")


def check_weights(path, expected):
    """Compare the header of a weights file with `expected`, a dict of name -> shape, before any tensor is read."""
    found = _read_header(path)
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{path}: keys differ from what {CONFIG_NAME} implies. Missing: {_some(missing)}; unknown: "
                         f"{_some(unknown)}. The file belongs to another model or was renamed.")
    for name, (shape, dtype) in found.items():
        if shape != tuple(expected[name]):
            raise ValueError(f"{path}: {name} is {shape}, but {CONFIG_NAME} implies {tuple(expected[name])}. "
                             "Config and weights are of two students: copy both from one save.")
        if dtype not in ("F32", "F16", "BF16"):
            raise ValueError(f"{path}: {name} is stored as {dtype}, expected F32, F16 or BF16.")


def _read_header(path):
    try:
        with safe_open(path, "pt") as file:
            return {name: (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype())
                    for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: not a whole safetensors file ({error}). Copy it again or save the student again.") from None


def _checked_file(folder, path):
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise OSError(f"{path}: a link that leads out of the folder, to {target}. Put the file itself there.")
    if not target.is_file():
        raise OSError(f"{path}: not a regular file. Expected safetensors weights.")
    with open(target, "rb") as file:
        beginning = file.read(64)
    if beginning.startswith(b"version https://git-lfs"):
        raise OSError(f"{path}: a git-lfs pointer, not the weights. Run `git lfs pull` in that folder.")
    if beginning.lstrip()[:1] == b"<":
        raise OSError(f"{path}: a web page, not the weights. Download the file again.")
    return target


def _listing(folder):
    return _some(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def _some(names, most=6):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
