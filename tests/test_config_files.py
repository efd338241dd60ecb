"""--config: files of settings, which flags win over."""

import dataclasses
import json
import shutil

import pytest

from tests.conftest import ROOT, run_script
from tests.test_resuming import have_equal_weights
from train_distillation import Settings
from wanlite.planning.config_files import as_arguments, parse_with_config
from wanlite.planning.settings import make_parser
from wanlite.training.run_folder import read_run

TRAIN = ROOT / "train_distillation.py"


def parsed(*arguments):
    return Settings(**vars(parse_with_config(make_parser(Settings, ""), [*map(str, arguments)])))


@pytest.fixture
def write(tmp_path):
    def written(text, name="run.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return written


def test_a_file_sets_what_the_command_line_leaves_out(write):
    path = write(
        """
        teacher = "tiny"
        seed = 7
        [few_step]
        few_steps = [1, 2]
        num_inference_steps = 2
        use_ema = false
        learning_rate = 1e-3
        validation_prompts = ["a ring", "two = signs"]
        """
    )
    settings = parsed("--seed", 3, "--config", path)
    assert settings == Settings(
        config=str(path),
        teacher="tiny",
        seed=3,
        few_steps=[1, 2],
        num_inference_steps=2,
        use_ema=False,
        learning_rate=1e-3,
        validation_prompts=["a ring", "two = signs"],
    )
    assert parsed("--config", path, "--use_ema", "--few_steps", 4).few_steps == [4]


def test_all_settings_survive_a_file(write):
    """A file of all defaults, as a run.json has them, changes nothing."""
    path = write(json.dumps(dataclasses.asdict(Settings())), "all.json")
    assert dataclasses.replace(parsed("--config", path), config=None, few_steps=(1, 2, 4)) == Settings()
    assert as_arguments({"a": None, "b": True, "c": False, "d": [1, 2], "e": -1, "f": "-x"}) == [
        "--b",
        "--no-c",
        "--d",
        "1",
        "2",
        "--e=-1",
        "--f=-x",
    ]


def test_the_record_of_a_run_repeats_the_run(finished_run, tmp_path):
    shutil.copytree(finished_run[0] / "cache", tmp_path / "again/cache")
    process = run_script(TRAIN, "--config", finished_run[0] / "run.json", "--output_dir", tmp_path / "again")
    assert process.returncode == 0, process.stderr
    assert have_equal_weights(finished_run[0], tmp_path / "again")
    again, first = (read_run(folder)["settings"] for folder in (tmp_path / "again", finished_run[0]))
    assert {name for name in first if again[name] != first[name]} == {"config", "output_dir"}


@pytest.mark.parametrize(
    "name, text, words",
    [
        (
            "a.toml",
            "learning_rat = 3",
            "unrecognized arguments: --learning_rat=3 (did you mean --learning_rate?)",
        ),
        ("a.toml", "segment_steps = 3", "(did you mean --few_step_train_steps?)"),
        ("a.toml", "seed = 'x'", "argument --seed: invalid int value: 'x'"),
        ("a.toml", "seed = 1.5", "argument --seed: invalid int value: '1.5'"),
        ("a.toml", "seed = [1, 2]", "unrecognized arguments: 2"),
        ("a.toml", "seed = true", "argument --seed: expected one argument"),
        ("a.toml", "use_ema = 1", "argument --use_ema"),
        ("a.toml", "seed = -1", "--seed is -1, expected at least 0"),
        ("a.toml", "seed = 1\nseed = 2", "not TOML (Cannot overwrite a value"),
        ("a.toml", "seed = 1\n[more]\nseed = 2", "has seed twice, expected each setting once"),
        ("a.toml", "[a.b]\nseed = 1", "unrecognized arguments: --b={'seed': 1}"),
        ("a.toml", "=", "not TOML (Invalid"),
        ("a.toml", "a = " + "[" * 5000, "not TOML (nested too deeply)"),
        ("a.toml", "a." * 100_000 + "b = 1", "a line with more than 1,000 dots"),
        ("a.toml", "#" * 2**21, "more than 1,048,576 bytes"),
        ("a.json", "[]", "holds a list, expected an object"),
        ("a.json", "{", "not JSON"),
        ("a.yaml", "seed: 1", "expected a .toml or .json file, or the run.json of a run"),
        ("a.json", '{"help": true}', "help is not a setting"),
        ("a.json", '{"seed=1 --overwrite": true}', "is not a setting"),
        (
            "a.json",
            '{"few_steps": [1, "--overwrite"]}',
            "few_steps has '--overwrite', which a command line reads",
        ),
        ("a.json", f'{{"seed": {"9" * 300}}}', "--seed is 9999"),
        ("a.json", '{"settings": {"sead": 1}}', "--sead=1 (did you mean --seed"),
    ],
)
def test_a_file_with_a_fault_is_refused_by_name_in_one_line(name, text, words, write, tmp_path):
    path = write(text, name)
    process = run_script(TRAIN, "--config", path, "--output_dir", tmp_path / "run")
    assert process.returncode == 2 and process.stdout == "" and len(process.stderr.splitlines()) == 1
    assert words in process.stderr, process.stderr
    assert str(path) in process.stderr or "--seed is " in process.stderr
    assert len(process.stderr) < 500


def test_a_missing_file_is_refused(tmp_path):
    process = run_script(TRAIN, "--config", tmp_path / "none.toml")
    assert process.returncode == 2 and "none.toml: cannot be read (No such file" in process.stderr
