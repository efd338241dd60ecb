"""Settings and the configs of the large parts -> the sizes and steps of the small ones."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from .decoder_projection import has_width, widest
from .defaults import LARGE_WIDTH, STEPS
from .text_projection import TextShape, default_shape

MAX_BASE_DIM = 32
DECODER_SHARE = 0.25  # of the parameters of the large decoder, at most


@dataclass(frozen=True)
class PartOptions:
    """Sizes and steps of the small parts."""

    decoder_base_dim: int | None  # None: the decoder stays
    text_shape: TextShape | None  # None: the text encoder stays
    num_images: int
    decoder_steps: int
    reading_steps: int
    text_velocity_steps: int
    seed: int
    checkpointing_steps: int
    decoder_batch: int = 16  # crops of 256 pixels at most
    text_batch: int = 64
    learning_rate: float = 2e-3
    vocabulary: str | None = None  # fingerprint of the prompts whose words stay; None: all words stay

    def facts(self) -> dict[str, Any]:
        """Return the options that affect the weights, as json."""
        facts = asdict(self)
        del facts["checkpointing_steps"]
        if self.vocabulary is None:  # as in folders of earlier versions
            del facts["vocabulary"]
        return facts


def choose_options(settings: Any, encoder_config: Any, autoencoder_config: Any, **others: Any) -> PartOptions:
    """Return the options of both parts, with sizes in proportion to the large ones where they are not set.

    `others` are options that replace the defaults of PartOptions.
    """
    shape = default_shape(encoder_config, settings.text_width)
    shape = TextShape(
        shape.width,
        settings.text_depth or shape.depth,
        settings.text_heads or shape.heads,
        settings.text_ffn_dim or shape.ffn,
    )
    is_decoder_small = settings.decoder == "small"
    is_real = encoder_config.d_model >= LARGE_WIDTH
    steps: dict[str, Any] = {
        f"{name}_steps": getattr(settings, f"{name}_steps") or (default.real if is_real else default.tiny)
        for name, default in STEPS.items()
    }
    return PartOptions(
        decoder_base_dim=(settings.decoder_base_dim or default_base_dim(autoencoder_config))
        if is_decoder_small
        else None,
        text_shape=shape if settings.text_encoder == "small" else None,
        num_images=settings.student_images,
        seed=settings.seed,
        checkpointing_steps=settings.checkpointing_steps,
        **steps,
        **others,
    )


def default_base_dim(config: Any) -> int:
    """Return the largest width of a decoder with at most DECODER_SHARE of the parameters, up to MAX_BASE_DIM."""
    largest = DECODER_SHARE * count_decoder(config, widest(config))
    widths = [width for width in range(1, min(MAX_BASE_DIM, widest(config)) + 1) if has_width(config, width)]
    fitting = (width for width in reversed(widths) if count_decoder(config, width) <= largest)
    return next(fitting, widths[0])


def count_decoder(config: Any, base_dim: int) -> int:
    """Return the parameters of the decoder of an autoencoder's config with `base_dim` channels."""
    return sum(weight.numel() for weight in empty_autoencoder(config, base_dim).decoder.parameters())


def empty_autoencoder(config: Any, base_dim: int) -> Any:
    """Return an autoencoder with a decoder of `base_dim` channels, on the meta device."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(known | {"decoder_base_dim": base_dim})
