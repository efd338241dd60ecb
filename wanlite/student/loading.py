"""The folder of a saved student -> its checked config and opened weights; every fault is refused here.

Nothing is built before config and weights are known to agree; nothing outside the folder is read; pickles are
never opened. No torch: a wrong folder is refused at once.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..files.json_files import parse_json
from ..files.weights import WeightsFile
from .config import CONFIG_LIMITS, read_config
from .layout import CONFIG_NAME, STAGE_PREFIX, short, some
from .weights import find_weights

RENAMING_SECONDS = 0.2  # within which a save renames all of its files
MAX_SAVES = 4  # saves in progress at once, one of which may hold the config


@contextmanager
def open_student(
    folder: Path, variant: str | None = None
) -> Iterator[tuple[dict[str, Any], list[WeightsFile]]]:
    """Yield (config, files of weights) of a single save, also while another save is in progress.

    Weights carry the config that they were saved with. If config.json differs, a save is in progress, or was
    killed after it published its weights and before its config: then that config is in the save's own folder.
    """
    folder, began = _student_component(folder), time.monotonic()
    while True:
        try:
            config, files, stack = _open_once(folder, variant)
            break
        except (OSError, ValueError):  # files may be of two saves while they are being renamed
            if max(time.monotonic() - began, abs(time.time() - folder.stat().st_mtime)) > RENAMING_SECONDS:
                raise
            time.sleep(0.01)
    with stack:
        yield config, files


def _student_component(folder):
    """Return transformer/ of a pipeline that diffusers saved, and any other folder as it is."""
    component = folder / "transformer"
    if (
        (folder / CONFIG_NAME).exists()
        or not (folder / "model_index.json").is_file()
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
    if not (folder / CONFIG_NAME).exists() and not any(folder.glob(f"{STAGE_PREFIX}*")):
        read_config(folder)  # raises for the missing config before the weights are checked
    with ExitStack() as stack:
        files = []
        for path, expected in find_weights(folder, variant).items():
            files.append(stack.enter_context(WeightsFile(path)))
            if expected is not None and (differing := sorted(expected ^ files[-1].entries.keys())):
                raise ValueError(
                    f"{path}: differs from its index in {some(differing)}. Copy index and shards from one save."
                )
        config = _matching_config(folder, {file.metadata.get("config") for file in files})
        return config, files, stack.pop_all()


def _matching_config(folder, saved_configs):
    """Return the config that equals the one in the weights, which are JSON texts or None."""
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
            f"{folder}: {CONFIG_NAME} is not the one that the weights were saved with ({some(differences)}). "
            f"Copy both from one save."
        )
    raise ValueError(reason)


def _stages(folder):
    """Return the folders of saves in progress that hold a config."""
    stages = sorted(folder.glob(f"{STAGE_PREFIX}*"))[:MAX_SAVES]
    return [place for place in stages if not place.is_symlink() and (place / CONFIG_NAME).is_file()]


def _differences(saved, config):
    return [
        f"{name} is {short(config.get(name))}, was {short(value)}"
        for name, value in saved.items()
        if name[:1] != "_" and config.get(name) != value
    ]
