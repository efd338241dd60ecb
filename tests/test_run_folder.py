"""A run's folder: saved atomically, resumed from valid checkpoints, never overwritten by accident."""

import json
import shlex
import shutil

import pytest

from wanlite.files.atomic import write_json
from wanlite.files.file_names import COMPONENTS
from wanlite.training.run_folder import (
    MetricsLog,
    check_output_folder,
    check_resumable,
    check_saved_components,
    clear,
    read_fitted_settings,
    read_run,
    save_components,
)


def test_a_folder_with_only_a_projected_student_is_free_for_a_run(tmp_path):
    (tmp_path / "cache/start-0").mkdir(parents=True)
    assert check_output_folder(tmp_path, {}) == "new"
    (tmp_path / ".run.json.0123.partial").touch()  # of a run killed while writing its settings
    assert check_output_folder(tmp_path, {}) == "new"
    (tmp_path / "letter.txt").touch()
    with pytest.raises(ValueError, match="files that do not belong to a run"):
        check_output_folder(tmp_path, {})


def test_a_saved_initialization_may_be_replaced_and_a_finished_run_may_not(tmp_path):
    run = {"settings": {"seed": 0}, "finished": False, "projected_only": True}
    write_json(tmp_path / "run.json", run)
    assert check_output_folder(tmp_path, {"seed": 0}) == check_output_folder(tmp_path, {"seed": 1}) == "new"
    write_json(tmp_path / "run.json", run | {"finished": True})
    with pytest.raises(ValueError, match="finished run"):
        check_output_folder(tmp_path, {"seed": 0})


@pytest.mark.parametrize("name", ["run", "a run", "it's $HOME"])
def test_a_finished_run_is_refused_with_how_to_train_it_further(name, tmp_path):
    (tmp_path / name).mkdir()
    write_json(tmp_path / name / "run.json", {"settings": {}, "finished": True})
    with pytest.raises(ValueError, match="To train it further, add --student") as refused:
        check_output_folder(tmp_path / name, {})
    assert f"--student {shlex.quote(str(tmp_path / name))} and" in str(refused.value)


def test_the_content_of_an_output_folder_decides_if_a_run_may_use_it(tmp_path):
    settings = {"seed": 0, "learning_rate": 1e-3}
    assert (
        check_output_folder(tmp_path / "none", settings) == check_output_folder(tmp_path, settings) == "new"
    )
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
            with pytest.raises(ValueError, match="files that do not belong to a run"):
                check_output_folder(tmp_path, settings, overwrite=overwrite, resume=False)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("teacher", "b", "--teacher holds other weights"),
        ("processes", 2, "processes"),
        ("prompts", "c", "prompts differ"),
    ],
)
def test_a_run_with_another_outcome_is_not_resumed(tmp_path, name, value, words):
    run = {"teacher": "a", "prompts": "b", "processes": 1, "versions": {"torch": "2.13.0"}}
    write_json(tmp_path / "run.json", run)
    printed = []
    check_resumable(tmp_path, run, printed.append)
    assert printed == []
    check_resumable(tmp_path, run | {"versions": {"torch": "2.11.0"}}, printed.append)
    assert "torch 2.13.0, now 2.11.0" in printed[0]
    with pytest.raises(ValueError, match=words):
        check_resumable(tmp_path, run | {name: value}, printed.append)


def test_a_record_with_infinite_numbers_is_read_back(tmp_path):
    write_json(tmp_path / "run.json", {"results": {"image_error": float("inf"), "speed": 1.5}})
    assert read_run(tmp_path) == {"results": {"image_error": float("inf"), "speed": 1.5}}


def test_clearing_removes_the_files_of_a_run_and_nothing_else(tmp_path):
    for name in (
        "checkpoints/step-000001/manifest.json",
        "run.json",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "thesis.tex",
        "cache/shard",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "cache"}
    mine = ("samples/mine.png", "checkpoints/backup/state.json")
    for name in (
        *mine,
        "samples/step-000001.png",
        "checkpoints/step-000001/state.json",
        "checkpoints/.step-000002.old/state.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"thesis.tex", "cache/shard", *mine}


@pytest.mark.parametrize("content", ["{", "[1]", pytest.param("[" * 10**5, id="deep")])
def test_an_unreadable_run_record_is_named(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OSError, match="run.json: .*Copy it again"):
        read_run(tmp_path)


def test_a_record_without_fitted_settings_is_refused(tmp_path):
    write_json(tmp_path / "run.json", {"fitted": [1], "versions": [1]})
    with pytest.raises(ValueError, match="Add --overwrite to start again"):
        read_fitted_settings(tmp_path)
    check_resumable(tmp_path, {"versions": {"torch": "2.13.0"}}, print)


def test_metrics_with_a_broken_byte_lose_only_that_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": \xff2}\n{"step": 3}\n')
    assert MetricsLog(tmp_path / "metrics.jsonl", 3).path.read_text() == '{"step": 1}\n{"step": 3}\n'


class NoScheduler:
    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "scheduler_config.json").write_text("{}")


@pytest.fixture
def saved_components(tmp_path):
    for component in COMPONENTS:
        (tmp_path / "teacher" / component).mkdir(parents=True)
        (tmp_path / "teacher" / component / "weights.bin").write_text("weights")
        (tmp_path / "teacher" / component).chmod(0o555)
    save_components(tmp_path / "run", tmp_path / "teacher", NoScheduler())
    return tmp_path / "run"


def test_components_of_a_read_only_teacher_are_saved_writable(saved_components):
    assert all((saved_components / component).stat().st_mode & 0o200 for component in COMPONENTS)
    check_saved_components(saved_components)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda run: (run / "vae/weights.bin").write_text("cut"), "found 3 bytes, expected 7"),
        (lambda run: (run / "tokenizer/weights.bin").unlink(), "lacks weights.bin"),
        (lambda run: shutil.rmtree(run / "text_encoder"), "lacks text_encoder"),
        (lambda run: (run / "scheduler/scheduler_config.json").unlink(), "lacks scheduler_config.json"),
    ],
)
def test_a_damaged_saved_component_is_named(saved_components, break_it, words):
    break_it(saved_components)
    with pytest.raises(OSError, match=words):
        check_saved_components(saved_components)


def test_the_metrics_of_repeated_steps_are_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0 / step)
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(tmp_path / "metrics.jsonl", 2).write(step=3, loss=0.0)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]
    assert json.loads(log.path.read_text().splitlines()[-1])["loss"] == 0.0


def test_a_restarted_run_starts_new_metrics(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl", 0).write(step=0, held_out_error=1.0)
    assert MetricsLog(tmp_path / "metrics.jsonl", 0).path.read_text() == ""
    (tmp_path / "metrics.jsonl").write_text('[1]\n{"step": 1}\n')
    assert MetricsLog(tmp_path / "metrics.jsonl", 1).path.read_text() == '{"step": 1}\n'
