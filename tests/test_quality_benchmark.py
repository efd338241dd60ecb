"""The benchmark of quality, sampled: it trains the random-start twin of a finished run and judges all of them."""

import json
import shutil

from tests.conftest import ROOT, run_script

SCRIPT = ROOT / "benchmarks" / "quality.py"


def test_a_sample_of_captions_is_judged_for_teacher_student_and_random_start(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    before = (tmp_path / "run/run.json").read_bytes()
    process = run_script(SCRIPT, "--quick", "--model", tmp_path / "run", "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["steps"]) for row in rows] == [
        *(("teacher", steps) for steps in (40, 20, 4)), *(("student", steps) for steps in (20, 4)),
        *(("random_start", steps) for steps in (20, 4))]
    accuracy = {(row["model"], row["steps"]): row["accuracy"] for row in rows}
    assert accuracy["teacher", 40] > 0.9 > 0.5 > accuracy["student", 4]          # which has had six steps
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    process = run_script(SCRIPT, "--model", tmp_path)
    assert process.returncode == 2 and "holds no finished run" in process.stderr
