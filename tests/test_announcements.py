"""What a user is told: commands that a shell takes as they are meant, and figures that are worth no more than
they are.
"""

import ast
import os
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from train_distillation import Settings
from wanlite.phases import MIN_TRAJECTORIES
from wanlite.planning.messages import announce_few, command, conclude, drawing_command, share_right, verdict
from wanlite.planning.resolve import complete
from wanlite.training.run_folder import write_model_card

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


def taken_by_a_shell(text):
    """Return the words that a shell makes of a command, without running it."""
    words = text.replace("python", "printf '%s\\0'", 1)
    return subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]


@pytest.mark.parametrize("path", PATHS)
def test_a_printed_command_is_taken_by_a_shell_as_it_is_meant(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert taken_by_a_shell(drawing_command(path)) == ["run_inference.py", "--model", path]
    assert taken_by_a_shell(command("train_distillation.py", "--prompts", path)) == [
        "train_distillation.py",
        "--prompts",
        path,
    ]


def test_a_command_typed_elsewhere_names_where_the_script_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shlex.split(drawing_command("x"))[1] == str(ROOT / "run_inference.py")


@pytest.mark.parametrize("name", ["-x", "--model", "-"])
def test_a_folder_that_begins_with_a_dash_is_no_flag(name):
    settings = complete(Settings(output_dir=name))
    assert settings.output_dir == f"./{name}" and os.path.samefile(".", os.path.dirname(settings.output_dir))
    assert shlex.split(drawing_command(settings.output_dir))[-1] == f"./{name}"


@pytest.mark.parametrize("path", PATHS)
def test_the_commands_of_a_model_card_hold_whatever_the_folder_is_called(path, tmp_path):
    settings = SimpleNamespace(
        output_dir=path, teacher="wan", resolution=64, num_inference_steps=4, project_only=False
    )
    write_model_card(tmp_path, settings, [4], {}, drawing_command(path))
    card = (tmp_path / "README.md").read_text()
    assert shlex.quote(path) in card
    assert [ast.literal_eval(found) for found in re.findall(r"from_pretrained\((.+?)[,)]", card)] == [
        path,
        path,
    ]


# ---- how it ended ------------------------------------------------------------------------------------------


def told(results, is_close=True, folder="out"):
    said = []
    conclude(Settings(output_dir=folder), ROOT, results, verdict(1400, is_close), is_close, 204, said.append)
    return "\n".join(said).splitlines()


def figures(accuracy, one, two):
    return {"accuracy": accuracy, "accuracy_one": one, "accuracy_two": two}


def test_a_share_of_few_captions_is_told_as_too_few_to_judge():
    assert share_right(figures(1.0, None, 1.0), 1) == "1 of 1, too few to judge"
    assert share_right(figures(0.6316, 0.5, 1.0), 19) == "12 of 19, too few to judge"
    assert share_right(figures(0.65, 0.5, 0.8), 20) == " 65.0%  (one object 50.0%, two 80.0%)"


def test_the_end_of_a_run_is_a_line_or_a_warning_and_what_to_type_next():
    assert told({})[0] == "finished in 3.4 minutes; kept step 1400, the closest to the teacher"
    first, warning, *_, last = told({}, is_close=False, folder="my out")
    assert first == "finished in 3.4 minutes" and warning.startswith(
        "WARNING   no validation came close enough to the teacher"
    )
    assert last == "next: python run_inference.py --model 'my out'" or str(ROOT) in last


def test_little_to_learn_from_is_told_and_enough_is_not():
    said = []
    announce_few(4000, 4000, 400, said.append)
    announce_few(MIN_TRAJECTORIES, MIN_TRAJECTORIES, 16, said.append)
    assert not said
    announce_few(MIN_TRAJECTORIES, 29, 16, said.append)
    announce_few(30, 29, 1, said.append)
    few, warning, held_out = said
    assert held_out.startswith("held out 1, which are few: validations use training prompts as well")
    assert "29 are few: each is drawn about 10 times" in few and "WARNING  30 trajectories are few" in warning
    assert max(map(len, said)) <= 100
