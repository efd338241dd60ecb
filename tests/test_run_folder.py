"""A run's folder: saved whole or not at all, resumed from what verifies, never overwritten by accident."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from wanlite.run_folder import (
    PARTS,
    MetricsLog,
    check_output_folder,
    check_saved_parts,
    checkpoint_path,
    clear,
    latest_checkpoint,
    new_folder,
    prune_checkpoints,
    save_parts,
    why_broken,
    write_json,
)


def write_checkpoint(folder, step, content="state"):
    with new_folder(checkpoint_path(folder, step)) as partial:
        (partial / "state.bin").write_text(content * 1000)


def test_a_folder_with_no_more_than_a_projected_start_is_free_for_a_run(tmp_path):
    (tmp_path / "cache/start-0").mkdir(parents=True)
    assert check_output_folder(tmp_path, {}) == "new"
    (tmp_path / "letter.txt").touch()
    with pytest.raises(ValueError, match="no run of this script"):
        check_output_folder(tmp_path, {})


def test_an_error_in_the_middle_of_a_save_leaves_the_old_folder(tmp_path):
    write_checkpoint(tmp_path, 1, "old")
    with pytest.raises(OSError, match="full"), new_folder(checkpoint_path(tmp_path, 1)) as partial:
        (partial / "state.bin").write_text("half")
        raise OSError("disk full")
    assert why_broken(checkpoint_path(tmp_path, 1)) is None
    assert (checkpoint_path(tmp_path, 1) / "state.bin").read_text().startswith("old")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_last_whole_checkpoint(tmp_path):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from tests.test_run_folder import write_checkpoint\n"
            "from wanlite.run_folder import new_folder, checkpoint_path\n"
            "write_checkpoint(sys.argv[2], 1)\n"
            "with new_folder(checkpoint_path(sys.argv[2], 2)) as partial:\n"
            "    (partial / 'state.bin').write_text('half'); print('saving', flush=True); time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 1), [])
    write_checkpoint(tmp_path, 2)
    assert latest_checkpoint(tmp_path)[0] == checkpoint_path(tmp_path, 2)


@pytest.mark.parametrize("break_it, reason", [
    (lambda path: (path / "state.bin").write_text("cut"), "differs from its manifest"),
    (lambda path: (path / "state.bin").unlink(), "lacks state.bin"),
    (lambda path: (path / "manifest.json").unlink(), "no readable manifest"),
    (lambda path: (path / "manifest.json").write_text("{"), "no readable manifest"),
    (lambda path: (path / "manifest.json").write_text("{}"), "no readable manifest"),
    (lambda path: (path / "manifest.json").write_text("[1]"), "no readable manifest"),
    (lambda path: (path / "state.bin").write_text("statE" * 1000), "differs from its manifest")])
def test_the_newest_checkpoint_that_verifies_is_taken_and_the_rest_is_said(tmp_path, break_it, reason):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    break_it(checkpoint_path(tmp_path, 2))
    path, skipped = latest_checkpoint(tmp_path)
    assert path == checkpoint_path(tmp_path, 1) and len(skipped) == 1 and reason in skipped[0]


def test_pruning_keeps_the_newest_and_never_prunes_after_a_broken_save(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    (checkpoint_path(tmp_path, 4) / "state.bin").write_text("cut")
    prune_checkpoints(tmp_path, 2)
    assert checkpoint_path(tmp_path, 1).exists()
    write_checkpoint(tmp_path, 4)
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000003", "step-000004"]


def test_a_save_killed_between_its_renames_loses_no_folder(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, "old")
    target, replace = checkpoint_path(tmp_path, 1), os.replace

    def killed(source, place):
        if place == target:
            raise KeyboardInterrupt
        replace(source, place)
    monkeypatch.setattr("wanlite.run_folder.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 1, "new")
    monkeypatch.undo()
    with pytest.raises(OSError, match="full"), new_folder(target):
        raise OSError("disk full")
    assert why_broken(target) is None and (target / "state.bin").read_text().startswith("old")


def test_checkpoints_are_ordered_by_step_and_other_names_are_left_alone(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        write_checkpoint(tmp_path, step)
    shutil.copytree(checkpoint_path(tmp_path, 999_998), tmp_path / "checkpoints/step-best")
    (tmp_path / "checkpoints/.step-000123.partial").mkdir()
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 1_000_000), [])
    prune_checkpoints(tmp_path, 2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-999999", "step-1000000", "step-best"}


def test_an_output_folder_says_what_a_run_may_do_with_it(tmp_path):
    settings = {"seed": 0, "learning_rate": 1e-3}
    assert check_output_folder(tmp_path / "none", settings) == check_output_folder(tmp_path, settings) == "new"
    write_json(tmp_path / "run.json", {"settings": settings, "finished": False})
    assert check_output_folder(tmp_path, settings) == "resume"
    assert check_output_folder(tmp_path, settings, resume=False) == "new"
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        check_output_folder(tmp_path, settings | {"seed": 1})
    write_json(tmp_path / "run.json", {"settings": settings, "finished": True})
    with pytest.raises(ValueError, match="--overwrite"):
        check_output_folder(tmp_path, settings)
    assert check_output_folder(tmp_path, settings, overwrite=True) == "new"
    (tmp_path / "run.json").unlink()
    (tmp_path / "thesis.tex").write_text("mine")
    for content in (None, {"experiment": 7}, {"settings": [1]}):
        if content is not None:
            write_json(tmp_path / "run.json", content)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="no run of this script"):
                check_output_folder(tmp_path, settings, overwrite=overwrite, resume=False)


def test_clearing_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path, 1)
    for name in ("run.json", "config.json", "metrics.jsonl", "thesis.tex", "cache/shard"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "cache"}


class NoScheduler:
    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "scheduler_config.json").write_text("{}")


@pytest.fixture
def saved_parts(tmp_path):
    for part in PARTS:
        (tmp_path / "teacher" / part).mkdir(parents=True)
        (tmp_path / "teacher" / part / "weights.bin").write_text("weights")
        (tmp_path / "teacher" / part).chmod(0o555)
    save_parts(tmp_path / "run", tmp_path / "teacher", NoScheduler())
    return tmp_path / "run"


def test_parts_of_a_read_only_teacher_are_saved_writable(saved_parts):
    assert all((saved_parts / part).stat().st_mode & 0o200 for part in PARTS)
    check_saved_parts(saved_parts)


@pytest.mark.parametrize("break_it, words", [
    (lambda run: (run / "vae/weights.bin").write_text("cut"), "3 bytes, 7 were written"),
    (lambda run: (run / "tokenizer/weights.bin").unlink(), "lacks weights.bin"),
    (lambda run: shutil.rmtree(run / "text_encoder"), "lacks text_encoder"),
    (lambda run: (run / "scheduler/scheduler_config.json").unlink(), "lacks scheduler_config.json")])
def test_a_saved_part_that_was_damaged_is_named(saved_parts, break_it, words):
    break_it(saved_parts)
    with pytest.raises(OSError, match=words):
        check_saved_parts(saved_parts)


def test_the_metrics_of_steps_that_are_run_again_are_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0 / step)
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(tmp_path / "metrics.jsonl", 2).write(step=3, loss=0.0)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]
    assert json.loads(log.path.read_text().splitlines()[-1])["loss"] == 0.0


def test_a_run_that_starts_again_starts_its_metrics_again(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl", 0).write(step=0, held_out_error=1.0)
    assert MetricsLog(tmp_path / "metrics.jsonl", 0).path.read_text() == ""
    (tmp_path / "metrics.jsonl").write_text('[1]\n{"step": 1}\n')
    assert MetricsLog(tmp_path / "metrics.jsonl", 1).path.read_text() == '{"step": 1}\n'


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    before = os.stat(path).st_ino
    time.sleep(0.01)
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and os.stat(path).st_ino != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
