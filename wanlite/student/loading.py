"""A saved student's folder, or its name on the hub -> its checked config and opened weights; all faults are
refused here.

Nothing is built before config and weights are known to agree; nothing outside the folder is read; no pickle
is opened; the network is reached only for a name that cannot be a path here. No torch is imported: a wrong
folder is answered at once. Legend: D width, F width inside the feed-forward, T text width.
"""

import math
import os
import re
import time
import warnings
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from ..files.json_files import SAVED, parse_json, read_json, shown
from ..files.weights import WeightsFile
from ..teacher.keys import names_inside_wrapper

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHT_NAMES = (
    f"{WEIGHTS_STEM}.safetensors",
    "diffusion_model.safetensors",
)  # the first that is there is read, then an index
CLASS_NAMES = (
    "WanLiteStudent",
    "WanTransformer3DModel",
)  # of older saves; of ours and of those of stock diffusers
SAVING = ".saving-*"  # where a save lies until it is published
JUST_NOW = 0.2  # seconds in which the renames of a save are done
MAX_SAVES = 4  # under way at once, of which one may hold the config
MAX_SHARDS = 1000  # they are opened together
CONFIG = SAVED._replace(max_bytes=65536)  # a student's has 700
MAX_SIZE = 65536
MAX_POSITIONS = 16384  # rotary tables are built from the config alone, no weights stand for their size
OUR_NAMES = ("hidden_size", "depth", "num_heads", "num_channels")  # for what Wan's names say as well
STOCK_SETTINGS = {
    "out_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "image_dim",
    "added_kv_proj_dim",
    "pos_embed_seq_len",
}  # of a stock Wan, said in our words or of no use to us


# ---- where a student lies ----------------------------------------------------------------------------------


def student_folder(path, subfolder=None, **hub):
    """Return the absolute folder of a saved student; `hub` are arguments of huggingface_hub's
    snapshot_download.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip() or "\0" in str(path):
        raise OSError(
            f"{path!r} names no folder. Expected the folder of a saved student, as ./outputs/wan_t2i."
        )
    if "://" in str(path):
        raise OSError(
            f"{shown(str(path))}: is a URL. Expected a folder, or a name on the hub, as organisation/model."
        )
    if subfolder is not None and (not isinstance(subfolder, (str, os.PathLike)) or "\0" in str(subfolder)):
        raise ValueError(
            f"subfolder {_short(subfolder)} names no folder. Expected the name of one inside "
            f"{shown(str(path))}."
        )
    try:
        root = (
            _download(path, subfolder, **hub)
            if _is_hub_name(path)
            else Path(os.path.expanduser(path)).absolute()
        )
        folder = root / subfolder if subfolder else root
        root.exists()  # raises for a path too long, which resolve() would walk part by part
        if not folder.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"subfolder {subfolder!r} leads out of {root}. Name a folder inside it.")
        if not folder.exists():
            raise OSError(
                f"{shown(str(folder))}: no such folder. Expected a saved student, as train_distillation.py "
                f"writes it."
            )
    except (
        RuntimeError,
        OSError,
        UnicodeError,
    ) as error:  # a link that loops, no permission, a name too long or half a letter
        if isinstance(error, OSError) and error.errno is None:
            raise
        raise OSError(
            f"{shown(str(path))}: cannot be read ({getattr(error, 'strerror', error)}). Expected the folder "
            f"of a saved "
            "student."
        ) from None
    if not folder.is_dir():
        raise OSError(
            f"{folder}: not a folder. Expected the folder that holds {CONFIG_NAME}, not a file in it."
        )
    return folder


def _is_hub_name(path):
    """Only organisation/model can be a name on the hub, and only where no folder of the organisation's name
    is here.
    """
    return (
        isinstance(path, str)
        and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None
        and not Path(path).parent.exists()
    )


def _download(name, subfolder, **hub):
    """Fetch a student's files, and no others, into the hub's cache; returns the snapshot's folder."""
    from huggingface_hub import snapshot_download  # here: a local folder needs none of it
    from huggingface_hub.errors import HFValidationError

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    names = (
        CONFIG_NAME,
        f"{WEIGHTS_STEM}*.safetensors",
        "diffusion_model*.safetensors",
        f"{WEIGHTS_STEM}.safetensors.index*.json",
    )
    patterns = [f"{prefix}{place}{name}" for place in ("", "transformer/") for name in names] + [
        f"{prefix}model_index.json"
    ]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))  # nosec B615: the revision is the user's
    except (HFValidationError, OSError) as error:  # what the hub raises over HTTP is an OSError as well
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"{name}: no such folder here, and not to be had from the hub ({reason}). Expected a saved "
            f"student's "
            "folder, as ./outputs/wan_t2i, or a name on the hub that you may read."
        ) from None


