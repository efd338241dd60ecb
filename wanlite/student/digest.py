"""The digest of everything in a student's folder that decides an image; no torch.

Left out are files that only training or a reader uses, run.json among them: the settings of an image are stored in
the image itself.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..files.atomic import MANIFEST, read_manifest
from ..files.cache import fingerprint
from ..files.file_names import COMPONENTS, CONFIG, SCHEDULER_CONFIG
from ..files.inside import resolve_inside, walk
from ..files.json_files import open_regular
from .weights import find_weights


def model_digest(folder: str | Path, weights: Mapping[str, str] | None = None) -> str:
    """Return the sha256 of {file: sha256} of the student, its scheduler and its components.

    `weights`, {file name: sha256}, are the digests of the student's weights, by default those of the files.
    Components are described by their manifests, with which loading compares them.
    """
    folder = Path(folder)
    digests = dict(weights or {path.name: _hash(path) for path in find_weights(folder)})
    for name in (CONFIG, f"transformer/{CONFIG}", f"scheduler/{SCHEDULER_CONFIG}"):
        if (folder / name).exists():
            digests[name] = _hash(resolve_inside(folder, name))
    for component in COMPONENTS:
        digests |= {f"{component}/{name}": digest for name, digest in _describe(folder / component)}
    return fingerprint(digests)


def check_digest(expected: str | None, weights: str, model: str, folder: str | Path) -> None:
    """Raise ValueError for a model that was not expected; `expected` is a digest of its weights or of all its files."""
    if expected is not None and expected.lower() not in (weights, model):
        raise ValueError(
            f"{folder}: sha256 is {weights:.70} (weights) and {model} (all files that decide an image), expected "
            f"{expected!r:.70}. This is not the pinned model."
        )


def _describe(component: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, sha256) of a component, from its manifest where it has one, which lists all files."""
    if manifest := read_manifest(component):
        for name, described in manifest["files"].items():
            yield name, str(described.get("sha256"))
        return
    for path in sorted(walk(component)):
        if path.is_file() and path.name != MANIFEST:
            name = str(path.relative_to(component))
            yield name, _hash(resolve_inside(component, name))


def _hash(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
