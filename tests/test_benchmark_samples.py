"""Benchmarks that run for minutes, in short samples: each writes the rows that it is documented to write."""

import json

import pytest

from tests.conftest import ROOT, run_script
from wanlite.planning.checks import has_compiler

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.slow
def test_a_sample_of_kills_loses_nothing(tmp_path):
    process = run_script(
        BENCHMARKS / "kill.py", "--quick", "--folder", tmp_path / "runs", "--json", tmp_path / "figures.json"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert str(tmp_path / "runs") in process.stdout.splitlines()[0]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["kills"] == figures["identical"] == 2 and figures["lost"] == figures["refused"] == 0
    assert (
        sum(figures["where"].values()) == 2
        and len(figures["where"]) > 1
        and set(figures["signals"]) == {"SIGKILL", "SIGTERM"}
    )


@pytest.mark.slow
def test_a_sample_of_loads_has_all_figures(tmp_path):
    process = run_script(
        BENCHMARKS / "load.py",
        "--quick",
        "--folder",
        tmp_path / "students",
        "--json",
        tmp_path / "figures.json",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert str(tmp_path / "students") in process.stdout.splitlines()[0]
    rows = [
        line.split(" | ")[:2]
        for line in process.stdout.splitlines()
        if line.startswith(("| float32", "| bfloat16"))
    ]
    assert len(rows) == 4 and {way for _, way in rows} == {"wanlite", "stock", "bare", "lean"}
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() >= {"over_bare", "over_stock", "peak_over_weights", "start_over_imports"}
    assert all(
        figures[name] > 0 for name in ("over_bare", "over_stock", "peak_over_weights", "start_over_imports")
    )
    assert not [*tmp_path.rglob("images/*.png")]  # each process ends at the first sampling step


@pytest.mark.slow
def test_a_sample_of_images_equals_those_of_the_stock_pipeline(tmp_path):
    process = run_script(BENCHMARKS / "draw.py", "--quick", "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [row["way"] for row in rows] == ["stock", "wanlite", "wanlite bf16"]
    assert all(row[name] > 0 for row in rows for name in ("cold", "warm", "peak"))
    assert rows[1]["off"] <= 1 < rows[2]["off"] < 32  # of 255


@pytest.mark.slow
def test_a_sample_of_methods_is_trained_and_judged_like_the_teacher(tmp_path):
    process = run_script(
        BENCHMARKS / "quality.py",
        "--quick",
        "--folder",
        tmp_path / "students",
        "--methods",
        "TwinFlow",
        "--json",
        tmp_path / "rows.json",
        "--train_flags",
        "--validation_steps",
        "20",
        "--rollout_states",
        "8",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {(row["model"], row["steps"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == [
        *(("teacher, guided", steps) for steps in (40, 4, 2, 1)),
        ("teacher, unguided", 40),
        ("teacher, unguided", 4),
        *((name, steps) for name in ("student", "TwinFlow") for steps in (4, 2, 1)),
    ]
    reference, student = rows["teacher, guided", 40], rows["student", 4]
    assert reference["accuracy"] > 0.9 and (
        reference["drift"],
        reference["variety"],
        reference["spread"],
    ) == (0, 1, 1)
    assert (
        student["accuracy"] < 0.9 and student["frechet"] > 0 and student["evaluations"] == 4
    )  # after few steps
    assert process.stdout.count("\n| student |") == 3


@pytest.mark.slow
def test_a_sample_of_starts_is_trained_and_judged(tmp_path):
    process = run_script(
        BENCHMARKS / "projection.py",
        "--quick",
        "--folder",
        tmp_path / "data",
        "--shapes",
        "24x2x1",
        "--starts",
        "random",
        "weights_only",
        "--jobs",
        "1",
        "--json",
        tmp_path / "rows.json",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["start"] for row in rows} == {"random", "weights_only"} and all(
        row["error_at"]["0"] > 0.5 for row in rows
    )


@pytest.mark.slow
def test_a_sample_of_training_steps_has_speed_and_memory(tmp_path):
    process = run_script(BENCHMARKS / "train_speed.py", "--quick", "--json", tmp_path / "rows.json")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = {row["way"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    residencies = ("both", "one", "streamed", "disk", "both, fp8")
    assert list(rows) == ["plain", "ours", "muon", *(f"online, {residency}" for residency in residencies)]
    assert all(
        row["images_per_second"] > 0 and row["peak_bytes"] > 4 * 330_000 * 5 for row in rows.values()
    )  # AdamW's five
    assert (
        rows["plain"]["over_plain"] == 1
        and rows["online, disk"]["peak_bytes"] < rows["online, both"]["peak_bytes"]
    )
    assert all(("teacher_share" in row) == way.startswith("online") for way, row in rows.items())
    assert sum(line.startswith("| 64 | ") for line in process.stdout.splitlines()) == len(rows)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="compiled blocks need a C++ compiler")
def test_the_gpu_benchmark_measures_every_part_in_one_process(tmp_path):
    process = run_script(
        BENCHMARKS / "gpu.py", "--device", "cpu", "--small", "--json", tmp_path / "rows.json", timeout=900
    )
    assert process.returncode == 0 and process.stdout.endswith(" 0 failed: none\n"), process.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["part"] for row in rows} == {"machine", "right", "step", "teacher", "draw"}
    compiled = {row["part"] for row in rows if "compiled" in row["what"]}
    assert compiled == {"step", "teacher", "draw"}


@pytest.mark.slow
def test_a_sample_of_the_cache_has_its_size_and_the_waiting_of_each_reader(tmp_path):
    process = run_script(BENCHMARKS / "cache.py", "--quick", "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stdout + process.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    # latents, velocity and features in int8; a scale for each channel and token, two float32 and a token of each state
    states = 20 * (2 * (16 * 8 * 8 + 4 * 16) + 16 * 16 + 4 * 16 + 16)
    assert figures["bytes_per_prompt"] == pytest.approx(states, rel=0.01) and figures["filled_per_second"] > 0
    readers = {"ours", "DataLoader", "DataLoader, 2 workers"}
    assert figures["read_per_second"].keys() == figures["waiting_share"].keys() == readers
    assert 0 < figures["waiting_share"]["ours"] < 0.5 and process.stdout.count("%") == len(readers)


@pytest.mark.slow
def test_a_sample_of_budgets_is_trained_once_and_other_settings_are_refused(tmp_path):
    command = (
        BENCHMARKS / "budget.py",
        "--quick",
        "--folder",
        tmp_path / "students",
        "--json",
        tmp_path / "rows.json",
    )
    process = run_script(*command)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["pictures"], row["steps"]) for row in rows] == [(64, 7), (64, 14), (128, 7), (128, 14)]
    assert len([line for line in process.stdout.splitlines() if line.startswith(("| 64 |", "| 128 |"))]) == 4
    assert len({row["image_error_4"] for row in rows}) == 4
    again = run_script(*command)
    assert (
        again.returncode == 0
        and "trained" not in again.stdout
        and again.stdout.splitlines()[1:]
        == [line for line in process.stdout.splitlines()[1:] if not line.startswith("trained")]
    )
    other = run_script(*command, "--train_flags", "--hidden_size", "48", "--depth", "2")
    assert (
        other.returncode == 1
        and "trained with another hidden_size" in other.stderr
        and "Traceback" not in other.stderr
    )


@pytest.mark.slow
def test_a_sample_of_few_prompts_is_trained_and_judged(tmp_path):
    process = run_script(
        BENCHMARKS / "few_prompts.py",
        "--quick",
        "--folder",
        tmp_path / "students",
        "--json",
        tmp_path / "rows.json",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["seed"], row["prompts"], row["steps"]) == (0, 30, 7) and row["right"].keys() == {"4", "1"}
    assert process.stdout.splitlines()[-1].startswith("| 0 | 30 | 7 |")


def test_too_many_prompts_are_refused():
    process = run_script(BENCHMARKS / "few_prompts.py", "--prompts", "40")
    assert process.returncode == 2 and "--prompts is 40, expected 2 to 39" in process.stderr
