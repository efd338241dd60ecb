"""A teacher's folder is searched and read once, unless it changes."""

import ast

import pytest

from tests.conftest import run_script
from train_distillation import Settings, WanLiteStudent
from wanlite.planning.resolve import complete
from wanlite.planning.run import resolve_run
from wanlite.planning.teacher_folder import TeacherFolder, read_teacher_folder

READS = ("record", "components", "autoencoder_config", "files")


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors and files read from a teacher, in order."""
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


COUNTED = """
import collections, os, runpy, sys
import safetensors
opened, safe_open = collections.Counter(), safetensors.safe_open
safetensors.safe_open = lambda path, *rest: opened.update([str(path)]) or safe_open(path, *rest)
sys.addaudithook(lambda event, values: event == "open" and opened.update([str(values[0])]))
sys.argv = ["train_distillation.py", "--dry_run", "--output_dir", sys.argv[2]]
sys.path.insert(0, ROOT := os.path.dirname(os.path.abspath("train_distillation.py")))
try:
    runpy.run_path("train_distillation.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print("OPENED", {path: count for path, count in opened.items() if path.startswith(os.path.join(ROOT, "tiny_teacher"))})
"""


def test_a_dry_run_opens_each_file_of_a_teacher_once_and_counts_the_tensors_of_a_header_before(tmp_path):
    process = run_script("-c", COUNTED, "--", tmp_path / "run")
    opened = ast.literal_eval(process.stdout.rpartition("OPENED ")[2])
    assert process.returncode == 0 and len(opened) == 12, process.stderr
    assert all(count == 1 + path.endswith(".safetensors") for path, count in opened.items()), opened
