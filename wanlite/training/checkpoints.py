"""Nested training state -> checkpoints/step-000500/, and the newest checkpoint that verifies -> state again.

Tensors go to one safetensors file, everything else to JSON: no pickle is written and none is opened. A
manifest with the sha256 of both, the step and the facts that a resumed run has to share is written last.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files.atomic import check_space, find_corruption, new_folder, read_manifest
from ..files.dtypes import find_non_finite

TENSORS, REST = "state.safetensors", "state.json"


def checkpoint_path(folder, step):
    return Path(folder) / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(folder, step, state, facts, keep):
    """Save the training state after `step`, a dict, and keep the newest `keep` checkpoints, at least two.

    `state` is made of dicts, lists, numbers, text, tensors, and whatever has a state_dict. Raises
    FloatingPointError, and writes nothing, where a tensor is not finite; OSError where the disk is full: then
    every earlier checkpoint stays. Earlier ones go only once this one verifies.
    """
    path, tensors = checkpoint_path(folder, step), {}
    if path.exists() and _why_unusable(path) is None:
        return
    rest = _pack(state, "", tensors)
    if broken := find_non_finite(tensors):
        raise FloatingPointError(
            f"{broken[0]} holds NaN or infinity at step {step}, which is not saved; earlier ones are in "
            f"{path.parent}. Run again with --overwrite and lower learning rates."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    check_space(path.parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    try:
        with new_folder(path, step=step, facts=facts) as partial:
            save_file(tensors, partial / TENSORS)
            (partial / REST).write_text(json.dumps(rest), encoding="utf-8")
    except SafetensorError as error:  # how the library says that a disk became full meanwhile
        raise OSError(f"{path}: {error}") from None
    if _why_unusable(path) is None:
        for older in _checkpoints(folder)[: -max(2, keep)]:
            shutil.rmtree(older)


def load_checkpoint(path):
    """Return the state in a checkpoint that verifies."""
    try:
        tensors = load_file(path / TENSORS)
        return _unpack(json.loads((path / REST).read_text(encoding="utf-8")), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OSError(
            f"{path}: cannot be read back ({error}). Move it away; the run then resumes from an earlier one."
        ) from None


def restore(parts, state):
    """Load the saved state into `parts`, a dict of the same names; raises OSError for that of other networks."""
    for name, part in parts.items():
        try:
            if isinstance(part, list):  # of optimizers or schedules
                for each, its_state in zip(part, state[name], strict=True):
                    each.load_state_dict(its_state)
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])
            else:
                parts[name] = state[name]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise OSError(
                f"the checkpoint's {name} is not that of this run ({reason}). Move the checkpoint away, and "
                f"the run "
                "goes on from an earlier one; or add --overwrite to start again."
            ) from None


def latest_checkpoint(folder):
    """Return (newest checkpoint that verifies or None, a line for each newer one that was skipped)."""
    skipped = []
    for path in reversed(_checkpoints(folder)):
        reason = _why_unusable(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path}: skipped, {reason}")
    return None, skipped


def _why_unusable(path):
    """Return why a checkpoint is not what it was saved as, or None where it is."""
    if reason := find_corruption(path):
        return reason
    said = read_manifest(path).get("step")
    return None if said == _step(path) else f"its manifest says step {said}"


def _checkpoints(folder):
    """Return the run's checkpoints by rising step; folders of other names, as a user's backup, are none."""
    paths = (Path(folder) / "checkpoints").glob("step-*")
    return sorted((path for path in paths if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(path):
    return int(path.name.removeprefix("step-"))


def _remove_leftovers(folder):
    """Remove what killed saves left: they would fill the disk."""
    for kind in ("partial", "old"):
        for path in folder.glob(f".step-*.{kind}"):
            if (
                kind == "partial" or (folder / path.name[1:-4]).exists()
            ):  # else it was set aside and is all there is
                shutil.rmtree(path, ignore_errors=True)


def _pack(value, name, tensors):
    """Return `value` as JSON can hold it; tensors go to `tensors` under their path."""
    value = value.state_dict() if hasattr(value, "state_dict") else value
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs, for keys may be numbers
        return {"pairs": [[key, _pack(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(inner, f"{name}/{index}", tensors) for index, inner in enumerate(value)]
    return value


def _unpack(value, tensors):
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]]
            if "tensor" in value
            else {key: _unpack(inner, tensors) for key, inner in value["pairs"]}
        )
    return [_unpack(inner, tensors) for inner in value] if isinstance(value, list) else value
