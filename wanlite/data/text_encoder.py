"""Prompts -> the embeddings that a Wan model attends to.

Embeddings have the length of their prompts; network.pack_text() represents the zero padding by a single token.

Legend: L text length, T text width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.logging import get_logger
from transformers import AutoTokenizer, UMT5EncoderModel

from ..network import TEXT_LENGTH
from ..teacher.text_encoder import NUM_TRAINED, check_pieces, check_tokenizer
from .component_files import check_manifest, load_component, loading_errors
from .shards import Shard, fill_shards, read_shard

BATCH_SIZE = 64  # prompts encoded together
TOKENS_AT_ONCE = 8192  # 16 prompts of 512, whose attention takes about 2 GB in a real UMT5
MAX_SHOWN = 32  # characters of a prompt in a message
MAX_CHARACTERS = 2**16  # of a prompt that are read: TEXT_LENGTH tokens have a tenth of them
LOGGER = get_logger(__name__)


def load_tokenizer(folder: str | Path) -> Any:
    """Load a tokenizer from its folder in a Wan folder or a saved student."""
    check_manifest(Path(folder))
    with loading_errors(folder):
        check_tokenizer(Path(folder))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # nosec B615: a folder


def load_text_encoder(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, UMT5EncoderModel]:
    """Load the tokenizer and the frozen UMT5 encoder of a Wan folder or a saved student, which fit each other."""
    folder = Path(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    encoder = load_component("text_encoder", folder, device, dtype)
    encoder.name_or_path = encoder.config._name_or_path = str(folder)
    check_vocabulary(tokenizer, folder, len(encoder.encoder.embed_tokens.weight))
    return tokenizer, encoder.eval().requires_grad_(False)


def check_vocabulary(tokenizer: Any, folder: Path, num_embedded: int) -> None:
    """Raise ValueError if the vocabulary of a folder, without added tokens, exceeds the embedding of its encoder.

    An added token is refused with the prompt that has it.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    largest = max((number for token, number in vocabulary.items() if token not in added), default=0)
    check_pieces(largest, num_embedded, folder / "tokenizer", folder / "text_encoder")


def lazy_encoder(folder: str | Path, device: str | torch.device) -> Callable[[Sequence[str]], dict]:
    """Return a function that encodes prompts: {"text": concatenated embeddings (sum of L, T), "length": (B,)}.

    Tokenizer and encoder are loaded by the first call, and freed together with the function.
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


class Embeddings(Mapping[str, torch.Tensor]):
    """{prompt: embedding (L, T)} of prompts in the order of their shards, which are memory-mapped."""

    def __init__(self, prompts: Sequence[str], shards: Iterable[Shard]):
        places = (
            (shard, embedding)
            for shard in shards
            for embedding in shard["text"].split(shard["length"].tolist())
        )
        self.places = dict(zip(prompts, places))

    def __getitem__(self, prompt: str) -> torch.Tensor:
        shard, embedding = self.places[prompt]
        shard.check_unchanged()
        return embedding

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def encode_once(accelerator, encode: Callable, prompts: Sequence[str], folder: Path) -> Embeddings:
    """Encode distinct prompts with a lazy_encoder(), once: the embeddings are kept in `folder`."""
    paths = fill_shards(accelerator, folder, [(prompt,) for prompt in prompts], encode, "text")
    return Embeddings(prompts, map(read_shard, paths))


@torch.no_grad()
def encode_prompts(
    tokenizer: Any,
    encoder: Any,
    prompts: Sequence[str],
    tokens_at_once: int = TOKENS_AT_ONCE,
    device: torch.device | None = None,
) -> list[torch.Tensor]:
    """Return an embedding (L, T) for each prompt, without padding.

    `device` is where an offloaded encoder takes its input; by default it is that of the weights.
    """
    embeddings: list[torch.Tensor] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        tokens = tokenize(
            tokenizer, batch, padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        check_embedded(tokenizer, encoder, batch, tokens.input_ids)
        _warn_of_untrained(tokenizer, batch, tokens.input_ids)
        rows = max(1, tokens_at_once // tokens.input_ids.shape[1])
        for ids, mask in zip(
            *(
                tensor.to(device or encoder.device).split(rows)
                for tensor in (tokens.input_ids, tokens.attention_mask)
            )
        ):
            hidden_states = encoder(ids, mask).last_hidden_state  # (B, L, T)
            embeddings += [row[is_token] for row, is_token in zip(hidden_states, mask.bool())]
    return embeddings


def tokenize(tokenizer, prompts, **options):
    """Tokenize as Wan does, with padding and truncation at the end for any tokenizer config; see its __call__()."""
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    texts = [prompt_clean(prompt[:MAX_CHARACTERS]) for prompt in prompts]
    with loading_errors(tokenizer.name_or_path, "used"):
        return tokenizer(texts, return_attention_mask=True, verbose=False, **options)


def check_embedded(tokenizer, encoder, prompts, ids):
    """Raise ValueError for a prompt with a token beyond the encoder's embedding."""
    size = encoder.get_input_embeddings().num_embeddings
    for prompt, token in zip(prompts, ids.amax(1).tolist()):
        if token >= size:
            raise ValueError(
                f"{tokenizer.name_or_path}: gives {_shorten(prompt)} token {token:,}, and "
                f"{encoder.name_or_path}/text_encoder embeds {size:,}. Change the prompt, or copy both again, from one "
                f"model."
            )


def _warn_of_untrained(tokenizer, prompts, ids):
    """Warn of the words that a small vocabulary lacks; they are spelled, or are all the same unknown word."""
    count = tokenizer.init_kwargs.get(NUM_TRAINED)
    if count is None:
        return
    is_lost = (ids >= count) | (ids == tokenizer.unk_token_id)
    for prompt in (prompt for prompt, lost in zip(prompts, is_lost.any(1).tolist()) if lost):
        words = dict.fromkeys(prompt.split())
        pieces = tokenize(tokenizer, [*words], add_special_tokens=False).input_ids
        lost = [
            word
            for word, own in zip(words, pieces)
            if any(each >= count or each == tokenizer.unk_token_id for each in own)
        ]
        LOGGER.warning(
            f"{_shorten(prompt)}: the small vocabulary lacks {', '.join(lost)}, and the image may not show it."
        )


def warn_of_truncation(tokenizer: Any, prompts: Sequence[str], log: Callable[[str], Any]) -> None:
    """Log the number of prompts with more than TEXT_LENGTH tokens, if any, and the first one."""
    truncated: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        truncated += [
            prompt
            for prompt, ids in zip(batch, tokenize(tokenizer, batch).input_ids)
            if len(ids) > TEXT_LENGTH
        ]
    if truncated:
        log(
            f"WARNING: prompts truncated to the limit of {TEXT_LENGTH} tokens: {len(truncated):,}, first "
            f"{_shorten(truncated[0])}"
        )


def _shorten(prompt):
    """Return the repr of a prompt, shortened for a message."""
    return repr(prompt) if len(prompt) <= MAX_SHOWN else f"{prompt[:MAX_SHOWN]!r}..."
