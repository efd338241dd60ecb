"""Prompts -> their embeddings, padded as in diffusers, or packed as a student takes them.

Legend: B images, L text length, T text width.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.text_encoder import encode_prompts, warn_of_truncation
from ..network import TextTokens, pack_states, pack_text, unpack_text


def encode_distinct(
    tokenizer: Any, text_encoder: Any, texts: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """Return {text: embedding (L, T)}; each distinct text is encoded once."""
    warn_of_truncation(tokenizer, texts, lambda text: warnings.warn(text, stacklevel=7))
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode_prompts(tokenizer, text_encoder, distinct, device=device)))


def pad_embeddings(embeddings: Sequence[Tensor]) -> Tensor:
    """Return embeddings, a list of (length, T), padded with zeros as in diffusers: (B, L, T)."""
    return unpack_text(pack_text(embeddings))


def pack_embeddings(embeddings: Tensor) -> TextTokens:
    """Return embeddings (B, L, T), padded with zeros, as TextTokens of their true lengths, on the CPU."""
    positions = torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device)
    lengths = (embeddings.ne(0).any(-1) * positions).amax(1).cpu()
    return pack_states(embeddings[:, : max(1, int(lengths.max()))].cpu(), lengths, embeddings.shape[1])
