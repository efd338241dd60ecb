"""A teacher's folder is looked through and read once, unless it changes."""

import pytest

from train_distillation import Settings, WanLiteStudent
from wanlite.planning.resolve import complete
from wanlite.planning.run import resolve_run
from wanlite.planning.teacher_folder import TeacherFolder, read_teacher_folder

READS = ("record", "components", "autoencoder_config", "files")


@pytest.fixture
def reads(monkeypatch):
    """The names of what is read of a teacher, in order."""
    found = []
    for name in READS:
        read = vars(TeacherFolder)[name]
        monkeypatch.setattr(
            read, "func", lambda folder, read=read.func, name=name: (found.append(name), read(folder))[1]
        )
    return found


def test_a_dry_run_reads_every_part_of_a_teacher_once(copied, tmp_path, reads):
    settings = Settings(teacher=str(copied), output_dir=str(tmp_path / "run"), dry_run=True)
    run = resolve_run(complete(settings), WanLiteStudent)
    assert sorted(reads) == sorted(READS) and run.components.keys() == {"tokenizer", "text_encoder", "vae"}


def test_a_folder_that_changed_is_read_again(copied):
    before = read_teacher_folder(copied)
    assert read_teacher_folder(copied) is before and before.record["world"] == "shapes"
    (copied / "training.json").unlink()
    assert read_teacher_folder(copied).record == {}
