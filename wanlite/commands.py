"""The console commands: each runs a script, wherever it is installed."""

from runpy import run_module


def train():
    _run_script("train_distillation")


def generate():
    _run_script("run_inference")


def small():
    _run_script("wanlite.small")


def export():
    _run_script("wanlite.export")


def lora():
    _run_script("wanlite.lora")


def _run_script(module):
    """Run a script as `python script.py` does, so that it checks its arguments before it imports torch."""
    run_module(module, run_name="__main__", alter_sys=True)
