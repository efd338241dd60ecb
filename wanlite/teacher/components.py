"""The components of a Wan folder, in any layout -> diffusers' components, converted once; names.py has the layouts.

No torch until something is converted. Sizes are read off the tensors.
"""

import inspect
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from ..files.atomic import find_corruption_once, new_folder
from ..files.dtypes import BYTES_PER_VALUE
from ..files.file_names import COMPONENT_WEIGHTS, COMPONENTS, CONFIG
from ..files.inside import walk
from ..files.json_files import DOWNLOADED, open_regular, read_json
from ..files.weights import broken_download
from .autoencoder import autoencoder_config, check_statistics, check_strides, convert_autoencoder
from .component_weights import check_shapes, shapes_of
from .headers import Shape, read_header
from .names import AUTOENCODERS, COMPONENT_FILES, COMPONENT_PLACES, SPIECE, TEXT_ENCODER, TIED, TOKENIZER
from .recognition import Network, find_single_files, recognize
from .search import find_unsupported_format, visible
from .text_encoder import (
    check_pieces,
    check_text_settings,
    check_tokenizer,
    convert_text_encoder,
    convert_tokenizer,
)

EXPECTED = {
    "tokenizer": f"tokenizer/, {TOKENIZER}/ or {SPIECE} in ComfyUI's text encoder",
    "text_encoder": f"text_encoder/, {TEXT_ENCODER} or ComfyUI's umt5_xxl_*.safetensors",
    "vae": f"vae/, {' or '.join(AUTOENCODERS)}, or ComfyUI's wan*vae.safetensors",
}
PATCH = 2  # latents across a token, in every Wan
_CONVERT = {"tokenizer": convert_tokenizer, "text_encoder": convert_text_encoder, "vae": convert_autoencoder}


def find_components(folder: str | Path) -> dict[str, Path]:
    """Return {component: its place}, a folder in diffusers' layout or a file that convert_components() converts.

    Raises OSError that names all missing components and ValueError for an ambiguous choice.
    """
    folder = Path(folder)
    found = {component: place for component in COMPONENTS if (place := _find_component(folder, component))}
    others: dict[str, str] = {}
    if lacking := [component for component in COMPONENTS if component not in found]:
        single, others = _find_single_components(folder, lacking)
        found |= single
    if missing := [
        f"{component} ({EXPECTED[component]}{others.get(component, '')})"
        for component in COMPONENTS
        if component not in found
    ]:
        raise OSError(
            f"{folder}: lacks {', '.join(missing)}, which training and inference need. Download the folder "
            "again, or put them there from another layout of the same model."
        )
    return found


def _find_component(folder: Path, component: str) -> Path | None:
    """Return a component's place in diffusers' or in the official layout."""
    official = {
        "tokenizer": [folder / TOKENIZER],
        "text_encoder": visible(folder.glob(TEXT_ENCODER)),
        "vae": [folder / name for name in AUTOENCODERS],
    }
    mark = CONFIG if component == "vae" else ""  # ComfyUI's vae/ is full of other files
    if (folder / component / mark).exists():
        return folder / component
    return next((place for place in official[component] if place.exists()), None)


def is_converted(found: dict[str, Path], component: str) -> bool:
    """Whether a component of find_components() is already in diffusers' layout."""
    return found[component].name == component


def convert_components(
    found: dict[str, Path], folder: str | Path, log: Callable[[str], object] = print
) -> None:
    """Make vae/, text_encoder/ and tokenizer/ of diffusers' layout in `folder`, unless they are there.

    Raises OSError for an incomplete file and ValueError for one of another model.
    """
    for component in COMPONENTS:
        place, source = Path(folder) / component, found[component]
        if find_corruption_once(place) is None:
            continue
        with new_folder(place) as partial:
            if source.is_dir():
                _copy_files(source, partial)
                continue
            log(f"converting {source} into {component}/")
            _CONVERT[component](source).save_pretrained(partial)


def _copy_files(source: Path, target: Path) -> None:
    """Copy the visible files of a component; folders that are links, which may be loops, are left out."""
    for path in sorted(walk(source)):
        inner = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") for part in inner.parts):
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inner)


# ---- checks ------------------------------------------------------------------------------------------------


