"""The folder of a teacher -> the contents of its files, each found and read at most once in a process."""

import os
from functools import cached_property, lru_cache
from pathlib import Path

from ..teacher.autoencoder import autoencoder_config
from ..teacher.components import find_components, pixels_per_token
from ..world.record import read_record


class TeacherFolder:
    """A teacher on disk. What is not needed is not read, and a fault is raised where the file is needed."""

    def __init__(self, folder):
        self.folder = Path(folder)

    @cached_property
    def record(self):
        """The training record of a tiny teacher, or an empty dict."""
        return read_record(self.folder)

    @cached_property
    def components(self):
        """{component: where it lies}"""
        return find_components(self.folder)

    @cached_property
    def autoencoder_config(self):
        return autoencoder_config(self.components["vae"])

    @cached_property
    def pixels_per_token(self):
        try:
            place = self.components["vae"]
        except (OSError, ValueError):  # raised again by those who need the components
            place = None
        return pixels_per_token(place, lambda _: self.autoencoder_config)

    @cached_property
    def files(self):
        """The TeacherFiles: every expert's headers."""
        from ..teacher.checkpoint import open_teacher_files  # torch is not there before it is needed

        return open_teacher_files(self.folder)


def read_teacher_folder(folder):
    """Return the TeacherFolder of a path, the same one as long as no file in the folder changes."""
    return _read(str(folder), _describe(folder))


@lru_cache(maxsize=1)
def _read(folder, described):
    return TeacherFolder(folder)


def _describe(folder):
    """Return path, size and modification time of every file in a folder."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists())
