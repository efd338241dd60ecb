"""A run ends normally if its output is not read, or cannot be encoded."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SHORT_RUN
from wanlite.runtime.terminal import one_line

PRINTING_CODE = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from wanlite.runtime.terminal import keep_output_open
keep_output_open()
import logging
from tqdm import tqdm
for number in tqdm(range(300), mininterval=0):
    print("a line \\N{{ARTIST PALETTE}} \\ud800", number, flush=True)
    logging.warning("another \\N{{ARTIST PALETTE}}")
file = open(sys.argv[1], "w")
assert file.fileno() > 2
file.write("whole")
"""
WARNING_CODE = f"""import sys, warnings
sys.path.insert(0, {str(ROOT)!r})
from wanlite.runtime.terminal import keep_output_open
keep_output_open()
warnings.warn("a folder holds\\ntwo files", stacklevel=1)
warnings.warn(FutureWarning("another"))
"""
ENCODINGS = (
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C"},
    {"PYTHONIOENCODING": "cp1252:strict", "PYTHONUNBUFFERED": "1"},
)


def shell(command, *arguments, **environment):
    """Run a line of bash in which "$@" is Python with `arguments`; a pipe fails if one of its parts fails."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", "bash", sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
    )


@pytest.mark.parametrize(
    "command",
    [
        '"$@" | head -1',
        '"$@" 2>&1 | head -1',
        '"$@" | true',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" <&- >&- 2>&-',
        '"$@" >/dev/full 2>&1',
    ],
)
def test_a_process_ends_normally_whatever_its_output_is_connected_to(command, tmp_path):
    process = shell(command, "-c", PRINTING_CODE, tmp_path / "file")
    assert process.returncode == 0 and b"Error" not in process.stderr, process.stderr
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("environment", ENCODINGS)
def test_every_character_is_printed_in_a_narrow_encoding(environment, tmp_path):
    process = shell('"$@"', "-c", PRINTING_CODE, tmp_path / "file", **environment)
    assert process.returncode == 0 and b"\\ud800 299" in process.stdout


@pytest.mark.slow
def test_a_training_with_a_closed_pipe_saves_a_student(tmp_path):
    process = shell(
        '"$@" 2>&1 | head -1',
        ROOT / "train_distillation.py",
        "--output_dir",
        tmp_path / "run",
        *SHORT_RUN,
        "--validation_prompts",
        "🎨",
        PYTHONIOENCODING="ascii",
    )
    assert process.returncode == 0 and process.stdout.startswith(b"teacher")
    assert (tmp_path / "run/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("command", ['"$@" | head -1', '"$@" >&- 2>&-'])
def test_inference_with_a_closed_pipe_saves_all_images(command, finished_run, tmp_path):
    process = shell(
        command,
        ROOT / "run_inference.py",
        "--model",
        finished_run[0],
        "--output_dir",
        tmp_path,
        "--prompt",
        "🎨 ring",
        "--num_images_per_prompt",
        "3",
        PYTHONIOENCODING="ascii",
    )
    assert process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000-ring-seed0.png",
        "0001-ring-seed1.png",
        "0002-ring-seed2.png",
        "grid-0000-0002.png",
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain 🎨 ä", "plain 🎨 ä"),
        ("\x1b[2J\r\n", r"\x1b[2J\r\n"),
        ("\u202egpj", r"\u202egpj"),
        ("\ud800", r"\ud800"),
        ("a" * 50, "a" * 17 + "..."),
        ("\x9b" * 50, r"\x9b\x9b\x9b\x9b\..."),
        ("a" * 20, "a" * 20),
    ],
)
def test_text_of_any_origin_is_shown_in_one_line(text, expected):
    assert one_line(text, 20) == expected


def test_warnings_are_lines_without_the_place_in_the_code():
    process = subprocess.run([sys.executable, "-c", WARNING_CODE], capture_output=True, text=True)
    assert process.stderr == "WARNING: a folder holds\\ntwo files\nWARNING: another\n"


def test_control_characters_of_any_text_are_escaped_and_bars_still_move():
    code = PRINTING_CODE.partition("import logging")[0] + (
        'print("a\\x1b[2J\\x9b\\u202e\\n\\tb \\N{ARTIST PALETTE}", end="\\r", flush=True)\n'
        'print("\\x1b[A", end="", flush=True)\n'
    )
    process = shell('"$@"', "-c", code, PYTHONIOENCODING="utf-8")
    assert process.stdout.decode() == "a\\x1b[2J\\x9b\\u202e\n\tb \N{ARTIST PALETTE}\r\x1b[A"


@pytest.mark.parametrize(
    "error, words",
    [
        ('OverflowError("too\\nlarge")', "unexpected OverflowError (too large). The traceback is in "),
        ('type("Panic", (BaseException,), {})("a")', "unexpected Panic (a). The traceback is in "),
        ("RecursionError()", "unexpected RecursionError. The traceback is in "),
        (
            'OSError(28, "No space left on device", "/a", None, "/dev/full")',
            "-c: /dev/full: no space left on device (",
        ),
        ('OSError(28, "No space left on device")', "-c: No space left on device. Free some, or choose "),
        ('OSError(111, "Connection refused")', "-c: Connection refused.\n"),
        (
            'OSError(30, "Read-only file system", "/a/b")',
            "-c: /a/b: read-only file system. Choose a folder that ",
        ),
        (
            'OSError(5, "Input/output error", "/a")',
            "-c: /a: input/output error. Check the file and its disk.\n",
        ),
        ('OSError("/a: damaged. Copy it again.")', "-c: /a: damaged. Copy it again.\n"),
        ('ValueError("a\\x1b[2J\\nb")', "-c: a\\x1b[2J b\n"),
    ],
)
def test_an_error_that_nothing_catches_is_one_line(error, words, tmp_path):
    code = PRINTING_CODE.partition("import logging")[0] + f"raise {error}"
    process = shell('"$@"', "-c", code, TMPDIR=str(tmp_path))
    printed = process.stderr.decode()
    assert process.returncode == 2 and words in printed and printed.count("\n") == 1
    for path in tmp_path.iterdir():
        assert path.name in printed and "Traceback (most recent call last)" in path.read_text()