# ---- config ------------------------------------------------------------------------------------------------


def read_config(folder):
    """Return the config of a saved student as a dict."""
    path = _checked_path(folder, CONFIG_NAME)
    if path is None:
        raise OSError(f"{folder}: no {CONFIG_NAME}. Expected a saved student; found {_listing(folder)}.")
    return _checked_config(read_json(path, CONFIG), path)


def _checked_config(config, path):
    found = config.get("_class_name", CLASS_NAMES[0])
    if found not in CLASS_NAMES:
        raise ValueError(f"{path}: is the config of a {_short(found)}, expected {' or '.join(CLASS_NAMES)}.")
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{path}: has a quantization_config, expected weights in float32, float16 or bfloat16. Quantise "
            f"the "
            "student after loading it."
        )
    return config


def student_arguments(config, defaults):
    """Turn a config under our names, the Wan names, or both into the student's arguments; contradictions are
    errors.

    `defaults` is {name: default} of every argument; what the config does not say is taken from there.
    """
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    if config.pop("teacher_checkpoint_path", None) is not None:
        warnings.warn(
            "config.json names a teacher_checkpoint_path; it is ignored: loading never projects.",
            stacklevel=3,
        )
    if ignored := sorted(config.keys() - defaults.keys() - STOCK_SETTINGS):
        warnings.warn(
            f"config.json has settings that no student has; they are ignored: {_some(ignored)}.", stacklevel=3
        )
    implied = [
        ("depth", config.get("num_layers")),
        ("num_heads", config.get("num_attention_heads")),
        ("num_channels", config.get("in_channels")),
        ("num_channels", config.get("out_channels")),
    ]
    if "num_attention_heads" in config and "attention_head_dim" in config:
        heads = {name: config[name] for name in ("num_attention_heads", "attention_head_dim")}
        check_sizes(heads)
        implied.append(("hidden_size", math.prod(heads.values())))
    for ours, value in implied:
        if value is not None and config.setdefault(ours, value) != value:
            raise ValueError(
                f"the config says {ours} {_short(config[ours])}, but its Wan names say {_short(value)}. Keep "
                f"one of "
                "them."
            )
    arguments = {name: config.get(name, default) for name, default in defaults.items()}
    check_sizes({"hidden_size": arguments["hidden_size"]})
    arguments["ffn_dim"] = (
        4 * arguments["hidden_size"] if arguments["ffn_dim"] is None else arguments["ffn_dim"]
    )
    check_shape(**arguments)
    return arguments


def check_shape(patch_size, eps, cross_attn_norm=True, qk_norm="rms_norm_across_heads", **sizes):
    """Refuse a shape that no student can have, naming the setting."""
    check_sizes(sizes)
    if not isinstance(patch_size, (tuple, list)) or len(patch_size) != 3 or patch_size[0] != 1:
        raise ValueError(
            f"patch_size is {_short(patch_size)}, expected (1, height, width): the student draws single "
            f"frames."
        )
    check_sizes({f"patch_size[{axis}]": size for axis, size in enumerate(patch_size)})
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"eps is {_short(eps)}, expected a small positive number, as 1e-6.")
    if type(cross_attn_norm) is not bool or qk_norm != "rms_norm_across_heads":
        raise ValueError(
            f"cross_attn_norm is {_short(cross_attn_norm)} and qk_norm {_short(qk_norm)}, expected true or "
            f"false "
            "and rms_norm_across_heads, as every Wan has it."
        )
    if sizes.get("rope_max_seq_len", 0) > MAX_POSITIONS:
        raise ValueError(
            f"rope_max_seq_len is {sizes['rope_max_seq_len']}, expected at most {MAX_POSITIONS}."
        )
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise ValueError(
            f"hidden_size {hidden_size} over {num_heads} heads is {hidden_size / num_heads:g} channels a "
            f"head, "
            "expected an even whole number, as rotary pairs need: choose another --num_heads."
        )
    if sizes.get("freq_dim", 0) % 2:
        raise ValueError(f"freq_dim is {sizes['freq_dim']}, expected an even number: sines and cosines.")


