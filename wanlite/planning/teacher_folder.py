"""The folder of a teacher -> the contents of its files, each found and read at most once per process."""

from functools import cached_property, lru_cache
from pathlib import Path

from ..files.inside import walk
from ..teacher.autoencoder import autoencoder_config
from ..teacher.components import find_components, pixels_per_token
from ..world.record import read_record


class TeacherFolder:
    """A teacher on disk; a file is read, and its errors are raised, when a property first needs it."""

    def __init__(self, folder):
        self.folder = Path(folder)

    @cached_property
    def record(self):
        """The training record of a tiny teacher, or an empty dict."""
        return read_record(self.folder)

    @cached_property
    def components(self):
        """{component: its path}"""
        return find_components(self.folder)

    @cached_property
    def autoencoder_config(self):
        return autoencoder_config(self.components["vae"])

    @cached_property
    def pixels_per_token(self):
        try:
            path = self.components["vae"]
        except (OSError, ValueError):  # the check of the components raises it again
            path = None
        return pixels_per_token(path, lambda _: self.autoencoder_config)

    @cached_property
    def files(self):
        """The TeacherFiles, with the headers of every expert."""
        from ..teacher.checkpoint import open_teacher_files  # imports torch

        return open_teacher_files(self.folder)


def read_teacher_folder(folder):
    """Return the TeacherFolder of a path, the same object until a file in the folder changes."""
    return _make_teacher_folder(str(folder), _list_files(folder))


@lru_cache(maxsize=1)
def _make_teacher_folder(folder, files):
    return TeacherFolder(folder)


def _list_files(folder):
    """Return path, size and modification time of every file in a folder."""
    status = ((str(path), path.stat()) for path in sorted(walk(folder)) if path.is_file())
    return tuple((path, found.st_size, found.st_mtime_ns) for path, found in status)