def check_components(found: dict[str, Path], teacher: dict[str, Any]) -> None:
    """Refuse components that are incomplete, or of another model than the `teacher`, an expert's config.

    Headers are compared with configs; no tensor is read, and a pickled text encoder is not opened: that takes
    long.
    """
    channels = autoencoder_config(found["vae"]).get("z_dim", 16)
    if channels != teacher["in_channels"]:
        raise ValueError(
            f"{found['vae']}: has {channels} latent channels, the teacher's experts {teacher['in_channels']}. Put "
            "the autoencoder of the same model there: TI2V-5B has Wan2.2's with 48, every other Wan has Wan2.1's "
            "with 16."
        )
    _check_text_width(found["text_encoder"], teacher["text_dim"])
    largest = check_tokenizer(found["tokenizer"]) if found["tokenizer"].is_dir() else 0
    for component, place in found.items():
        if place.is_dir():
            check_weights(component, place) if component != "tokenizer" else None
        elif place.suffix == ".pth":
            open_regular(place).close()
            if not is_zipfile(place):  # its table of contents is its end
                raise broken_download(place, "not a complete file of torch.save()")
    if found["text_encoder"].is_dir():
        check_pieces(
            largest, count_embedded(found["text_encoder"]), found["tokenizer"], found["text_encoder"]
        )


def count_embedded(folder: Path) -> int:
    """Return the number of tokens that a text encoder in diffusers' layout embeds, from its config."""
    from transformers import UMT5Config

    path = folder / CONFIG
    size = read_json(path, DOWNLOADED).get("vocab_size", UMT5Config().vocab_size)
    if type(size) is not int:
        raise ValueError(f"{path}: vocab_size is {size!r:.60}, expected a whole number. Download it again.")
    return size


def _check_text_width(place: Path, width: int) -> None:
    if place.suffix == ".pth":
        return
    if place.is_dir():
        config = read_json(place / CONFIG, DOWNLOADED)
        kind, found = config.get("model_type"), config.get("d_model")
    else:
        network = recognize(place)
        kind, found = "umt5", network.size if isinstance(network, Network) else None
    if (kind, found) != ("umt5", width):
        raise ValueError(
            f"{place}: is a {kind} of width {found}, the teacher's experts expect a umt5 of width {width}. Put "
            "the text encoder of the same model there."
        )


def check_weights(component: str, folder: Path, variant: str | None = None) -> None:
    """Refuse a component in diffusers' layout with incomplete files or with other tensors than its config implies."""
    held: dict[str, Shape] = {}
    for file in find_weight_files(component, folder, variant):
        held |= {name: stored.shape for name, stored in read_header(file).items()}
    expected = shapes_of(make_empty(component, folder, len(held)).state_dict())
    if TIED & held.keys():
        expected, held = (
            {name: shape for name, shape in shapes.items() if name not in TIED} for shapes in (expected, held)
        )
    check_shapes(folder, expected, held)


