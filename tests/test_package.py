"""The package as pip installs it: complete in its own folder and independent of this repository."""

import tomllib
from importlib.metadata import Distribution
from importlib.util import find_spec

import pytest

import wanlite
from tests.conftest import ROOT, run_script
from train_distillation import WanLiteStudent
from wanlite.generation.student import StudentPipeline
from wanlite.pipeline import WanLitePipeline
from wanlite.planning.resolve import NAMED_TEACHERS
from wanlite.world.emoji.sprites import ATLAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = {"wanlite-train": "train_distillation.py", "wanlite-generate": "run_inference.py"}


def requirements(path):
    """Return {name: pinned version} of a requirements file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def test_public_classes_are_those_of_the_scripts():
    assert wanlite.WanLiteStudent is WanLiteStudent and wanlite.StudentPipeline is StudentPipeline
    assert wanlite.WanLitePipeline is WanLitePipeline
    assert set(wanlite.__all__) <= set(dir(wanlite))
    with pytest.raises(AttributeError, match="module 'wanlite' has no attribute 'WanStudent'"):
        _ = wanlite.WanStudent


def test_dependencies_have_lower_bounds_and_tested_versions():
    bounds = dict(each.split(">=") for each in PROJECT["project"]["dependencies"])
    tested = requirements(ROOT / "requirements.txt")
    assert bounds.keys() == tested.keys()
    assert all(numbers(bounds[name]) <= numbers(tested[name]) for name in bounds)
    assert not tested.keys() & requirements(ROOT / "requirements-dev.txt").keys()


def numbers(version):
    return [int(number) for number in version.split(".")]


def test_every_file_that_the_code_reads_is_in_the_wheel():
    included = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"])
    folders = [folder for folder in (*NAMED_TEACHERS.values(), ATLAS) if folder.is_dir()]
    assert {path.parent for path in folders} == {ROOT}
    assert included == {"wanlite", *COMMANDS.values(), *(folder.name for folder in folders)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with only the files of `pip install`."""
    if not find_spec("hatchling"):
        pytest.skip("needs hatchling")
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target)
    process = run_script("-m", "pip", "install", *options, ROOT)
    assert process.returncode == 0, process.stderr
    return target


def run_installed(installed, *arguments, cwd):
    """Run Python in `cwd` with the installed folder first on the path, and without this repository."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); exec(sys.argv.pop(1))"
    return run_script("-c", code, *arguments, cwd=cwd)


def test_the_student_is_imported_from_any_directory(installed, tmp_path):
    code = (
        "from wanlite import WanLiteStudent, __version__; import train_distillation; "
        "print(__version__, train_distillation.__file__)"
    )
    process = run_installed(installed, code, cwd=tmp_path)
    assert process.stdout.split() == [wanlite.__version__, str(installed / "train_distillation.py")], (
        process.stderr
    )
    (metadata,) = installed.glob("wanlite-*.dist-info")
    assert Distribution.at(metadata).version == wanlite.__version__
    assert (installed / "wanlite/training/report/template.html").is_file()
    assert (installed / "wanlite/py.typed").is_file() and (metadata / "licenses/LICENSE").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_console_command_runs_its_script(name, installed, tmp_path):
    process = run_installed(installed, command(name), "--help", cwd=tmp_path)
    assert process.returncode == 0 and process.stdout.startswith(f"usage: {COMMANDS[name]}"), process.stderr
    process = run_installed(installed, command(name), "--sed", "1", cwd=tmp_path)
    assert process.returncode == 2 and "--sed (did you mean --seed" in process.stderr


def command(name):
    """Return the code of a console command, without the line that names an interpreter."""
    module, function = PROJECT["project"]["scripts"][name].split(":")
    return f"from {module} import {function}; sys.exit({function}())"


def test_an_installed_dry_run_plans_with_the_tiny_teacher(installed, tmp_path):
    process = run_installed(installed, command("wanlite-train"), "--dry_run", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert str(installed / "tiny_teacher") in process.stdout.splitlines()[0]
    assert not list(tmp_path.iterdir())
