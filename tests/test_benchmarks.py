"""The benchmark of projection at full scale: what it writes is a Wan, what it measures is told, what is not its own stays."""

import json

import pytest
import torch

from benchmarks.projection_scale import num_bytes, remove_expert, teacher_config, tensor_shapes, write_expert
from tests.conftest import ROOT, run_script
from wanlite.teacher import open_teacher_files

SCRIPT = ROOT / "benchmarks" / "projection_scale.py"


@pytest.mark.parametrize("name, parameters, tensors", [("a14b", 14_288_491_584, 1095), ("14b", 14_288_491_584, 1095),
                                                       ("5b", 4_999_787_712, 825), ("1.3b", 1_418_996_800, 825)])
def test_a_shaped_expert_has_as_many_parameters_and_tensors_as_the_real_one(name, parameters, tensors):
    shapes = tensor_shapes(teacher_config(name))
    assert (num_bytes(shapes), len(shapes)) == (2 * parameters, tensors)


def test_a_written_expert_opens_as_wans_own_layout_and_shares_one_residual_basis(tmp_path):
    config = teacher_config("a14b") | {"dim": 512, "ffn_dim": 768, "num_layers": 2, "num_heads": 4}
    write_expert(tmp_path / "wan", config)
    files = open_teacher_files(tmp_path / "wan")
    expert = files.experts["only"]
    assert files.layout == "official" and len(list((tmp_path / "wan").glob("*-of-00006.safetensors"))) == 6
    assert 2 * expert.num_parameters == num_bytes(tensor_shapes(config))
    assert all(torch.isfinite(expert.read(name)).all() for name in expert.places)
    basis = torch.linalg.svd(expert.read("blocks.0.ffn.net.0.proj.weight")).Vh[:128]     # what one block reads most
    written = expert.read("blocks.1.ffn.net.2.weight")
    assert (basis @ written).square().sum() > 0.8 * written.square().sum()              # is what another writes most
    remove_expert(tmp_path / "wan")
    assert not (tmp_path / "wan").exists()


def test_quick_measurement_tells_its_figures_and_leaves_no_folder(tmp_path):
    process = run_script(SCRIPT, "--quick", "--folder", tmp_path / "wan", "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stderr
    assert str(tmp_path / "wan") in process.stdout.splitlines()[0] and "peak anonymous memory" in process.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() >= {"teacher", "student", "peak_gib", "peak_anonymous_gib", "seconds", "seconds_reading",
                              "seconds_arithmetic", "bytes_read", "read_gb_per_s", "plain_read_gb_per_s", "device"}
    assert figures["peak_gib"] >= figures["peak_anonymous_gib"] > figures["anonymous_before_gib"] > 0
    assert figures["bytes_read"] >= num_bytes(tensor_shapes(teacher_config("a14b", is_quick=True)))
    assert figures["seconds"] == pytest.approx(figures["seconds_reading"] + figures["seconds_arithmetic"])
    assert not (tmp_path / "wan").exists()


@pytest.mark.parametrize("arguments, words", [(["--quick"], "is not empty"), (["--layers", "0"], "at least 1"),
                                              (["--json", "/no/such/folder/figures.json"], "no such folder")])
def test_what_is_wrong_is_refused_and_a_folder_of_somebody_else_stays(arguments, words, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    process = run_script(SCRIPT, "--folder", tmp_path, *arguments)
    assert process.returncode == 2 and words in process.stderr and len(process.stderr.splitlines()) == 1
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_disk_that_is_too_small_is_refused_with_what_is_needed(tmp_path):
    process = run_script(SCRIPT, "--layers", "4000", "--folder", tmp_path / "wan")
    needed = num_bytes(tensor_shapes(teacher_config("a14b", layers=4000))) / 1e9
    assert process.returncode == 2 and f"takes {needed:.1f} GB" in process.stderr
    assert not (tmp_path / "wan").exists()


def test_a_student_that_cannot_be_cut_is_refused_before_anything_is_written(tmp_path):
    process = run_script(SCRIPT, "--quick", "--num_heads", "3", "--folder", tmp_path / "wan")
    assert process.returncode == 2 and "--num_heads" in process.stderr
    assert not (tmp_path / "wan").exists()
