"""The settings of small parts, which two command lines have; torch is not imported."""

from typing import Any

from ..parts.defaults import STEPS
from .settings import setting

MEANINGS = {
    "text_width": "width of the small text encoder (default: half of the large one's, at most 768)",
    "text_depth": "its blocks (default: half of the large one's)",
    "text_heads": "its attention heads (default: in proportion to its width)",
    "text_ffn_dim": "its inner width (default: in proportion to its width)",
    "vocabulary": "file of prompts; only their words stay in the tokenizer of the small text encoder (default: all "
    "words stay)",
    "decoder_base_dim": "channels of the small decoder's last layers (default: the most with a quarter of the large "
    "one's parameters, at most 32)",
    "decoder_steps": f"steps of the small decoder (default: {STEPS['decoder']})",
    "reading_steps": "steps of the small text encoder towards the text that the student reads (default: "
    f"{STEPS['reading']})",
    "text_velocity_steps": "steps of the small text encoder towards the student's velocity (default: "
    f"{STEPS['text_velocity']})",
}
PART_SETTINGS = {  # of MEANINGS, by the part that they need
    "text_encoder": [name for name in MEANINGS if not name.startswith("decoder")],
    "decoder": [name for name in MEANINGS if name.startswith("decoder")],
}


def part_setting(name: str, **options: Any) -> Any:
    """Declare a setting of small parts, without a default of its own."""
    kind: dict[str, Any] = {"is_path": True} if name == "vocabulary" else {"least": 1}
    return setting(None, MEANINGS[name], **kind, **options)
