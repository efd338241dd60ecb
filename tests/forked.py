"""Scripts that run in processes forked from one that has imported the libraries.

Importing torch, diffusers and transformers takes longer than a run of a few steps. Only libraries are imported
beforehand: each script imports this project itself.
"""

import atexit
import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from unittest.mock import patch

IMPORTED = (  # what a run and run_inference.py import
    "torch",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "diffusers.training_utils",
    "transformers.models.umt5.modeling_umt5",
    "torch.fx.experimental.symbolic_shapes",
    "accelerate",
    "ftfy",
    "jinja2",
    "scipy.linalg",
)
FIXED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
OWN = "PYTEST_CURRENT_TEST"  # pytest changes it for every test

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*IMPORTED, __name__])
original: dict[str, str] = {}  # the environment in which the libraries are imported


def remember_environment() -> None:
    """Let scripts run in forks from now on, in the environment of this moment."""
    original.update(os.environ)


def has_same_environment() -> bool:
    """Return whether a script may run in a fork: libraries read variables of the environment at their import."""
    return original == {name: value for name, value in os.environ.items() if name != OWN}


def import_libraries() -> None:
    """Import the libraries in this process, so that its forks need not."""
    for name in IMPORTED:
        importlib.import_module(name)


def run(arguments: list[str], cwd: str | Path, timeout: float) -> CompletedProcess:
    """Run `python *arguments` in a fork, as subprocess.run() does; the first is a script, or -m with a module."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        with patch.dict(os.environ, FIXED):  # the first call starts the process that imports the libraries
            process = CONTEXT.Process(target=run_main, args=(arguments, str(cwd), *paths))
            process.start()
        process.join(timeout)
        is_late = process.is_alive()
        if is_late:
            process.kill()
            process.join()
        printed = [Path(path).read_text() if os.path.exists(path) else "" for path in paths]
    if is_late:
        raise TimeoutExpired(arguments, timeout, *printed)
    return CompletedProcess([sys.executable, *arguments], process.exitcode, *printed)


def run_main(arguments: list[str], cwd: str, stdout: str, stderr: str) -> None:
    """Do what the interpreter does with these arguments, with the output in two files."""
    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout.reconfigure(line_buffering=False)
    os.chdir(cwd)
    script, *_ = sys.argv = arguments
    try:
        if script == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = cwd
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
