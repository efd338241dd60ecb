"""A teacher's name on the hub -> its files in the hub's cache, downloaded if necessary. No torch.

Only organisation/model is downloaded, never a path: a missing folder is an error.
"""

import fnmatch
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files.json_files import DOWNLOADED, read_json
from ..runtime.launch import is_first
from ..teacher.folder import hub_name
from .disk import count_free_bytes, format_size

NEEDED = (  # of the diffusers layout and of Wan's own; other files are pictures, examples and other precisions
    "model_index.json",
    "config.json",
    *(
        f"{folder}/*.{suffix}"
        for folder in (
            "transformer",
            "transformer_2",
            "vae",
            "text_encoder",
            "high_noise_model",
            "low_noise_model",
        )
        for suffix in ("json", "safetensors")
    ),
    "scheduler/*.json",
    "tokenizer/*",
    "google/umt5-xxl/*",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "Wan2.?_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
)
NOT_NEEDED = ("*.fp16.safetensors", "*.fp16.safetensors.index.json")
EXPERTS = (
    "transformer/*.safetensors",
    "high_noise_model/*.safetensors",
    "diffusion_pytorch_model*.safetensors",
)


def download_teacher(typed: str | None, log: Callable[[str], object] = print) -> None:
    """Complete the files of --teacher in the hub's cache if it names a model of the hub; else do nothing.

    Does nothing offline either. Raises OSError for a model that the hub does not have or that is not a Wan, for a
    disk that is too small, and for a download that ends early; the same command resumes it.
    """
    from huggingface_hub import constants

    name = hub_name(str(typed)) if typed else None
    if name is None or constants.HF_HUB_OFFLINE:
        return
    cache = Path(constants.HF_HUB_CACHE)
    if any(is_whole(folder) for folder in (cache / f"models--{name.replace('/', '--')}/snapshots").glob("*")):
        return
    files = _ask_hub(typed, name, dry_run=True)
    missing = [file.file_size for file in files if file.will_download]
    _check_files(typed, [file.filename for file in files])
    free_bytes = count_free_bytes(cache)
    if sum(missing) > free_bytes:
        raise OSError(
            f"--teacher {typed}: {format_size(sum(missing), math.ceil)} are to be downloaded to {cache}, and "
            f"{format_size(free_bytes, math.floor)} are free. Set HF_HOME to a folder on a larger disk."
        )
    if is_first():
        log(
            f"download {name}: {format_size(sum(missing))} in {len(missing)} files to {cache} "
            f"({format_size(free_bytes)} free)"
        )
    _ask_hub(typed, name)


def is_whole(snapshot: Path) -> bool:
    """Whether a snapshot in the hub's cache has an expert, and all files that its indices name."""
    if not any(any(snapshot.glob(pattern)) for pattern in EXPERTS):
        return False
    for index in [*snapshot.glob("*.index.json"), *snapshot.glob("*/*.index.json")]:
        try:
            shards = set(read_json(index, DOWNLOADED).get("weight_map", {}).values())
        except (OSError, AttributeError, TypeError):
            return False
        if not all((index.parent / str(shard)).exists() for shard in shards):
            return False
    return _lists_its_components(snapshot)


def _lists_its_components(snapshot):
    """Whether the components that model_index.json names are there; True without it, for Wan's own layout."""
    index = snapshot / "model_index.json"
    if not index.exists():
        return True
    try:
        found = read_json(index, DOWNLOADED)
    except OSError:
        return False
    weights = ("transformer", "transformer_2", "text_encoder", "vae")
    named = [name for name in weights if isinstance(found.get(name), list) and any(found[name][:1])]
    return all(any((snapshot / name).glob("*.safetensors")) for name in named)


def _check_files(typed, names):
    if not any(fnmatch.fnmatch(name, pattern) for name in names for pattern in EXPERTS):
        raise OSError(
            f"--teacher {typed}: the model on the hub has no Wan in the diffusers layout or in Wan's own. Name one "
            "that has, as Wan-AI/Wan2.2-T2V-A14B-Diffusers, or download its files and name their folder."
        )


def _ask_hub(typed: Any, name: str, dry_run: bool = False) -> Any:
    """Download the needed files of a model, or list them with their sizes; the hub's library resumes broken files."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(  # nosec B615: the newest version, as the hub's page shows it
            name,
            allow_patterns=list(NEEDED),
            ignore_patterns=list(NOT_NEEDED),
            etag_timeout=5,
            dry_run=dry_run,
        )
    except Exception as error:  # of the hub's library, which changes its HTTP client between versions
        problem = _describe(error.__cause__ or error)
    folder = f"./{name.rpartition('/')[2]}"
    raise OSError(
        f"--teacher {typed}: {problem}. The same command resumes a download; elsewhere, "
        f"`hf download {name} --local-dir {folder}` gets the model, then use --teacher {folder}."
    ) from None


def _describe(error):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "is gated on the hub: accept its licence there, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder here, and no such model on the hub"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"the hub cannot be read ({reason[:200]})"
