"""The training record of a tiny teacher, and the world that it was trained on."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..files.json_files import DOWNLOADED, read_json

RECORD = "training.json"  # in the folder of a tiny teacher
WORLDS = ("shapes", "emoji")
DETERMINED = ("shapes",)  # worlds in which a caption determines nearly all of an image


def read_record(teacher: str | Path) -> dict:
    """Return the training record of a tiny teacher, an empty dict for any other teacher."""
    path = Path(teacher) / RECORD
    try:
        return read_json(path, DOWNLOADED) if path.is_file() else {}
    except OSError:
        raise ValueError(
            f"{path}: not a JSON object. It marks a tiny teacher: copy that folder from the repository again, or "
            "delete the file beside any other teacher."
        ) from None


def read_world(teacher: str | Path) -> ModuleType | None:
    """Return the module of a tiny teacher's world, None for any other teacher."""
    name = read_record(teacher).get("world")
    return import_module(f"{__package__}.{name}") if name in WORLDS else None
