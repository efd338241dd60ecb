"""Printed lines: commands that a shell parses as intended, and figures only where they mean something."""

import ast
import os
import re
import shlex
import subprocess
import unicodedata
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from train_distillation import Settings
from wanlite.phases import MIN_CAPTIONS, MIN_TRAJECTORIES
from wanlite.planning.hardware import LARGE_WIDTH
from wanlite.planning.messages import (
    announce_few,
    command,
    conclude,
    describe_accuracy,
    describe_expectation,
    describe_kept,
    drawing_command,
)
from wanlite.planning.resolve import complete
from wanlite.runtime.terminal import labelled
from wanlite.training.model_card import write_model_card

PATHS = [
    "plain",
    "two words",
    "it's",
    'say "no"',
    "$HOME/x",
    "a\nb",
    "`id`",
    "a;b&c",
    "*",
    "~x",
    "a\\\\b",
    "#x",
    "日本",
    "!!",
]


def parse_in_a_shell(text):
    """Return the arguments that a shell parses from a command, without running it."""
    words = text.replace("python", "printf '%s\\0'", 1)
    return subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]


@pytest.mark.parametrize("path", PATHS)
def test_a_shell_parses_a_printed_command_as_intended(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse_in_a_shell(drawing_command(path)) == ["run_inference.py", "--model", path]
    assert parse_in_a_shell(command("train_distillation.py", "--prompts", path)) == [
        "train_distillation.py",
        "--prompts",
        path,
    ]


def test_a_command_printed_in_another_directory_has_the_path_of_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shlex.split(drawing_command("x"))[1] == str(ROOT / "run_inference.py")


@pytest.mark.parametrize("name", ["-x", "--model", "-"])
def test_a_folder_that_begins_with_a_dash_is_not_taken_for_a_flag(name):
    settings = complete(Settings(output_dir=name))
    assert settings.output_dir == f"./{name}" and os.path.samefile(".", os.path.dirname(settings.output_dir))
    assert shlex.split(drawing_command(settings.output_dir))[-1] == f"./{name}"


def test_the_card_leaves_out_an_accuracy_on_too_few_captions(tmp_path):
    settings = SimpleNamespace(
        output_dir="out", teacher="wan", resolution=64, num_inference_steps=4, project_only=False
    )
    figures = {f"{name}_4": 0.5 for name in ("image_error", "diversity", "channel_drift")}
    for captions, is_shown in ((1, False), (MIN_CAPTIONS - 1, False), (MIN_CAPTIONS, True)):
        judged = {"captions": captions, "student_by_steps": {"4": {"accuracy": 0.0}}}
        write_model_card(tmp_path, settings, [4], figures | judged, "python x.py")
        card = (tmp_path / "README.md").read_text()
        assert ("captions drawn right" in card) == is_shown == ("The judge read" in card)
        assert "| 4 | 0.50 | 0.50 | 0.50 |" in card


@pytest.mark.parametrize("path", PATHS)
def test_the_commands_of_a_model_card_work_for_any_folder_name(path, tmp_path):
    settings = SimpleNamespace(
        output_dir=path, teacher="wan", resolution=64, num_inference_steps=4, project_only=False
    )
    write_model_card(tmp_path, settings, [4], {}, drawing_command(path))
    card = (tmp_path / "README.md").read_text()
    assert shlex.quote(path) in card
    assert [ast.literal_eval(found) for found in re.findall(r"from_pretrained\((.+?)[,)]", card)] == [path]


@pytest.mark.parametrize("negative", ["", "\u4f4e\u8d28\u91cf\uff0c" * 50, "blurry, " * 40, "a\nb"])
def test_the_lines_of_a_large_teacher_fit_for_any_negative_prompt(negative):
    run = SimpleNamespace(
        settings=Settings(negative_prompt=negative),
        files=SimpleNamespace(width=LARGE_WIDTH + 1),
        workload=lambda: SimpleNamespace(h100_hours=4.7),
        num_states=716_800,
    )
    lines = "\n".join(labelled(*line) for line in describe_expectation(run)).splitlines()
    assert all(len(line) + sum(map(is_wide, line)) <= 100 for line in lines)
    assert lines[0] == "fixed    guidance 4 and 3 and the negative prompt become part of the student"
    assert lines[1].startswith(
        '         negative prompt: "' if negative else "         negative prompt: empty"
    )


def is_wide(letter):
    return unicodedata.east_asian_width(letter) in ("W", "F")


# ---- the end of a run --------------------------------------------------------------------------------------


def last_lines(results, is_close=True, folder="out", advice=""):
    lines = []
    verdict = {"word": "good", "reason": "image error 0.27", "advice": advice}
    chosen = {"kept": describe_kept(1400, is_close)}
    run = {"results": results, "verdict": verdict, "chosen": chosen}
    conclude(run, Settings(output_dir=folder), 204, lines.append)
    return "\n".join(lines).splitlines()


def figures(accuracy, one, two):
    return {"accuracy": accuracy, "accuracy_one": one, "accuracy_two": two}


def test_the_accuracy_on_few_captions_is_too_few_to_judge():
    assert describe_accuracy(figures(1.0, None, 1.0), 1) == "1 of 1, too few to judge"
    assert describe_accuracy(figures(0.6316, 0.5, 1.0), 19) == "12 of 19, too few to judge"
    assert describe_accuracy(figures(0.65, 0.5, 0.8), 20) == " 65.0%  (one object 50.0%, two 80.0%)"


def test_a_run_ends_with_its_verdict_and_the_next_command():
    finished, verdict, *_ = last_lines({})
    assert finished == "finished in 3.4 minutes; kept step 1400, the closest to the teacher"
    assert verdict == "verdict  good: image error 0.27"
    first, _, change, _, report, curves, last = last_lines(
        {}, False, "my out", "--max_train_steps 2800: more"
    )
    assert report == "report   my out/report.html"
    assert curves == "curves   tensorboard --logdir 'my out/logs'"
    assert first.endswith("; kept the last step, 1400: no validation came close enough to the teacher")
    assert change == "change   --max_train_steps 2800: more"
    assert last == "next: python run_inference.py --model 'my out'" or str(ROOT) in last


def test_few_trajectories_and_prompts_are_logged_and_enough_are_not():
    lines = []
    announce_few(4000, 4000, 400, lines.append)
    announce_few(MIN_TRAJECTORIES, MIN_TRAJECTORIES, 16, lines.append)
    assert not lines
    announce_few(MIN_TRAJECTORIES, 29, 16, lines.append)
    announce_few(30, 29, 1, lines.append)
    few, warning, held_out = lines
    assert held_out.startswith("held out 1: validations also use training prompts")
    assert (
        "prompts  29: each is drawn about 10 times" in few and "WARNING  30 trajectories are few" in warning
    )
    assert max(map(len, lines)) <= 100
