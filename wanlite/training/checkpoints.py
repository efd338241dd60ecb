"""Checkpoints: training state -> checkpoints/step-000500/ -> training state.

Tensors are stored in one safetensors file, everything else in JSON; pickles are neither written nor read. The
manifest is written last: the sha256 of both files, the step, and the facts of the run.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files.atomic import check_space, find_corruption, new_folder, read_manifest
from ..files.dtypes import find_non_finite
from ..files.file_names import CHECKPOINTS
from ..files.json_files import OWN, read_json

TENSORS = "state.safetensors"
STATE = "state.json"  # everything but tensors


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Return the folder of a step's checkpoint in a run's folder."""
    return Path(folder) / CHECKPOINTS / f"step-{step:06d}"


def save_checkpoint(
    folder: str | Path, step: int, state: dict[str, Any], facts: dict[str, Any], keep: int
) -> None:
    """Save the training state after `step`, and keep the newest `keep` checkpoints, at least two.

    `state` consists of dicts, lists, numbers, strings, tensors and objects with a state_dict. Older checkpoints
    are deleted only after this one is verified. Raises FloatingPointError for a tensor that is not finite,
    before anything is written, and OSError if the disk is full.
    """
    path = checkpoint_path(folder, step)
    tensors: dict[str, torch.Tensor] = {}
    if path.exists() and _find_fault(path) is None:
        return
    packed = _pack(state, "", tensors)
    if non_finite := find_non_finite(tensors):
        raise FloatingPointError(
            f"{non_finite[0]} holds NaN or infinity at step {step}. That step is not saved; earlier checkpoints are in "
            f"{path.parent}. Run again with --overwrite and lower learning rates."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    check_space(path.parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    try:
        with new_folder(path, step=step, facts=facts) as partial:
            save_file(tensors, partial / TENSORS)
            (partial / STATE).write_text(json.dumps(packed), encoding="utf-8")
    except SafetensorError as error:  # the disk became full during the save
        raise OSError(f"{path}: {error}") from None
    if _find_fault(path) is None:
        for older in _checkpoints(folder)[: -max(2, keep)]:
            shutil.rmtree(older)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the training state of a verified checkpoint; raises OSError if it cannot be read."""
    try:
        tensors = load_file(path / TENSORS)
        return _unpack(read_json(path / STATE, OWN), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OSError(
            f"{path}: cannot be read back ({error}). Move it away; the run then resumes from an earlier one."
        ) from None


def restore(components: dict[str, Any], state: dict[str, Any]) -> None:
    """Load a saved state into `components`, a dict of the same names; raises OSError if it does not fit them."""
    for name, component in components.items():
        try:
            if isinstance(component, list):  # optimizers or schedules
                for each, saved in zip(component, state[name], strict=True):
                    each.load_state_dict(saved)
            elif hasattr(component, "load_state_dict"):
                component.load_state_dict(state[name])
            else:
                components[name] = state[name]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise OSError(
                f"the checkpoint's {name} is not that of this run ({reason}). Move the checkpoint away to resume "
                "from an earlier one, or add --overwrite to start again."
            ) from None


def latest_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, or None, and a line for each newer one that was skipped."""
    skipped: list[str] = []
    for path in reversed(_checkpoints(folder)):
        reason = _find_fault(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path}: skipped, {reason}")
    return None, skipped


def _find_fault(path):
    """Return a description of the fault of a checkpoint, None if it is valid."""
    if reason := find_corruption(path):
        return reason
    step = (read_manifest(path) or {}).get("step")
    return None if step == _step(path) else f"its manifest is of step {step}"


def _checkpoints(folder):
    """Return the checkpoints of a run in ascending order; folders of other names, such as backups, are ignored."""
    paths = (Path(folder) / CHECKPOINTS).glob("step-*")
    return sorted((path for path in paths if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(path):
    return int(path.name.removeprefix("step-"))


def _remove_leftovers(folder):
    """Remove the partial folders of interrupted saves."""
    for kind in ("partial", "old"):
        for path in folder.glob(f".step-*.{kind}"):
            # An old folder without its replacement is the only copy of that step.
            if kind == "partial" or (folder / path.name[1:-4]).exists():
                shutil.rmtree(path, ignore_errors=True)


def _pack(value, name, tensors):
    """Return `value` in JSON types; its tensors are added to `tensors` under their path."""
    value = value.state_dict() if hasattr(value, "state_dict") else value
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # pairs, because keys may be numbers
        return {"pairs": [[key, _pack(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(inner, f"{name}/{index}", tensors) for index, inner in enumerate(value)]
    return value


def _unpack(value, tensors):
    """Return the value that _pack() was given."""
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _unpack(inner, tensors) for key, inner in value["pairs"]}
    return [_unpack(inner, tensors) for inner in value] if isinstance(value, list) else value
