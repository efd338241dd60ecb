"""A folder of a Wan or of a saved student -> its text encoder or autoencoder in memory, checked.

Headers are compared with the config before a network is made, and files with the digests of their manifest while they
are read: the bytes that were checked are those that compute, and a network does not change with its files.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import MANIFEST, find_corruption, read_manifest
from ..files.dtypes import STUDENT_DTYPES, find_non_finite
from ..files.file_names import CONFIG
from ..files.json_files import DOWNLOADED, read_json
from ..files.weights import WeightsFile
from ..runtime.signals import Stopped
from ..runtime.terminal import one_line
from ..teacher.component_weights import shapes_of
from ..teacher.components import find_weight_files, make_empty
from ..teacher.headers import Shape
from ..teacher.names import TIED

PASSED = (KeyboardInterrupt, SystemExit, GeneratorExit, Stopped)  # ends of a run, not errors of a file
MAX_REASON = 300  # characters of a library's message
KEPT_IN_FLOAT32 = ".wo."  # layers of a text encoder that overflow in float16; see UMT5 in transformers


def load_component(
    component: str, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Any:
    """Return the network in text_encoder/ or vae/ of a folder, in eval mode.

    Without `dtype`, a text encoder has the one in its config, if there is one, or that of its files. Raises OSError
    for files that cannot be read, and ValueError for tensors that the config does not imply or that are not finite.
    """
    place = Path(folder) / component
    with loading_errors(place):
        paths = find_weight_files(component, place)
    check_manifest(place, {path.name for path in paths})
    with ExitStack() as stack:
        with loading_errors(place):
            files = [stack.enter_context(WeightsFile(path)) for path in paths]
            held = {name: entry.shape for file in files for name, entry in file.entries.items()}
            network = make_empty(component, place, len(held))
        check_tensors(place, shapes_of(network.state_dict()), held)
        with loading_errors(place):
            tensors = _read(place, files, device, dtype or _saved_dtype(place))
    check_finite(place, tensors)
    network.load_state_dict(tensors | _tie(tensors, network), strict=True, assign=True)
    network.tie_weights() if component == "text_encoder" else None
    return network.eval()


def _read(
    place: Path, files: list[WeightsFile], device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return {name: tensor} of the files; raises OSError for one that differs from its manifest."""
    listed = (read_manifest(place) or {"files": {}})["files"]
    tensors = {}
    for file in files:
        expected = listed.get(file.path.name, {}).get("sha256")
        for name, tensor in file.tensors(is_hashed=expected is not None):
            is_kept = dtype == torch.float16 and KEPT_IN_FLOAT32 in name
            tensors[name] = tensor.to(device, torch.float32 if is_kept else dtype)
        if file.sha256 != expected:
            raise OSError(f"{file.path.name} differs from its manifest")
    return tensors


def _saved_dtype(place: Path) -> torch.dtype | None:
    config = read_json(place / CONFIG, DOWNLOADED)
    name = config.get("dtype", config.get("torch_dtype"))
    return getattr(torch, str(name)) if name in STUDENT_DTYPES.values() else None


def _tie(tensors: Mapping[str, Tensor], network: torch.nn.Module) -> dict[str, Tensor]:
    """Return the tied tensors that a file stores once, under the names that it lacks."""
    stored = next((tensors[name] for name in sorted(TIED, reverse=True) if name in tensors), None)
    return {} if stored is None else dict.fromkeys(TIED - tensors.keys(), stored)


# ---- checks ------------------------------------------------------------------------------------------------


def check_manifest(folder: Path, hashed_later: Collection[str] = ()) -> None:
    """Raise OSError for a component that differs from its manifest, which saved and converted ones have."""
    if (folder / MANIFEST).exists() and (corruption := find_corruption(folder, hashed_later=hashed_later)):
        raise OSError(f"{folder}: {corruption}. Copy it again.")


@contextmanager
def loading_errors(place: Path | str, action: str = "loaded") -> Iterator[None]:
    """Turn any error of a library about files, panics of tokenizers too, into an OSError of one line."""
    try:
        yield
    except PASSED:
        raise
    except BaseException as error:
        reason = one_line(" ".join(str(error).split()), MAX_REASON)
        raise OSError(
            f"{place}: cannot be {action} ({reason or type(error).__name__}). Download or copy it again."
        ) from None


def check_tensors(place: Path | str, expected: dict[str, Shape], held: dict[str, Shape]) -> None:
    """Raise ValueError if the tensors of files are not those that a config implies."""
    missing = expected.keys() - held.keys()
    if TIED & held.keys():
        missing -= TIED
    for fault, names in (
        ("lacks", missing),
        ("holds unknown", held.keys() - expected.keys() - TIED),
        ("holds in another shape", {name for name in held if expected.get(name, held[name]) != held[name]}),
    ):
        if names:
            raise ValueError(
                f"{place}: {fault} {', '.join(sorted(names)[:3])} ({len(names)} of its tensors), expected those that "
                f"its config.json implies. Weights belong to another model or are incomplete: download or copy it "
                f"again."
            )


def check_finite(place: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors with values that are not finite."""
    for name in find_non_finite(tensors):
        raise ValueError(f"{place}: {name} holds NaN or infinity. Download or copy it again.")