def check_sizes(sizes):
    """Refuse what is no size of a layer: a dict of name -> size."""
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= MAX_SIZE:
            raise ValueError(f"{name} is {_short(size)}, expected a whole number from 1 to {MAX_SIZE}.")


# ---- weights -----------------------------------------------------------------------------------------------


@contextmanager
def open_student(folder, variant=None):
    """Yield (config, [WeightsFile]) of one and the same save, whatever is saved there meanwhile.

    Weights carry the config that they were saved with. Where config.json is another, a save is under way, or
    was cut short after its weights were in place and before its config was: then that lies in the save's own
    folder.
    """
    folder, began = _student_part(folder), time.monotonic()
    while True:
        try:
            config, files, stack = _open_once(folder, variant)
            break
        except (OSError, ValueError):  # files were renamed just now: they may be of two saves
            if max(time.monotonic() - began, abs(time.time() - folder.stat().st_mtime)) > JUST_NOW:
                raise
            time.sleep(0.01)
    with stack:
        yield config, files


def _student_part(folder):
    """Return transformer/ of a pipeline that diffusers saved, and any other folder as it is."""
    part = folder / "transformer"
    if (
        (folder / CONFIG_NAME).exists()
        or not (folder / "model_index.json").is_file()
        or part.is_symlink()
        or not part.is_dir()
    ):
        return folder
    if (folder / "transformer_2").exists():
        raise ValueError(
            f"{folder}: holds a pipeline of two experts, expected a student. Train one with --teacher "
            f"{folder}."
        )
    return part


def _open_once(folder, variant):
    if not (folder / CONFIG_NAME).exists() and not any(folder.glob(SAVING)):
        read_config(folder)  # says that there is none, before anything is said of weights
    with ExitStack() as stack:
        files = []
        for path, promised in find_weights(folder, variant).items():
            files.append(stack.enter_context(WeightsFile(path)))
            if promised is not None and (other := sorted(promised ^ files[-1].entries.keys())):
                raise ValueError(
                    f"{path}: its index says otherwise of {_some(other)}. Copy index and shards from one "
                    f"save."
                )
        config = _matching_config(folder, {file.metadata.get("config") for file in files})
        return config, files, stack.pop_all()


def _matching_config(folder, told):
    """Return the config that belongs to the weights, which were `told` theirs when they were saved, or None."""
    if told == {None}:
        return read_config(folder)
    if len(told) > 1:
        raise ValueError(
            f"{folder}: its shards were saved with different configs. Copy all of them from one save."
        )
    saved = parse_json(told.pop().encode(errors="surrogatepass"), f"{folder}, config in the weights", CONFIG)
    reason = None
    for place in (folder, *sorted(folder.glob(SAVING))[:MAX_SAVES]):
        if place != folder and (place.is_symlink() or not (place / CONFIG_NAME).is_file()):
            continue
        config = read_config(place)
        differences = [
            f"{name} is {_short(config.get(name))}, was {_short(value)}"
            for name, value in saved.items()
            if name[:1] != "_" and config.get(name) != value
        ]
        if not differences:
            return config
        reason = reason or (
            f"{folder}: {CONFIG_NAME} is not the one that the weights were saved with "
            f"({_some(differences)}). "
            "Copy both from one save."
        )
    raise ValueError(reason)


def check_variant(variant):
    """Refuse what cannot be a part of the name of weights; None is none."""
    if variant is not None and not (
        isinstance(variant, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,32}", variant)
    ):
        raise ValueError(
            f"variant {variant!r} is no part of a file name. Expected a word such as fp16 or bf16."
        )


