"""The benchmark of kills, sampled: it strikes living runs, and each ends with the weights of an uninterrupted one."""

import json

import pytest

from tests.conftest import ROOT, run_script

SCRIPT = ROOT / "benchmarks" / "kill.py"


def test_a_sample_of_kills_loses_nothing(tmp_path):
    process = run_script(SCRIPT, "--quick", "--folder", tmp_path / "runs", "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stdout + process.stderr
    assert str(tmp_path / "runs") in process.stdout.splitlines()[0]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["kills"] == figures["identical"] == 6 and figures["lost"] == figures["refused"] == 0
    assert sum(figures["where"].values()) == 6 and len(figures["where"]) > 1 and set(figures["signals"]) == {"SIGKILL", "SIGTERM"}


@pytest.mark.parametrize("arguments, words", [(["--kills", "0"], "at least 1"), ([], "is not empty")])
def test_what_is_wrong_is_refused_and_a_folder_of_somebody_else_stays(arguments, words, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    process = run_script(SCRIPT, "--folder", tmp_path, *arguments)
    assert process.returncode == 2 and words in process.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
