"""Prompts -> the embeddings that a Wan model attends to.

Every embedding has its prompt's true length; network.pack_text adds the zero padding, at the cost of one token.

Legend: L text length, T text width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from ..network import TEXT_LENGTH
from .shards import fill_shards, read_shard

BATCH_SIZE = 64  # prompts encoded together
TOKENS_AT_ONCE = 8192  # 16 prompts of 512, whose attention in a real UMT5 takes about 2 GB
MAX_SHOWN = 80  # characters of a prompt in a message
# arguments of from_pretrained(): faults are returned, and refused in check_loaded()
CHECKED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def load_tokenizer(folder: str | Path) -> Any:
    """Load a tokenizer from its folder, in a Wan folder or in a saved student."""
    with named(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # nosec B615: a folder


def load_text_encoder(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, UMT5EncoderModel]:
    """Load the tokenizer and the frozen UMT5 encoder of a Wan folder or of a saved student.

    Raises ValueError if they belong to two models: if the vocabulary, without added tokens, exceeds the
    embedding.
    """
    folder, tokenizer = Path(folder), load_tokenizer(Path(folder) / "tokenizer")
    with named(folder / "text_encoder"):
        result: Any = UMT5EncoderModel.from_pretrained(  # nosec B615: a folder
            folder,
            subfolder="text_encoder",
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            **CHECKED,
        )
    encoder, loaded = result
    check_loaded(folder / "text_encoder", encoder, loaded)
    embedding = encoder.encoder.embed_tokens.weight
    # 100 rows: a comparison of all of Wan's takes a GB of booleans
    if not embedding[:100].any() or not torch.equal(embedding, encoder.shared.weight):
        raise OSError(
            f"{folder}/text_encoder: the token embedding came out zero or untied, a fault of transformers 5.0 to "
            f"5.2 with Wan's UMT5. Install transformers >= 5.3."
        )
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    largest = max((number for token, number in vocabulary.items() if token not in added), default=0)
    if largest >= len(embedding):
        raise ValueError(
            f"{folder}/tokenizer: has tokens up to number {largest:,}, and {folder}/text_encoder embeds "
            f"{len(embedding):,}: they belong to two models. Download or copy both again, from one model."
        )
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


@contextmanager
def named(place: Path | str) -> Iterator[None]:
    """Turn any error of a library about files into one line with their folder."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{place}: cannot be loaded ({' '.join(str(error).split()) or type(error).__name__}). Download or copy "
            f"it again."
        ) from None


def check_loaded(place: Path | str, network: torch.nn.Module, loaded: Mapping[str, Any]) -> None:
    """Refuse a network with tensors that are not finite or were not in its files; `loaded` is the information of
    from_pretrained().

    Missing tensors would be random numbers, without any error in training and inference.
    """
    for fault, names in (
        ("lacks", loaded["missing_keys"]),
        ("holds unknown", loaded["unexpected_keys"]),
        ("holds in another shape", [name for name, *_ in loaded["mismatched_keys"]]),
    ):
        if names:
            raise ValueError(
                f"{place}: {fault} {', '.join(sorted(names)[:3])} ({len(names)} of its tensors), expected those that "
                f"its config.json implies. Weights belong to another model or are incomplete: download or copy it "
                f"again."
            )
    for name, tensor in network.state_dict().items():
        if not all(map(math.isfinite, tensor.aminmax())):  # isfinite() and a float32 sum would take memory
            raise ValueError(f"{place}: {name} holds NaN or infinity. Download or copy it again.")


def lazy_encoder(folder: str | Path, device: str | torch.device) -> Callable[[Sequence[str]], dict]:
    """Return a function that encodes prompts: {"text": concatenated embeddings (sum of L, T), "length": (B,)}.

    Tokenizer and encoder are loaded at its first call, and freed with it.
    """

    @cache
    def loaded():
        return load_text_encoder(folder, device)

    def encode(prompts):
        tokenizer, encoder = loaded()
        embeddings = encode_prompts(tokenizer, encoder, prompts)
        return {
            "text": torch.cat(embeddings),
            "length": torch.tensor([len(embedding) for embedding in embeddings]),
        }

    return encode


def encode_once(
    accelerator, encode: Callable, prompts: Sequence[str], folder: Path
) -> dict[str, torch.Tensor]:
    """Encode different prompts with a lazy_encoder(): {prompt: embedding (L, T)}, memory-mapped from `folder`."""
    num_shards = fill_shards(
        accelerator, folder, [(prompt,) for prompt in prompts], encode, "text", unit="prompt"
    )
    shards = (read_shard(folder, index) for index in range(num_shards))
    embeddings = (shard["text"].split(shard["length"].tolist()) for shard in shards)
    return dict(zip(prompts, chain.from_iterable(embeddings)))


@torch.no_grad()
def encode_prompts(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], tokens_at_once: int = TOKENS_AT_ONCE
) -> list[torch.Tensor]:
    """Return one embedding (L, T) of each prompt, at its true length."""
    embeddings: list[torch.Tensor] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        tokens = _tokenize(
            tokenizer, batch, padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        _check_embedded(tokenizer, encoder, batch, tokens.input_ids)
        rows = max(1, tokens_at_once // tokens.input_ids.shape[1])
        for ids, mask in zip(
            *(part.to(encoder.device).split(rows) for part in (tokens.input_ids, tokens.attention_mask))
        ):
            states = encoder(ids, mask).last_hidden_state  # (B, L, T)
            embeddings += [state[is_word] for state, is_word in zip(states, mask.bool())]
    return embeddings


def _tokenize(tokenizer, prompts, **how):
    """Tokenize as Wan does, with padding and truncation at the end for any tokenizer config."""
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer(
        [prompt_clean(prompt) for prompt in prompts], return_attention_mask=True, verbose=False, **how
    )


def _check_embedded(tokenizer, encoder, prompts, ids):
    """Refuse a prompt with a token beyond the encoder's embedding."""
    size = encoder.get_input_embeddings().num_embeddings
    for prompt, token in zip(prompts, ids.amax(1).tolist()):
        if token >= size:
            raise ValueError(
                f"{tokenizer.name_or_path}: gives {_short(prompt)} token {token:,}, and "
                f"{encoder.name_or_path}/text_encoder embeds {size:,}. Change the prompt, or copy both again, from one "
                f"model."
            )


def warn_of_truncation(tokenizer: Any, prompts: Sequence[str], log: Callable[[str], Any]) -> None:
    """Log the number of prompts above TEXT_LENGTH tokens, if any, and the first of them."""
    truncated: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        truncated += [
            prompt
            for prompt, ids in zip(batch, _tokenize(tokenizer, batch).input_ids)
            if len(ids) > TEXT_LENGTH
        ]
    if truncated:
        log(
            f"WARNING: prompts truncated to the limit of {TEXT_LENGTH} tokens: {len(truncated):,}, first "
            f"{_short(truncated[0])}"
        )


def _short(prompt):
    """Return the beginning of a prompt, for a message."""
    return repr(prompt) if len(prompt) <= MAX_SHOWN else f"{prompt[:MAX_SHOWN]!r}..."