def find_weight_files(component: str, folder: Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors files that a component's loader reads: the single one, or those of an index.

    Files of a `variant` come first.
    """
    single = folder / COMPONENT_WEIGHTS[component]
    index = folder / f"{single.name}.index.json"
    if variant is not None:
        named = single.with_suffix(f".{variant}.safetensors"), index.with_suffix(f".{variant}.json")
        if any(path.exists() for path in named):
            single, index = named
    if single.exists():
        return [single]
    if not index.exists():
        others = [
            path.name
            for path in visible(folder.iterdir())
            if path.suffix == ".safetensors" or find_unsupported_format(path)
        ]
        raise OSError(
            f"{folder}: lacks {single.name}; found {', '.join(others) or 'no weights'}. Download it; one in "
            "another precision, as *.fp16.safetensors, will do under this name."
        )
    weight_map = read_json(index, DOWNLOADED).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ValueError(f"{index}: has no weight_map of tensors and files beside it. Download it again.")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [path.name for path in shards if not path.exists()]:
        raise OSError(
            f"{folder}: shard {missing[0]} is missing, {index.name} promises it ({len(missing)} of "
            f"{len(shards)} are missing). Download it again."
        )
    return shards


def make_empty(component: str, folder: Path, num_tensors: int) -> Any:
    """Return the network that a config of diffusers' layout describes, on the meta device.

    Only settings of the network itself are used: none chooses code, a quantizer or an attention kernel. Raises
    ValueError for counts that exceed the `num_tensors` beside the config.
    """
    from accelerate import init_empty_weights

    path = folder / CONFIG
    config = read_json(path, DOWNLOADED)
    _check_counts(config, num_tensors, path)
    if component == "vae":
        check_statistics(config, path)
        check_strides(config, path)
    else:
        check_text_settings(config, path)
    try:
        with init_empty_weights():
            return _NETWORKS[component](known_settings(component, config))
    except Exception as error:
        raise ValueError(
            f"{path}: does not describe a Wan's {component} ({' '.join(str(error).split()):.200}). Download it again."
        ) from None


def _check_counts(config: dict[str, Any], num_tensors: int, path: Path) -> None:
    """Refuse a network of more parts than tensors: one of millions would take hours to make."""
    for name in ("num_layers", "num_res_blocks", "dim_mult", "temperal_downsample", "attn_scales"):
        value = config.get(name)
        count = len(value) if isinstance(value, list) else value
        if isinstance(count, int) and count > num_tensors:
            raise ValueError(
                f"{path}: {name} is {value!r:.60}, expected at most {num_tensors}, the number of tensors "
                "beside it. Download it again."
            )


def known_settings(component: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the network itself in a config: none chooses code, a quantizer or an attention kernel."""
    if component == "vae":
        from diffusers import AutoencoderKLWan

        known = {*inspect.signature(AutoencoderKLWan.__init__).parameters}
    else:
        from transformers import UMT5Config

        known = {*UMT5Config.__annotations__}
    return {name: value for name, value in config.items() if name in known}


def _make_autoencoder(settings: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(settings)


def _make_text_encoder(settings: dict[str, Any]) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    options = {**settings, "attn_implementation": "sdpa"}
    return UMT5EncoderModel(UMT5Config(**options))


_NETWORKS = {"vae": _make_autoencoder, "text_encoder": _make_text_encoder}


# ---- sizes -------------------------------------------------------------------------------------------------


def pixels_per_token(
    place: Path | None, read_config: Callable[[Path], dict[str, Any]] = autoencoder_config
) -> int:
    """Return the pixels across a token of the autoencoder in `place`, of which image sizes are multiples.

    16, also for None, or 32 with Wan2.2's autoencoder. Raises ValueError for a config that lacks the stride.
    """
    if place is None:
        return PATCH * 8
    if place.suffix == ".pth":  # it is opened only when torch is imported
        return PATCH * (16 if place.name == AUTOENCODERS[1] else 8)
    stride = read_config(place).get("scale_factor_spatial", 8)
    if type(stride) is not int or stride < 1:
        raise ValueError(
            f"{place}: scale_factor_spatial is {stride!r:.60}, expected the autoencoder's stride. Download the "
            "folder again."
        )
    return PATCH * stride


def num_bytes(place: Path) -> int:
    """Return the size of a component's weights in diffusers' layout; float8 is converted to two bytes a value."""
    if place.is_dir():
        return sum(path.stat().st_size for path in walk(place) if path.is_file())
    if place.suffix == ".pth":
        return place.stat().st_size
    return sum(
        math.prod(stored.shape) * max(2, BYTES_PER_VALUE.get(stored.dtype, 2))
        for stored in read_header(place).values()
    )


# ---- ComfyUI's single files --------------------------------------------------------------------------------


def _find_single_components(folder: Path, lacking: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return {component: file} of the lacking ones among ComfyUI's files, and {component: text about other files}."""
    files = find_single_files(folder)
    channels = set(files["expert"].values())
    fitting = {
        "text_encoder": list(files["text_encoder"]),
        "vae": [path for path, latents in files["vae"].items() if not channels or latents in channels],
    }
    found = {}
    for component, paths in fitting.items():
        if component in lacking and len(paths) > 1:
            raise ValueError(
                f"{folder}: {' and '.join(path.name for path in paths)} could each be its {component}, expected "
                "one, in one precision. Put the files of one teacher into a folder of their own (links will do) "
                "and name that."
            )
        if component in lacking and paths:
            found[component] = paths[0]
    encoders = fitting["text_encoder"]
    if "tokenizer" in lacking and len(encoders) == 1 and SPIECE in read_header(encoders[0]):
        found["tokenizer"] = encoders[0]
    others = {}
    for component, kind, meaning in (("text_encoder", "t5", "a T5"), ("vae", "vae", "another Wan's")):
        unused = [path for path in files[kind] if path not in found.values()]
        others[component] = "".join(f"; {path.name} is {meaning}" for path in unused)
        others[component] += _describe_unread(folder, component)
    return found, others


def _describe_unread(folder: Path, component: str) -> str:
    """Return a text about a component's files in a folder that are in the wrong place or format."""
    paths = [
        path
        for place in COMPONENT_PLACES
        if (folder / place).is_dir()
        for path in visible((folder / place).iterdir())
        if COMPONENT_FILES[component].search(path.name) and path.is_file()
    ]
    misplaced = [
        path
        for path in paths
        if path.parent != folder and (path.name in AUTOENCODERS or path.match(TEXT_ENCODER))
    ]
    notes = [f"; {path.name} is in {path.parent.name}/, expected in {folder}" for path in misplaced]
    notes += [
        f"; found {path.name}: {reason[0]}"
        for path in paths
        if path not in misplaced and (reason := find_unsupported_format(path))
    ]
    return "".join(notes[:3])
