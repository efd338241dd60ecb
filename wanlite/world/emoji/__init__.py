"""The emoji world: captioned scenes of sprites, drawn by rule, and an exact judge of images.

It has the interface of wanlite.world.shapes. Captions omit properties of a scene, so that several different
images match a caption, which makes sampling in few steps hard.
"""

from .captions import all_captions, caption, captions, omit_properties, read_caption
from .judge import ATTRIBUTES, RIGHT, judge
from .scenes import (
    BACKGROUNDS,
    IMAGE_SIZE,
    KINDS,
    PLACES,
    Object,
    Scene,
    draw,
    ground,
    is_held_out,
    random_scene,
    scenes,
)
from .sprites import NAMES, SIZES, STYLES

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "KINDS",
    "NAMES",
    "IMAGE_SIZE",
    "PLACES",
    "RIGHT",
    "SIZES",
    "STYLES",
    "Object",
    "Scene",
    "caption",
    "captions",
    "draw",
    "ground",
    "is_held_out",
    "judge",
    "omit_properties",
    "random_scene",
    "read_caption",
    "scenes",
    "all_captions",
]
