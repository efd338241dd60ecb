"""The benchmark of loading, sampled: every way loads the same weights, and what it took is told."""

import json

import pytest

from tests.conftest import ROOT, run_script

SCRIPT = ROOT / "benchmarks" / "load.py"


def test_a_sample_of_loads_tells_its_figures(tmp_path):
    process = run_script(SCRIPT, "--quick", "--folder", tmp_path / "students", "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stdout + process.stderr
    assert str(tmp_path / "students") in process.stdout.splitlines()[0]
    rows = [line.split(" | ")[:2] for line in process.stdout.splitlines() if line.startswith(("| float32", "| bfloat16"))]
    assert len(rows) == 8 and {way for _, way in rows} == {"ours", "stock", "bare", "lean"}
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() >= {"over_bare", "over_stock", "peak_over_weights", "start_over_imports"}
    assert all(figures[name] > 0 for name in ("over_bare", "over_stock", "peak_over_weights", "start_over_imports"))


@pytest.mark.parametrize("arguments, words", [(["--repeats", "0"], "at least 1"), ([], "is not empty")])
def test_what_is_wrong_is_refused_and_a_folder_of_somebody_else_stays(arguments, words, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    process = run_script(SCRIPT, "--folder", tmp_path, *arguments)
    assert process.returncode == 2 and words in process.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
