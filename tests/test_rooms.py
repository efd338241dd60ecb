"""The structure: what may import what, and what runs before torch is there."""

import ast
import sys
from importlib.util import resolve_name

import pytest

from tests.conftest import ROOT, run_script

ROOMS, STAGES = (sorted(path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")
                 for folder in ("wanlite", "wanlite/stages"))
EMOJI = sorted((ROOT / "wanlite/emoji").glob("*.py"))
SCRIPTS = ("train_distillation.py", "run_inference.py")


def imported(path):
    """Return the modules that a file imports, and the names it takes from packages."""
    names, package = set(), ".".join(path.parent.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names} if module in ("wanlite", "wanlite.stages") else {module}
    return names


def test_what_is_imported_is_found():
    assert {"wanlite.measure", "wanlite.flow", "numpy"} <= imported(ROOT / "wanlite/stages/examiner.py")
    assert {"wanlite.shapes", "torch"} <= imported(ROOT / "wanlite/measure.py")


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_a_room_imports_at_most_one_other_room_and_neither_a_stage_nor_a_script(room):
    names = imported(room)
    assert len({name for name in names if name.startswith("wanlite.")}) <= 1
    assert not any(name.startswith("wanlite.stages") for name in names) and not names & {"train_distillation", "run_inference"}


@pytest.mark.parametrize("part", EMOJI, ids=lambda path: path.stem)
def test_a_file_of_the_emoji_world_imports_that_world_alone(part):
    assert all(name.startswith("wanlite.emoji") for name in imported(part) if name.startswith("wanlite"))


@pytest.mark.parametrize("stage", STAGES, ids=lambda path: path.stem)
def test_a_stage_imports_rooms_and_neither_another_stage_nor_a_script(stage):
    names = imported(stage)
    assert len({name for name in names if name.startswith("wanlite.")}) > 1, "this is a room"
    assert not any(name.startswith("wanlite.stages") for name in names) and not names & {"train_distillation", "run_inference"}


@pytest.mark.parametrize("package", ["wanlite", "wanlite/stages"])
def test_a_package_imports_nothing(package):
    assert not imported(ROOT / package / "__init__.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_answered_without_torch(script):
    code = (f"import runpy, sys\nsys.argv = ['{script}', '--help']\n"
            f"try: runpy.run_path('{script}', run_name='__main__')\n"
            "except SystemExit as end: assert end.code == 0\n"
            "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)")
    process = run_script("-c", code)
    assert process.returncode == 0, process.stderr
    assert "--seed" in process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_no_work(script, tmp_path):
    process = run_script("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script[:-3]}", cwd=tmp_path)
    assert process.returncode == 0 and process.stdout == "" and not list(tmp_path.iterdir()), process.stderr


def test_torch_is_new_enough_for_what_is_used():
    import torch
    assert hasattr(torch.optim, "Muon") and sys.version_info >= (3, 11)
