"""Static checks: style, security, types."""

import inspect
import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from train_distillation import WanLiteStudent

PRODUCT = sorted(
    path
    for place in ("wanlite/**", "tools", "benchmarks", ".")
    for path in ROOT.glob(f"{place}/*.py")
    if not path.name.startswith("test_")
)


def checked(*command):
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )


def test_ruff_finds_no_errors():
    process = checked("ruff", "check", "--no-cache", ".")
    assert process.returncode == 0, process.stdout


def test_every_file_is_formatted():
    process = checked("ruff", "format", "--check", "--no-cache", ".")
    assert process.returncode == 0, process.stdout


def test_imports_are_in_order_in_every_file():
    process = checked("ruff", "check", "--select", "I", "--no-cache", ".")
    assert process.returncode == 0, process.stdout


def test_bandit_finds_no_issues():
    process = checked("bandit", "-q", "-c", "pyproject.toml", "-f", "json", "-r", *PRODUCT)
    report = json.loads(process.stdout)
    assert report["results"] == report["errors"] == [] and report["metrics"]["_totals"]["loc"] > 3000, (
        process.stdout
    )


def test_every_test_in_the_summary_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "INFERENCE_FIX_SUMMARY.md").read_text()))
    written = {
        name
        for path in (*(ROOT / "tests").glob("*.py"), *ROOT.glob("test_*.py"))
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 10 and named <= written, named - written


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The cache of mypy for torch and diffusers."""
    return tmp_path_factory.mktemp("mypy")


def test_types_agree(cache):
    process = checked("mypy", "--cache-dir", cache)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    "method",
    [
        WanLiteStudent.__init__,
        WanLiteStudent.forward,
        WanLiteStudent.save_pretrained,
        WanLiteStudent.from_pretrained,
    ],
    ids=lambda method: method.__name__,
)
def test_public_functions_are_annotated(method):
    parameters = list(inspect.signature(method).parameters.values())
    unsaid = [
        p.name for p in parameters if p.annotation is p.empty and p.name != "self" and p.kind != p.VAR_KEYWORD
    ]
    assert len(parameters) > 5 and not unsaid


def test_wrong_types_are_reported(tmp_path, cache):
    (tmp_path / "mine.py").write_text(
        "from train_distillation import WanLiteStudent\n"
        "student = WanLiteStudent.from_pretrained('here', dtype='bfloat16', device_map={'': 'cpu'}, "
        "sha256={'a': 'b'})\n"
        "WanLiteStudent(hidden_size=64, depth=4).save_pretrained('there', variant='fp16', "
        "max_shard_size=1000)\n"
        "WanLiteStudent.from_pretrained(5)\n"
        "WanLiteStudent.from_pretrained('here', subfolder=3)\n"
        "WanLiteStudent(depth='4')\n"
        "WanLiteStudent(depth=4).save_pretrained('there', variant=16)\n"
    )
    process = checked(
        "mypy", "--cache-dir", cache, "--config-file", ROOT / "pyproject.toml", tmp_path / "mine.py"
    )
    assert [int(line) for line in re.findall(r"mine\.py:(\d+): error", process.stdout)] == [4, 5, 6, 7], (
        process.stdout
    )
