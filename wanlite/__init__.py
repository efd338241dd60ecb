"""Wan2.2 as a small text-to-image student: the layers below train_distillation.py and run_inference.py."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_distillation import WanLiteStudent as WanLiteStudent

    from .generation.student import StudentPipeline as StudentPipeline
    from .pipeline import WanLitePipeline as WanLitePipeline

__version__ = "0.1.0"
__all__ = ["StudentPipeline", "WanLitePipeline", "WanLiteStudent"]

_MODULES = {
    "StudentPipeline": "wanlite.generation.student",
    "WanLitePipeline": "wanlite.pipeline",
    "WanLiteStudent": "train_distillation",
}


def __getattr__(name):
    """Import a public class at its first use, so that `import wanlite` does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__():
    return sorted({*globals(), *__all__})
