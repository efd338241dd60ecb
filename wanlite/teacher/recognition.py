"""A safetensors file -> the network in it, by its tensors; single files in ComfyUI's folders -> a teacher's parts. No torch.

An autoencoder has to have wan in its file name, because Qwen's has the same tensors.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

from .headers import Shape, read_shapes
from .keys import rename
from .names import COMPONENT_PLACES, FIRST, LAST, OTHER_NETWORKS, TEXT_ENCODER_NAMES
from .search import weights_by_depth


class Network(NamedTuple):
    """The network in a file: its kind, and its latent channels or the width of its text."""

    kind: str  # "expert" (a text-to-video Wan), "text_encoder" (UMT5), "t5", "vae"
    size: int


def recognize(path: Path) -> Network | str | None:
    """Return the network in a safetensors file; in words if it is another Wan, None if it is neither.

    Raises OSError for an incomplete file.
    """
    try:
        return _recognize(read_shapes(path), path)
    except (LookupError, ZeroDivisionError):  # a tensor of fewer dimensions, or without values
        return None


def _recognize(shapes: dict[str, Shape], path: Path) -> Network | str | None:
    if found := _recognize_text_encoder(shapes):
        return found
    is_autoencoder = {"decoder.middle.0.residual.0.gamma", "conv2.weight"} <= shapes.keys()
    if is_autoencoder and re.search("(?i)wan", path.name):
        return Network("vae", shapes["conv2.weight"][0])
    return _recognize_transformer(shapes) or next(
        (other for pattern, other in OTHER_NETWORKS if any(map(pattern.search, shapes))), None
    )


def _recognize_text_encoder(shapes: dict[str, Shape]) -> Network | None:
    names = rename(shapes, TEXT_ENCODER_NAMES)
    if not {"encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "shared.weight"} <= names.keys():
        return None
    positions = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"  # UMT5's, unlike T5's
    return Network("text_encoder" if positions in names else "t5", names["shared.weight"][-1])


def _recognize_transformer(shapes: dict[str, Shape]) -> Network | str | None:
    last = next((name for name in LAST if name in shapes), None)
    if last is None or len(shapes.get(FIRST, ())) != 5:
        return None
    _, channels, *patch = shapes[FIRST]
    rows = shapes[last][0]
    if rows == channels * math.prod(patch):
        return Network("expert", channels)
    return f"an image-to-video or control Wan (channels in: {channels}, channels out: {rows // math.prod(patch)})"


def find_single_files(folder: Path) -> dict[str, dict[Path, int]]:
    """Return {kind of network: {file: its size}} of ComfyUI's files in a folder, whatever their names.

    Of each kind, deeper files count only if there are no others.
    """
    found: dict[str, dict[Path, int]] = {"expert": {}, "text_encoder": {}, "t5": {}, "vae": {}}
    for paths in weights_by_depth(folder, COMPONENT_PLACES):
        networks = {path: network for path in paths if isinstance(network := recognize(path), Network)}
        for kind in [kind for kind, files in found.items() if not files]:
            found[kind] |= {path: network.size for path, network in networks.items() if network.kind == kind}
        if found["expert"] and found["text_encoder"] and found["vae"]:
            break
    return found