def find_weights(folder, variant=None):
    """Return {path: None} of a student's one file of weights, or {path: names of its tensors} of every shard
    in its index.
    """
    check_variant(variant)
    infix = "" if variant is None else f".{variant}"
    names = [name.replace(".safetensors", f"{infix}.safetensors") for name in WEIGHT_NAMES]
    index_name = f"{WEIGHTS_STEM}.safetensors.index{infix}.json"
    found = next((path for name in names if (path := _checked_path(folder, name))), None)
    index = _checked_path(folder, index_name)
    if found and not (index and _is_stocks_newer(folder, index, found)):
        return {found: None}
    if index:
        return {_shard(folder, name, index): promised for name, promised in _read_index(index)}
    raise OSError(
        f"Error no file named {WEIGHTS_STEM}.bin found in directory {folder}, nor any of {', '.join(names)} "
        f"and "
        f"{index_name}, which are expected; found {_listing(folder)}. Pickles are never "
        f"opened.{_variants(folder)}"
    )


def _is_stocks_newer(folder, index, weights):
    """Return whether stock diffusers saved shards beside an older file of weights, which it leaves there and
    reads no more.

    Its shards have no mark in their names, and a save of ours removes them before it ends.
    """
    try:
        shards = [name for name, _ in _read_index(index)]
    except OSError:  # a broken one leads to no shards
        return False
    is_stocks = all(
        re.fullmatch(rf"{WEIGHTS_STEM}(\.[\w-]+)?-\d{{5}}-of-\d{{5}}\.safetensors", name)
        and (folder / name).exists()
        for name in shards
    )
    if is_newer := is_stocks and not any(folder.glob(SAVING)):
        warnings.warn(
            f"{folder}: holds {weights.name} beside {len(shards)} shards; the shards are read, as stock "
            f"diffusers does. "
            f"Remove {weights.name} if it is older.",
            stacklevel=3,
        )
    return is_newer


def _variants(folder):
    """Return a hint where weights of a variant are there, else nothing."""
    pattern = re.compile(rf"{WEIGHTS_STEM}\.([\w-]+?)(-\d{{5}}-of-\d{{5}})?\.safetensors")
    found = sorted(
        {match[1] for path in islice(folder.iterdir(), 1000) if (match := pattern.fullmatch(path.name))}
    )
    return (
        f" Variants are there: name one of {_some(found)}, or rename it to {WEIGHTS_STEM}.safetensors."
        if found
        else ""
    )


def _read_index(path):
    """Return [(shard, names of its tensors)] as an index lists them, sorted."""
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise OSError(f"{path}: has no weight_map of tensor names to file names. Save the student again.")
    if (count := len(set(weight_map.values()))) > MAX_SHARDS:
        raise OSError(
            f"{path}: names {count:,} shards, expected at most {MAX_SHARDS:,}. Save the student again."
        )
    shards = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    return sorted(shards.items())


def _shard(folder, name, index):
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors", name):
        raise OSError(
            f"{index}: names a shard {_short(name)}, expected safetensors files beside it. Pickles are never "
            f"opened."
        )
    path = _checked_path(folder, name)
    if path is None:
        raise OSError(
            f"{index}: names a shard {name} that is not there. Copy the folder again; found "
            f"{_listing(folder)}."
        )
    return path


