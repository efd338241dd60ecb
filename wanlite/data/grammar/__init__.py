"""A grammar of scenes -> varied prompts in English, each a function of a seed and its number. No torch."""

from .composition import compose, varied_prompts
from .held_out import is_held_out

__all__ = ["compose", "is_held_out", "varied_prompts"]
