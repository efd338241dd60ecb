"""The folder of a saved student -> its checked config and opened weights.

Config and weights are compared before anything is built; nothing outside the folder is read; pickles are never
opened. This module does not import torch, so that a wrong folder is refused at once.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..files.file_names import CONFIG, MODEL_INDEX
from ..files.json_files import parse_json, shorten
from ..files.weights import WeightsFile
from .config import CONFIG_LIMITS, read_config
from .layout import STAGE_PREFIX, join_names
from .weights import find_weights

RENAMING_SECONDS = 0.2  # in which a save renames all of its files
MAX_SAVES = 4  # saves in progress that are searched for the config


@contextmanager
def open_student(
    folder: Path, variant: str | None = None
) -> Iterator[tuple[dict[str, Any], list[WeightsFile]]]:
    """Yield (config, weights files) of a single save, even while another save is in progress.

    Weights carry the config that they were saved with. If config.json differs from it, a save is in progress or
    was killed after it published the weights; the matching config is then in the hidden folder of that save.
    """
    folder = _student_component(folder)
    began = time.monotonic()
    while True:
        try:
            config, files, stack = _open_once(folder, variant)
            break
        except (OSError, ValueError):  # files are of two saves while one renames them
            if max(time.monotonic() - began, abs(time.time() - folder.stat().st_mtime)) > RENAMING_SECONDS:
                raise
            time.sleep(0.01)
    with stack:
        yield config, files


def _student_component(folder):
    """Return transformer/ in a pipeline that diffusers saved, and any other folder unchanged."""
    component = folder / "transformer"
    if (
        (folder / CONFIG).exists()
        or not (folder / MODEL_INDEX).is_file()
        or component.is_symlink()
        or not component.is_dir()
    ):
        return folder
    if (folder / "transformer_2").exists():
        raise ValueError(
            f"{folder}: holds a pipeline of two experts, expected a student. Train one with --teacher {folder}."
        )
    return component


def _open_once(folder, variant):
    if not (folder / CONFIG).exists() and not any(folder.glob(f"{STAGE_PREFIX}*")):
        read_config(folder)  # raises OSError for the missing config
    with ExitStack() as stack:
        files = []
        for path, expected in find_weights(folder, variant).items():
            files.append(stack.enter_context(WeightsFile(path)))
            if expected is not None and (differing := sorted(expected ^ files[-1].entries.keys())):
                raise ValueError(
                    f"{path}: differs from its index in {join_names(differing)}. Copy index and shards from one save."
                )
        config = _matching_config(folder, {file.metadata.get("config") for file in files})
        return config, files, stack.pop_all()


def _matching_config(folder, saved_configs):
    """Return the config that equals `saved_configs`, the JSON texts (or None) in the weights."""
    if saved_configs == {None}:
        return read_config(folder)
    if len(saved_configs) > 1:
        raise ValueError(
            f"{folder}: its shards were saved with different configs. Copy all of them from one save."
        )
    text = saved_configs.pop().encode(errors="surrogatepass")
    saved = parse_json(text, f"{folder}, config in the weights", CONFIG_LIMITS)
    reason = None
    for place in (folder, *_stages(folder)):
        config = read_config(place)
        if not (differences := _differences(saved, config)):
            return config
        reason = reason or (
            f"{folder}: {CONFIG} differs from the config in the weights ({join_names(differences)}). "
            f"Copy both from one save."
        )
    raise ValueError(reason)


def _stages(folder):
    """Return the folders of saves in progress that hold a config."""
    stages = sorted(folder.glob(f"{STAGE_PREFIX}*"))[:MAX_SAVES]
    return [place for place in stages if not place.is_symlink() and (place / CONFIG).is_file()]


def _differences(saved, config):
    return [
        f"{name} is {shorten(config.get(name))}, was {shorten(value)}"
        for name, value in saved.items()
        if name[:1] != "_" and config.get(name) != value
    ]
