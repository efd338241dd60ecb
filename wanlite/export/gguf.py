"""A student's tensors -> a GGUF file that diffusers loads as a WanTransformer3DModel, with its blocks quantised.

No torch is imported before it is needed.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..teacher.keys import official_name

if TYPE_CHECKING:
    import torch

DTYPES = ("q8_0", "q5_0", "q4_0")  # bits of a weight, in groups with a float16 scale
GROUP = 32  # weights
ARCHITECTURE = "wan"


def check_library() -> None:
    """Raise ValueError if the package that writes the files is missing."""
    if find_spec("gguf") is None:
        raise ValueError("--format gguf needs the package gguf. Install it: pip install gguf")


def write_gguf(path: str | Path, tensors: "Mapping[str, torch.Tensor]", dtype: str, title: str) -> None:
    """Write a student's {diffusers' name: tensor} under Wan's own names.

    The matrices of the blocks are quantised; all other tensors are float32.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[dtype.upper()]
    writer: Any = gguf.GGUFWriter(str(path), ARCHITECTURE)
    writer.add_name(title)
    for name, tensor in tensors.items():
        values, named = tensor.float().cpu().contiguous().numpy(), official_name(name)
        if _is_quantised(named, tensor):
            writer.add_tensor(named, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(named, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _is_quantised(name, tensor):
    return (
        name.startswith("blocks.")
        and name.endswith(".weight")
        and tensor.ndim == 2
        and tensor.shape[-1] % GROUP == 0
    )
