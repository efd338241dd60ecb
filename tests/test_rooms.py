"""The structure: what may import what, and what runs before torch is there."""

import ast
import sys

import pytest

from tests.conftest import ROOT, run_script

ROOMS = sorted(path for path in (ROOT / "wanlite").glob("*.py") if path.name != "__init__.py")
SCRIPTS = ("train_distillation.py", "run_inference.py")


def imported(path):
    """Return the modules that a file imports, rooms by their short names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module == "wanlite":
                names |= {f"wanlite.{node.module or alias.name}".replace("wanlite.wanlite", "wanlite") if node.module != "wanlite"
                          else f"wanlite.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_a_room_imports_at_most_one_other_room_and_never_a_script(room):
    names = imported(room)
    assert len({name for name in names if name.startswith("wanlite.")}) <= 1
    assert not names & {"train_distillation", "run_inference"}


def test_the_package_imports_nothing():
    assert not imported(ROOT / "wanlite/__init__.py")


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
