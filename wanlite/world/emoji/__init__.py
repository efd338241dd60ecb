"""The emoji world: endless captioned scenes of sprites, drawn by rule, and an exact judge of images generated
from captions.

Its interface is that of wanlite.world.shapes. A caption reads as a Scene whose unmentioned properties are
None: many images are right for it, so few steps are hard here.
"""

from .captions import caption, captions, leave_unsaid, read_caption, ways_to_say
from .judge import ATTRIBUTES, judge
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
    "leave_unsaid",
    "random_scene",
    "read_caption",
    "scenes",
    "ways_to_say",
]
