"""The structure: the allowed imports, and the code that runs before torch is imported."""

import ast
import sys
from importlib.util import resolve_name

import pytest

from tests.conftest import ROOT, run_script

LAYERS = (  # from the top; a file imports from the layers below its own, or from its own folder
    ("wanlite.commands",),
    ("wanlite.small",),
    ("run_inference",),
    ("wanlite.serving",),
    ("wanlite.generation",),
    ("wanlite.pipeline", "wanlite.export", "wanlite.lora"),
    ("train_distillation",),
    ("wanlite.planning",),
    ("wanlite.parts",),
    ("wanlite.training",),
    ("wanlite.student", "wanlite.data"),
    ("wanlite.teacher",),
    ("wanlite.flow", "wanlite.network", "wanlite.phases"),
    ("wanlite.schedule",),
    ("wanlite.runtime", "wanlite.world"),
    ("wanlite.files",),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SCRIPTS = ("train_distillation.py", "run_inference.py")
FILES = sorted([*(ROOT / "wanlite").rglob("*.py"), *(ROOT / script for script in SCRIPTS)])
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}


def imported(path):
    """Return the modules of the project that a file imports, and the first names of all others."""
    names, package = set(), ".".join(path.parent.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= inner or {module}
    return names


def layer(module):
    """Return the layer of a module, as named in LAYERS."""
    return next((name for name in RANKS if module == name or module.startswith(f"{name}.")), None)


IMPORTS = {module: imported(path) & MODULES.keys() for module, path in MODULES.items()}


def test_imports_are_found():
    assert {"wanlite.training.metrics", "wanlite.flow"} <= imported(MODULES["wanlite.training.validation"])
    assert {"wanlite.world.shapes", "torch"} <= imported(MODULES["wanlite.training.metrics"])
    assert "wanlite.data.text_encoder" in imported(ROOT / "tools/train_tiny_teacher.py")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"wanlite"}))
def test_a_module_imports_downwards_or_beside_itself(module):
    assert layer(module), f"{module} is in no layer"
    wrong = [
        name
        for name in IMPORTS[module]
        if RANKS[layer(name)] <= RANKS[layer(module)] and layer(name) != layer(module)
    ]
    assert not wrong, f"{module} imports from above, or from the other folder of its layer"


def test_no_modules_import_each_other_in_a_circle():
    left = dict(IMPORTS)
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert not left


def test_importing_the_package_imports_no_module_of_it():
    code = (
        "import sys; before = set(sys.modules); import wanlite; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert run_script("-c", code).stdout.strip() == "{'wanlite'}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed_without_torch(script):
    code = (
        f"import runpy, sys\nsys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path('{script}', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    process = run_script("-c", code)
    assert process.returncode == 0, process.stderr
    assert "--seed" in process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_no_work(script, tmp_path):
    process = run_script(
        "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script[:-3]}", cwd=tmp_path
    )
    assert process.returncode == 0 and process.stdout == "" and not list(tmp_path.iterdir()), process.stderr


def test_torch_is_new_enough():
    import torch

    assert hasattr(torch.optim, "Muon") and sys.version_info >= (3, 11)
