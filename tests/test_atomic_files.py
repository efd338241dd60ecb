"""Atomic files and folders, whenever the writer is killed."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from wanlite.files import locks
from wanlite.files.atomic import SPARE, check_space, find_corruption, new_folder, read_manifest, write_json
from wanlite.files.locks import alone, in_turn, lock, locked, release


def write_folder(folder, content):
    with new_folder(folder) as partial:
        (partial / "state.bin").write_text(content * 1000)


def test_json_is_replaced_atomically(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    before = os.stat(path).st_ino
    time.sleep(0.01)
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and os.stat(path).st_ino != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_writers_of_the_same_json_do_not_collide(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda number: write_json(tmp_path / "provenance.json", {"number": number}), range(200))
        )
    assert json.loads((tmp_path / "provenance.json").read_text())["number"] in range(200)
    assert [entry.name for entry in tmp_path.iterdir()] == ["provenance.json"]


def test_an_error_during_a_save_leaves_the_old_folder(tmp_path):
    write_folder(tmp_path / "vae", "old")
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "vae") as partial:
        (partial / "state.bin").write_text("half")
        raise OSError("disk full")
    assert find_corruption(tmp_path / "vae") is None
    assert (tmp_path / "vae/state.bin").read_text().startswith("old")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_a_save_killed_between_its_renames_loses_no_folder(tmp_path, monkeypatch):
    target, replace = tmp_path / "vae", os.replace
    write_folder(target, "old")

    def killed(source, place):
        if place == target:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr("wanlite.files.atomic.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_folder(target, "new")
    monkeypatch.undo()
    with pytest.raises(OSError, match="full"), new_folder(target):
        raise OSError("disk full")
    assert find_corruption(target) is None and (target / "state.bin").read_text().startswith("old")


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda path: (path / "state.bin").write_text("cut"), "differs from its manifest"),
        (lambda path: (path / "state.bin").unlink(), "lacks state.bin"),
        (lambda path: (path / "manifest.json").unlink(), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text("{"), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text("{}"), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text("[1]"), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text('{"files": 3}'), "no readable manifest"),
        (lambda path: (path / "state.bin").write_text("statE" * 1000), "differs from its manifest"),
    ],
)
def test_a_folder_that_changed_since_it_was_written_is_reported(tmp_path, break_it, reason):
    write_folder(tmp_path / "vae", "state")
    assert find_corruption(tmp_path / "vae") is None
    break_it(tmp_path / "vae")
    assert reason in find_corruption(tmp_path / "vae")


def test_a_manifest_of_files_alone_is_read_as_one_with_facts(tmp_path):
    write_folder(tmp_path / "vae", "state")
    write_json(tmp_path / "vae/manifest.json", read_manifest(tmp_path / "vae")["files"])
    assert find_corruption(tmp_path / "vae") is None


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from wanlite.files.locks import locked\n"
        "with locked(Path(sys.argv[2])): print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, ROOT, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with locked(tmp_path, wait=False) as is_held:
        assert not is_held
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path, wait=False) as is_held:
        assert is_held


def test_a_second_writer_of_a_folder_is_refused_and_the_first_one_unharmed(tmp_path):
    target = tmp_path / "vae"
    with new_folder(target) as partial:
        (partial / "state.bin").write_text("first")
        expected = f"^{target}: process {os.getpid()} is writing there. Wait until it ends, or name another"
        with pytest.raises(OSError, match=expected), new_folder(target):
            pytest.fail("it was written to")
    assert find_corruption(target) is None and (target / "state.bin").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_the_half_folder_of_a_killed_writer_is_neither_used_nor_kept(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from wanlite.files.atomic import new_folder\n"
        "with new_folder(sys.argv[2]) as partial:\n"
        "    (partial / 'half.bin').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    target = tmp_path / "vae"
    assert subprocess.run([sys.executable, "-c", code, ROOT, target]).returncode == -signal.SIGKILL
    (tmp_path / ".vae.partial").symlink_to(tmp_path)  # nothing is written through it
    write_folder(tmp_path / "vae.x", "other")  # whose leftovers have a longer name
    assert list(tmp_path.glob(".vae.*.partial"))
    write_folder(target, "new")
    assert read_manifest(target)["files"].keys() == {"state.bin"} and find_corruption(target) is None
    assert not list(tmp_path.glob(".vae.*"))


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new/small"
    expected = pytest.raises(OSError, match=f"{folder}: process {os.getpid()} is writing there")
    with alone(folder), alone(folder, ".partial"), expected, alone(folder):  # locks of other kinds differ
        pytest.fail("two have the lock")
    with alone(folder):
        pass
    assert not list(folder.parent.iterdir())


def test_a_file_too_large_for_the_disk_is_refused_before_it_is_written(tmp_path):
    check_space(tmp_path, 1000)
    with pytest.raises(OSError, match="no space left: 1,000,000,000,001.1 MB are needed"):  # and the spare
        check_space(tmp_path, 10**18)


@pytest.mark.parametrize(
    "num_bytes, free", [(1_300_000, 2_100_000), (0, SPARE - 1), (1_000_000, 2_048_575), (10**12, 10**12)]
)
def test_the_message_about_a_full_disk_has_the_compared_figures(num_bytes, free, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="no space left") as refused:
        check_space(tmp_path, num_bytes)
    needed, found_space = (
        float(figure.replace(",", "")) for figure in re.findall(r"([\d,.]+) MB are", str(refused.value))
    )
    assert found_space <= free / 1e6 < (num_bytes + SPARE) / 1e6 <= needed


SEARCHES = """import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
import torch
from safetensors.torch import save_file
from wanlite.data.component_files import check_finite
from wanlite.data.shards import shard_path, write_shard
from wanlite.files.dtypes import find_non_finite
from wanlite.teacher.expert_files import ExpertFiles
folder, large = Path(sys.argv[2]), torch.nn.Linear(16384, 4096, bias=False, dtype=torch.bfloat16).requires_grad_(False)
large.weight.fill_(3e33)                                     # their sum exceeds the range of bfloat16
save_file({"weight": large.weight}, folder / "expert.safetensors")
expert = ExpertFiles("high", folder, {}, {"weight": (folder / "expert.safetensors", "weight", (4096, 16384))})
for search in (lambda: check_finite("here", large.state_dict()), lambda: find_non_finite(large.state_dict()),
             lambda: expert.read("weight", torch.bfloat16), lambda: write_shard(shard_path(folder), large.state_dict())):
    before = getrusage(RUSAGE_SELF).ru_maxrss
    search()
    print(1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before) / large.weight.nbytes)