def check_weights(files, arguments):
    """Compare headers with what the student's arguments imply, name by name, before anything is built or
    read.
    """
    found = {name: entry.shape for file in files for name, entry in file.entries.items()}
    shapes, block_shapes = tensor_shapes(arguments)
    source, depth = (
        files[0].path if len(files) == 1 else f"{files[0].path.parent}, {len(files)} shards",
        arguments["depth"],
    )

    def expected(name):
        if match := re.fullmatch(r"blocks\.(0|[1-9]\d{0,5})\.(.+)", name):
            return block_shapes.get(match[2]) if int(match[1]) < depth else None
        return shapes.get(name)

    unknown = sorted(name for name in found if expected(name) is None)
    names = (
        *shapes,
        *(f"blocks.{block}.{name}" for block in range(min(depth, len(found) + 1)) for name in block_shapes),
    )
    missing = list(islice((name for name in names if name not in found), 7))
    if missing or unknown:
        inside, count = names_inside_wrapper(found) or {""}, len(shapes) + depth * len(block_shapes)
        reason = (
            "A wrapper's words in the keys are the only fault: save the model inside the wrapper"
            if len(inside) == count and all(map(expected, inside))
            else "The weights belong to another model or were renamed"
        )
        raise ValueError(
            f"{source}: keys differ from what {CONFIG_NAME} implies. Missing: {_some(missing)}; unknown: "
            f"{_some(unknown)}. {reason}."
        )
    for name, shape in found.items():
        if shape != expected(name):
            raise ValueError(
                f"{source}: {name} is {shape}, but {CONFIG_NAME} implies {expected(name)}. "
                "Config and weights are of two students: copy both from one save."
            )
    held, memory = (
        sum(file.num_bytes for file in files),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    if held > memory:
        raise OSError(
            f"{source}: holds {held / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB. Load it on a "
            f"larger one."
        )


def tensor_shapes(arguments):
    """Return ({name: shape} outside the blocks, {name within a block: shape}) of a student with these
    arguments.
    """
    width, ffn_dim = arguments["hidden_size"], arguments["ffn_dim"]
    channels, patch = arguments["num_channels"], tuple(arguments["patch_size"])
    attention = {
        "to_q": (width, width),
        "to_k": (width, width),
        "to_v": (width, width),
        "to_out.0": (width, width),
    }
    inside = _linears(
        {f"{name}.{part}": shape for name in ("attn1", "attn2") for part, shape in attention.items()}
        | {"ffn.net.0.proj": (ffn_dim, width), "ffn.net.2": (width, ffn_dim)}
    )
    inside |= {f"{name}.norm_{part}.weight": (width,) for name in ("attn1", "attn2") for part in "qk"}
    inside |= {"scale_shift_table": (1, 6, width)}
    inside |= (
        {f"norm2.{part}": (width,) for part in ("weight", "bias")} if arguments["cross_attn_norm"] else {}
    )
    outside = _linears(
        {
            "patch_embedding": (width, channels, *patch),
            "proj_out": (channels * math.prod(patch), width),
            "condition_embedder.time_embedder.linear_1": (width, arguments["freq_dim"]),
            "condition_embedder.time_embedder.linear_2": (width, width),
            "condition_embedder.time_proj": (6 * width, width),
            "condition_embedder.text_embedder.linear_1": (width, arguments["text_dim"]),
            "condition_embedder.text_embedder.linear_2": (width, width),
        }
    )
    return outside | {"scale_shift_table": (1, 2, width)}, inside


def all_tensor_shapes(arguments):
    """Return {name: shape} of a whole student with these arguments."""
    outside, inside = tensor_shapes(arguments)
    return outside | {
        f"blocks.{block}.{name}": shape
        for block in range(arguments["depth"])
        for name, shape in inside.items()
    }


def _linears(weights):
    return {
        f"{name}.{part}": shape if part == "weight" else shape[:1]
        for name, shape in weights.items()
        for part in ("weight", "bias")
    }


def pinned_hashes(files, sha256):
    """Return {file name: digest} of what the one file, or every shard, is pinned to; None where nothing is."""
    if sha256 is None:
        return None
    pinned = {files[0].path.name: sha256} if isinstance(sha256, str) and len(files) == 1 else sha256
    if not isinstance(pinned, dict) or pinned.keys() != {file.path.name for file in files}:
        raise ValueError(
            f"sha256 is {_short(sha256)}, expected a digest for each of "
            f"{_some([file.path.name for file in files])}: {{name: digest}}."
        )
    return pinned


def check_hashes(files, pinned):
    """Compare the weights that were read with what they are pinned to."""
    for file in files if pinned is not None else ():
        if file.sha256 != str(pinned[file.path.name]).lower():
            raise ValueError(
                f"{file.path}: sha256 is {file.sha256}, expected {_short(pinned[file.path.name])}. These are "
                f"not the "
                "weights that were pinned."
            )


# ---- helpers -----------------------------------------------------------------------------------------------


def _checked_path(folder, name):
    """Return the path of a file in the folder, None where there is none; a link may not lead out of the
    folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    cache = next(
        (parent for parent in folder.parents if parent.name.startswith("models--")), folder
    )  # the hub's: links to blobs
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise OSError(f"{path}: a link that leads nowhere. Put the file itself there.") from None
    if not target.is_relative_to(cache.resolve()):
        raise OSError(f"{path}: a link that leads out of the folder, to {target}. Put the file itself there.")
    return path


def _listing(folder):
    return _some(sorted(entry.name for entry in islice(folder.iterdir(), 1000))) or "nothing"


def _some(names, most=6):
    return ", ".join(map(shown, names[:most])) + (" and more" if len(names) > most else "") or "none"


def _short(value):
    """Show a value that may be anything: 5 000 digits, a novel."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
