"""The stages of a run: what they keep says what it was made of, and nothing that a student is examined on was learned from."""

import inspect
import json
import re

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import ROOT, TINY_TEACHER, run_script
from train_distillation import Settings, WanLiteStudent
from wanlite import block_cutting, calibration, projection
from wanlite.stages.complete import complete
from wanlite.stages.lessons import Words
from wanlite.stages.start import project_into, start_student
from wanlite.teacher_files import open_teacher_files


def kept(folder, kind):
    """Return what the folders of a kind in a run's cache say that they were made of."""
    return [json.loads((place / "made_of.json").read_text()) for place in sorted((folder / "cache").glob(f"{kind}-*"))]


def test_no_walk_that_is_learned_from_has_prompt_or_noise_of_one_that_students_are_examined_on_or_used_at(finished_run, tmp_path):
    pictures = tmp_path / "pictures"
    process = run_script(ROOT / "run_inference.py", "--model", finished_run[0], "--prompt", "a red ring", "--output_dir", pictures,
                         "--num_images_per_prompt", "4")
    assert process.returncode == 0, process.stderr
    walks = sorted((made_of["walks"] for made_of in kept(finished_run[0], "trajectories")), key=len)
    (*_, training), examined = walks, [walk for part in walks[:-1] for walk in part]
    assert len(walks) == 3 and len(training) == 64 and len(examined) > 16
    for column in (1, 2):                                    # prompts, seeds
        assert not {walk[column] for walk in training} & {walk[column] for walk in examined}
    assert len({seed for _, _, seed in training}) == 64
    drawn_with = {int(re.search(r"seed(\d+)", path.name)[1]) for path in pictures.glob("*seed*.png")}
    assert drawn_with == {0, 1, 2, 3} and min(walk[2] for part in walks for walk in part) > 10**9 * max(drawn_with)


@pytest.mark.parametrize("room", [projection, block_cutting, calibration])
def test_a_start_is_taken_again_only_if_it_was_made_by_the_same_code(room, tmp_path, monkeypatch):
    settings, accelerator = complete(Settings(cache_dir=str(tmp_path), projection="weights")), Accelerator()
    source = inspect.getsource
    files, student = open_teacher_files(TINY_TEACHER), WanLiteStudent(hidden_size=64, depth=4, num_heads=2, text_dim=64)
    words = Words(accelerator, TINY_TEACHER, tmp_path, ["a red ring"])

    def start():
        start_student(settings, student, files, words, ["a red ring"], (8, 8), accelerator)
        return {place.name for place in tmp_path.glob("start-*")}

    first = start()
    assert start() == first and len(first) == 1
    monkeypatch.setattr(inspect, "getsource", lambda which: source(which) + "# changed" * (which is room))
    assert len(start()) == 2


def test_what_is_kept_of_a_start_is_what_was_projected(tmp_path):
    settings, accelerator = complete(Settings(cache_dir=str(tmp_path), projection="weights", expert="low")), Accelerator()
    shape = {"hidden_size": 64, "depth": 4, "num_heads": 2, "text_dim": 64}
    files, prompts = open_teacher_files(TINY_TEACHER), ["a red ring", "a blue cross"]
    words = Words(accelerator, TINY_TEACHER, tmp_path, prompts)
    started, again, expected = (WanLiteStudent(**shape) for _ in range(3))
    reports = [start_student(settings, student, files, words, prompts, (8, 8), accelerator) for student in (started, again)]
    report = project_into(expected, TINY_TEACHER, "low", torch.cat([words[prompt] for prompt in prompts]))
    assert reports[0] == reports[1] and reports[0]["expert_cosines"] == report.cosines
    for found in (started, again):
        assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())
