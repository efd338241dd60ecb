"""Benchmarks: correct shapes, complete figures, and refusals that leave other files alone."""

import json

import pytest
import torch

from benchmarks.calls import observe
from benchmarks.memory import WARM, measured_peak, phases
from benchmarks.projection_scale import num_bytes, remove_expert, teacher_config, tensor_shapes, write_expert
from benchmarks.train_speed import A14B, Online, make_world, ours, random_teacher
from tests.conftest import ROOT, run_script
from tests.test_plan import alive
from wanlite.planning.simulation import simulate_peak
from wanlite.teacher.checkpoint import open_teacher_files

BENCHMARKS = ROOT / "benchmarks"
SCALE = BENCHMARKS / "projection_scale.py"


# ---- projection at full scale ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("a14b", 14_288_491_584, 1095),
        ("14b", 14_288_491_584, 1095),
        ("5b", 4_999_787_712, 825),
        ("1.3b", 1_418_996_800, 825),
    ],
)
def test_a_written_expert_has_the_parameters_and_tensors_of_the_real_one(name, parameters, tensors):
    shapes = tensor_shapes(teacher_config(name))
    assert (num_bytes(shapes), len(shapes)) == (2 * parameters, tensors)


def test_a_written_expert_opens_in_the_official_layout_with_one_residual_basis(tmp_path):
    config = teacher_config("a14b") | {"dim": 512, "ffn_dim": 768, "num_layers": 2, "num_heads": 4}
    write_expert(tmp_path / "wan", config)
    files = open_teacher_files(tmp_path / "wan")
    expert = files.experts["only"]
    assert files.layout == "official" and len(list((tmp_path / "wan").glob("*-of-00006.safetensors"))) == 6
    assert 2 * expert.num_parameters == num_bytes(tensor_shapes(config))
    assert all(torch.isfinite(expert.read(name)).all() for name in expert.places)
    # the directions that one block reads most are those that another writes most
    basis = torch.linalg.svd(expert.read("blocks.0.ffn.net.0.proj.weight")).Vh[:128]
    written = expert.read("blocks.1.ffn.net.2.weight")
    assert (basis @ written).square().sum() > 0.8 * written.square().sum()
    remove_expert(tmp_path / "wan")
    assert not (tmp_path / "wan").exists()


def test_a_quick_measurement_writes_all_figures_and_removes_its_folder(tmp_path):
    process = run_script(SCALE, "--quick", "--folder", tmp_path / "wan", "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stderr
    assert (
        str(tmp_path / "wan") in process.stdout.splitlines()[0] and "peak anonymous memory" in process.stdout
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() >= {
        "teacher",
        "student",
        "peak_gib",
        "peak_anonymous_gib",
        "seconds",
        "seconds_reading",
        "seconds_arithmetic",
        "bytes_read",
        "read_gb_per_s",
        "plain_read_gb_per_s",
        "device",
    }
    assert figures["peak_gib"] >= figures["peak_anonymous_gib"] > figures["anonymous_before_gib"] > 0
    assert figures["bytes_read"] >= num_bytes(tensor_shapes(teacher_config("a14b", is_quick=True)))
    assert figures["seconds"] == pytest.approx(figures["seconds_reading"] + figures["seconds_arithmetic"])
    assert not (tmp_path / "wan").exists()


def test_a_disk_that_is_too_small_is_refused_with_the_size_of_the_expert(tmp_path):
    process = run_script(SCALE, "--layers", "4000", "--folder", tmp_path / "wan")
    needed = num_bytes(tensor_shapes(teacher_config("a14b", layers=4000))) / 1e9
    assert process.returncode == 2 and f"takes {needed:.1f} GB" in process.stderr
    assert not (tmp_path / "wan").exists()


def test_a_student_that_cannot_be_projected_is_refused_before_writing(tmp_path):
    process = run_script(SCALE, "--quick", "--num_heads", "3", "--folder", tmp_path / "wan")
    assert process.returncode == 2 and "--num_heads" in process.stderr
    assert not (tmp_path / "wan").exists()


def test_a_teacher_of_random_weights_is_evaluated_like_a_real_one(tmp_path):
    config = A14B | {"num_attention_heads": 2, "text_dim": 32, "ffn_dim": 96, "num_layers": 2}
    shape = {"hidden_size": 64, "depth": 2, "num_heads": 2, "text_dim": 32, "num_channels": 16}
    world = make_world(tmp_path / "states", random_teacher(config, "cpu"), shape, 8, 4, "cpu", "no")
    online = Online(world, "both", False)
    (batch, text), *_ = world.feed(1)
    velocity, features = online(batch, text)
    assert (
        velocity.shape == (4, 16, 8, 8) and features.shape == (4, 16, 16) and torch.isfinite(velocity).all()
    )
    assert next(ours(world, predict=online)) is None and len(online.seconds) == 2


# ---- observed calls ----------------------------------------------------------------------------------------


def test_calls_are_observed_with_their_results_and_functions_stay_unchanged():
    events = []

    def double(number):
        if number < 0:
            raise ValueError(number)
        return 2 * number

    with observe({double: (lambda: events.append("call"), events.append)}):
        assert double(2) == 4
        with pytest.raises(ValueError):
            double(-1)
    double(3)
    assert events == ["call", 4, "call", None]


def test_a_decorated_function_is_observed_once():
    events = []

    @torch.no_grad()
    def double(number):
        return 2 * number

    with observe({double: (lambda: events.append("call"), events.append)}):
        assert double(2) == 4
    assert events == ["call", 4]


# ---- refusals ----------------------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_before_training(tmp_path):
    process = run_script(BENCHMARKS / "quality.py", "--folder", tmp_path / "students", "--methods", "GAN")
    assert process.returncode == 2 and "GAN: unknown, expected some of student" in process.stderr
    assert not (tmp_path / "students").exists()


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("projection_scale.py", ["--quick"], "is not empty"),
        ("projection_scale.py", ["--layers", "0"], "at least 1"),
        ("projection_scale.py", ["--json", "/no/such/folder/figures.json"], "no such folder"),
        ("kill.py", [], "is not empty"),
        ("kill.py", ["--kills", "0"], "at least 1"),
        ("load.py", [], "is not empty"),
        ("load.py", ["--repeats", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_refused_and_other_files_are_kept(script, arguments, words, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    process = run_script(BENCHMARKS / script, "--folder", tmp_path, *arguments)
    assert (
        process.returncode == 2
        and words in process.stderr.splitlines()[-1]
        and "Traceback" not in process.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", phases(WARM))
def test_each_phase_can_be_simulated_and_run(phase):
    find = phases(WARM)[phase]
    assert find(simulate_peak) == pytest.approx(find(alive), rel=0.05)
    assert find(measured_peak) > -(2**27)  # a small phase may fit into memory that the process has already