"""


def test_the_search_for_infinite_values_takes_no_memory(tmp_path):
    """A float32 copy of a Wan's token embedding would take 4 GB. Files are mapped when read, and written
    once more.
    """
    process = subprocess.run([sys.executable, "-c", SEARCHES, ROOT, tmp_path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    loaded, saved, read, written = map(float, process.stdout.split())
    assert loaded < 0.2 and saved < 0.2 and read < 1.3 and written < 1.3


def test_a_second_run_logs_its_wait_and_then_continues(tmp_path):
    folder, logged, is_first = tmp_path / "start", [], Event()
    folder.mkdir()

    def make():
        with in_turn(folder, logged.append):
            is_first.set()
            time.sleep(0.3)

    first, began = Thread(target=make), time.monotonic()
    first.start()
    is_first.wait()
    with in_turn(folder, logged.append):
        assert time.monotonic() - began >= 0.3
        assert logged == [f"waiting for another run, which makes {folder}"]
    first.join()
    with in_turn(folder, logged.append):
        assert len(logged) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_a_lock_is_held_until_its_release_and_leaves_no_file(tmp_path):
    assert lock(tmp_path) is not None  # and its return value is not kept
    gc.collect()
    assert lock(tmp_path) is None
    release(locks._HELD[-1])
    assert not list(tmp_path.iterdir())
    held = lock(tmp_path)
    assert held is not None
    release(held)


def test_a_folder_without_locks_counts_as_having_one_writer(tmp_path):
    with locked(Path("/sys/kernel")) as is_held:
        assert is_held
