"""A path, or a name on the hub -> the folder of a saved student.

The network is used only for names that cannot be paths on this machine. This module does not import torch, so
that a wrong folder is refused at once.
"""

import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.file_names import CONFIG, MODEL_INDEX
from ..files.json_files import shorten, shown
from .layout import STEMS, WEIGHTS_STEM


def student_folder(
    path: str | os.PathLike,
    subfolder: str | os.PathLike | None = None,
    more_files: Sequence[str] = (),
    accepts_hub: bool = True,
    **hub: Any,
) -> Path:
    """Return the absolute folder of a saved student.

    With `accepts_hub`, a name on the hub is one as well: files of the patterns `more_files` are downloaded beside
    the student, and `hub` are arguments of snapshot_download().
    """
    _check_names(path, subfolder)
    with _readable(path):
        is_remote = accepts_hub and isinstance(path, str) and _is_hub_name(path)
        root = (
            _download(path, subfolder, more_files, **hub)
            if is_remote
            else Path(os.path.expanduser(path)).absolute()
        )
        folder = root / subfolder if subfolder else root
        root.exists()  # raises OSError for a path that is too long, before resolve() follows each of its folders
        if not folder.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"subfolder {shorten(subfolder)} leads out of {root}. Name a folder inside it.")
        if not folder.exists():
            raise OSError(
                f"{shown(str(folder))}: no such folder. Expected a student that train_distillation.py saved."
            )
    if not folder.is_dir():
        raise OSError(f"{folder}: not a folder. Expected the folder of {CONFIG}, not a file in it.")
    return folder


def _check_names(path, subfolder):
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip() or "\0" in str(path):
        raise OSError(
            f"{shorten(path)} is not the name of a folder. Expected the folder of a saved student, such as "
            "./outputs/wan_t2i."
        )
    if "://" in str(path):
        raise OSError(
            f"{shown(str(path))}: is a URL. Expected a folder, or a name on the hub such as organisation/model."
        )
    if subfolder is not None and (not isinstance(subfolder, (str, os.PathLike)) or "\0" in str(subfolder)):
        raise ValueError(
            f"subfolder {shorten(subfolder)} is not the name of a folder. Expected a folder inside "
            f"{shown(str(path))}."
        )


@contextmanager
def _readable(path):
    """Turn errors of the file system (loops of links, permissions, long names) into an OSError of one line."""
    try:
        yield
    except (RuntimeError, OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        reason = getattr(error, "strerror", error)
        raise OSError(
            f"{shown(str(path))}: cannot be read ({reason}). Expected the folder of a saved student."
        ) from None


def _is_hub_name(path: str) -> bool:
    """Whether a path has the form organisation/model, and no folder with the organisation's name exists."""
    pattern = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
    return re.fullmatch(pattern, path) is not None and not Path(path).parent.exists()


def _download(name, subfolder, more_files, **hub):
    """Download the files of a student and `more_files` into the hub's cache; returns the snapshot's folder."""
    from huggingface_hub import snapshot_download  # here: a local folder does not need it
    from huggingface_hub.errors import HFValidationError

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    names = [CONFIG, *(f"{stem}*.safetensors" for stem in STEMS)]
    names.append(f"{WEIGHTS_STEM}.safetensors.index*.json")
    patterns = [f"{prefix}{place}{name}" for place in ("", "transformer/") for name in names]
    patterns += [f"{prefix}{name}" for name in (MODEL_INDEX, *more_files)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))  # nosec B615: the revision is the user's
    except (HFValidationError, OSError) as error:  # HTTP errors are OSErrors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"{name}: no such folder here, and not available on the hub ({reason}). Expected the folder of a "
            f"saved student, such as ./outputs/wan_t2i, or a name on the hub that you may read."
        ) from None
