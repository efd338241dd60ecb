"""The recipe of each world's tiny teacher: sizes of its networks, settings of its training, auxiliary tasks.

The heads of the two auxiliary tasks are discarded: each word of an object's phrase predicts every fact of that
object, and each image token predicts the object in it. Scenes are drawn by rule, so both answers are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from wanlite.world import emoji, shapes
from wanlite.world.emoji.captions import PLURALS
from wanlite.world.emoji.scenes import corner
from wanlite.world.emoji.sprites import ATLAS

GRID = 4  # image tokens along each side
TOKEN = 16  # pixels along a token's side


@dataclass(frozen=True)
class Recipe:
    """Settings of a world's teacher.

    `plan` has the settings of each stage: steps, batch size, learning rates of AdamW and of Muon (None: only
    AdamW), EMA decay, and the last share of the steps over which learning rates fall to zero (None: a cosine
    over all steps). `gates` has a lower bound of each figure of a stage, or an upper bound if a minus sign
    precedes its name.
    """

    name: str
    world: ModuleType
    autoencoder: dict
    text: dict
    expert: dict
    plan: dict
    guidance: dict  # high, low
    judged: tuple  # (steps, is_guided) of each judgement of the finished teacher; gates apply to the first
    dtype: torch.dtype  # of the files
    notice: Path | None  # a file that is copied to the weights
    num_scenes: int  # encoded once
    num_worded: int  # scenes whose captions make the vocabulary
    cropped: tuple  # pixels of a crop, and the share of the autoencoder's steps, from the first, on crops
    help_weight: float  # of the auxiliary loss of image tokens in the first step; it falls to zero
    is_compiled: bool  # whether the experts' step is compiled, in bfloat16, which takes a minute at first
    facts: dict  # {name: values} that a word predicts
    # {name: number of classes} that an image token predicts; the last class stands for an empty token
    labels: dict
    spoken: Callable  # the scene of a caption -> [(consecutive words, {name of a fact: value})]
    layout: Callable  # a scene -> labels of its image tokens (GRID * GRID, len(labels))
    gates: dict


def _autoencoder(**sizes):
    return dict(
        z_dim=16,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        **sizes,
    )


def _text(width, head, hidden):
    return dict(
        d_model=width,
        d_kv=head,
        d_ff=hidden,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
    )


def _expert(head, hidden, layers, text_width):
    return dict(
        num_attention_heads=4,
        attention_head_dim=head,
        in_channels=16,
        out_channels=16,
        text_dim=text_width,
        freq_dim=256,
        ffn_dim=hidden,
        num_layers=layers,
        rope_max_seq_len=64,
    )


def _stage(steps, batch_size, learning_rate, muon_rate, ema, decay=None):
    return dict(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        muon_rate=muon_rate,
        ema=ema,
        decay=decay,
    )


# ---- shapes ------------------------------------------------------------------------------------------------


def _shapes_spoken(scene):
    return [(str(thing).split(), vars(thing)) for thing in scene.objects]


def _shapes_layout(scene):
    answers = np.tile([len(shapes.COLOURS), len(shapes.SHAPES), len(shapes.SIZES)], (GRID, GRID, 1))
    for thing in scene.objects:
        x, y = (place // TOKEN for place in shapes.PLACES[thing.place])
        answers[y - 1 : y + 1, x - 1 : x + 1] = [
            list(shapes.COLOURS).index(thing.colour),
            shapes.SHAPES.index(thing.shape),
            list(shapes.SIZES).index(thing.size),
        ]
    return answers.reshape(-1, 3)


SHAPES = Recipe(
    name="shapes",
    world=shapes,
    autoencoder=_autoencoder(base_dim=16, dim_mult=[1, 2, 2]),
    text=_text(64, 16, 256),
    expert=_expert(32, 512, 4, 64),
    plan={
        "autoencoder": _stage(3000, 24, 2e-3, None, 0.995),
        "text": _stage(1500, 128, 2e-3, None, 0.98),
        "shared": _stage(3000, 192, 2e-3, 0.02, 0.998),
        "high": _stage(900, 192, 5e-4, 0.005, 0.998),
        "low": _stage(900, 192, 5e-4, 0.005, 0.998),
    },
    guidance={"high": 4.0, "low": 3.0},
    judged=((20, True),),
    dtype=torch.float32,
    notice=None,
    num_scenes=60_000,
    num_worded=2000,
    cropped=(shapes.IMAGE_SIZE, 0.0),
    help_weight=0.1,
    is_compiled=False,
    facts={
        "size": tuple(shapes.SIZES),
        "colour": tuple(shapes.COLOURS),
        "shape": shapes.SHAPES,
        "place": tuple(shapes.PLACES),
    },
    labels={
        "colour": len(shapes.COLOURS) + 1,
        "shape": len(shapes.SHAPES) + 1,
        "size": len(shapes.SIZES) + 1,
    },
    spoken=_shapes_spoken,
    layout=_shapes_layout,
    gates={
        "autoencoder": {"whole": 0.98},
        "text": {"words_that_know_their_object": 0.99},
        "pipeline": {"one_accuracy": 0.98, "two_accuracy": 0.98},
    },
)


# ---- emoji -------------------------------------------------------------------------------------------------


def _emoji_spoken(scene):
    """Describe two objects of a kind as one phrase, with the place of the first, which stands for their axis."""
    spoken = []
    for thing in scene.objects[:1] if scene.kind == "two" else scene.objects:
        noun = PLURALS[thing.name] if scene.kind == "two" else thing.name
        words = [thing.size if scene.kind == "one" else None, thing.style, noun]
        facts = {
            "name": thing.name,
            "style": thing.style,
            "size": thing.size,
            "place": thing.place,
            "kind": scene.kind,
            "background": scene.background,
        }
        spoken.append(([word for word in words if word], facts))
    return spoken


def _emoji_layout(scene):
    answers = np.tile([len(emoji.NAMES), len(emoji.STYLES)], (GRID, GRID, 1))
    centres = np.arange(GRID) * TOKEN + TOKEN // 2
    for thing in scene.objects:
        across, down = (
            abs(centres - first - emoji.SIZES[thing.size] / 2) < emoji.SIZES[thing.size] / 2
            for first in corner(thing.size, thing.place)
        )
        answers[np.ix_(down, across)] = [emoji.NAMES.index(thing.name), emoji.STYLES.index(thing.style)]
    return answers.reshape(-1, 2)


EMOJI = Recipe(
    name="emoji",
    world=emoji,
    autoencoder=_autoencoder(base_dim=24, dim_mult=[1, 2, 2], decoder_base_dim=32),
    text=_text(128, 32, 384),
    expert=_expert(64, 512, 6, 128),
    plan={
        "autoencoder": _stage(18_000, 16, 2e-3, 0.02, 0.998, 0.4),
        "text": _stage(1500, 128, 2e-3, None, 0.98),
        "shared": _stage(5350, 192, 2e-3, 0.02, 0.999, 0.3),
        "high": _stage(400, 192, 5e-4, 0.005, 0.99),
        "low": _stage(400, 192, 5e-4, 0.005, 0.99),
    },
    guidance={"high": 3.0, "low": 3.0},
    judged=((40, True), (40, False), (4, True), (1, True)),
    dtype=torch.bfloat16,
    notice=ATLAS / "NOTICE",
    num_scenes=100_000,
    num_worded=8000,
    cropped=(32, 0.92),
    help_weight=0.1,
    is_compiled=True,
    facts={
        "name": emoji.NAMES,
        "style": (*emoji.STYLES, None),
        "size": (*emoji.SIZES, None),
        "place": (*emoji.PLACES, None),
        "kind": emoji.KINDS,
        "background": (*emoji.BACKGROUNDS, None),
    },
    labels={"name": len(emoji.NAMES) + 1, "style": len(emoji.STYLES) + 1},
    spoken=_emoji_spoken,
    layout=_emoji_layout,
    gates={
        "autoencoder": {"psnr_db": 29.0, "-residual": 0.05, "whole": 0.95},
        "text": {"words_that_know_their_object": 1.0},
        "pipeline": {"one_seen": 0.95, "two_seen": 0.9, "one_accuracy": 0.85, "two_accuracy": 0.85},
    },
)

RECIPES = {"shapes": SHAPES, "emoji": EMOJI}
