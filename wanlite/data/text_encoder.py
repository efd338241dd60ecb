"""Prompts -> the embeddings that a Wan model attends to.

Every embedding is kept at its prompt's true length; network.pack_text puts the zero padding back, at the
price of one token. Legend: L text length, T text width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from ..network import TEXT_LENGTH
from .shards import fill_shards, read_shard

BATCH_SIZE = 64  # prompts encoded together
TOKENS_AT_ONCE = 8192  # the most of theirs: 16 prompts of 512, whose attention in a real UMT5 takes some 2 GB
MAX_SHOWN = 80  # characters of a prompt in a message
CHECKED = {
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}  # of from_pretrained(): faults are told, and refused


def load_tokenizer(folder):
    """Load a tokenizer from its folder, in a Wan folder or in a saved student."""
    with named(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # nosec B615: a folder


def load_text_encoder(folder, device="cpu", dtype=None):
    """Load the tokenizer and the frozen UMT5 encoder that lie in a Wan folder or in a saved student.

    Raises ValueError where they are of two models: a tokenizer whose vocabulary, but for added tokens,
    exceeds the embedding.
    """
    folder, tokenizer = Path(folder), load_tokenizer(Path(folder) / "tokenizer")
    with named(folder / "text_encoder"):
        encoder, loaded = UMT5EncoderModel.from_pretrained(  # nosec B615: a folder
            folder,
            subfolder="text_encoder",
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            **CHECKED,
        )
    check_loaded(folder / "text_encoder", encoder, loaded)
    embedding = encoder.encoder.embed_tokens.weight
    if not embedding[:100].any() or not torch.equal(
        embedding, encoder.shared.weight
    ):  # all of Wan's is a GB of booleans
        raise OSError(
            f"{folder}/text_encoder: the token embedding came out zero or untied, which transformers 5.0 to "
            f"5.2 "
            "do to Wan's UMT5. Install transformers >= 5.3."
        )
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    if (
        largest := max((number for token, number in vocabulary.items() if token not in added), default=0)
    ) >= len(embedding):
        raise ValueError(
            f"{folder}/tokenizer: has tokens up to number {largest:,}, and {folder}/text_encoder embeds "
            f"{len(embedding):,}: they are of two models. Download or copy both again, from one model."
        )
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


@contextmanager
def named(place):
    """Turn whatever a library raises over files into one line that names where they lie."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{place}: cannot be loaded ({' '.join(str(error).split()) or type(error).__name__}). Download "
            f"or copy it "
            "again."
        ) from None


def check_loaded(place, network, loaded):
    """Refuse a network of which tensors were not in its files, or are not finite; `loaded` is what
    from_pretrained() tells.

    What files lack comes out as random numbers, and those train and draw without a word.
    """
    for fault, names in (
        ("lacks", loaded["missing_keys"]),
        ("holds unknown", loaded["unexpected_keys"]),
        ("holds in another shape", [name for name, *_ in loaded["mismatched_keys"]]),
    ):
        if names:
            raise ValueError(
                f"{place}: {fault} {', '.join(sorted(names)[:3])} ({len(names)} of its tensors), expected "
                f"those that "
                "its config.json implies. Weights are of another model or cut: download or copy it again."
            )
    for name, tensor in network.state_dict().items():
        if not all(map(math.isfinite, tensor.aminmax())):  # no memory, unlike isfinite() and a sum in float32
            raise ValueError(f"{place}: {name} holds NaN or infinity. Download or copy it again.")


def lazy_encoder(folder, device):
    """Return a function that encodes prompts: {"text": embeddings one after the other (sum of L, T),
    "length": (B,)}.

    Tokenizer and encoder are loaded when it is first called, and freed with it.
    """

    @cache
    def loaded():
        return load_text_encoder(folder, device)

    def encode(prompts):
        embeddings = encode_prompts(*loaded(), prompts)
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
def encode_prompts(tokenizer, encoder, prompts, tokens_at_once=TOKENS_AT_ONCE):
    """Return one embedding (L, T) a prompt, cut to the prompt's true length."""
    embeddings = []
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
    """Tokenize as Wan does, padding and cutting at the end whatever the tokenizer's config has."""
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer(
        [prompt_clean(prompt) for prompt in prompts], return_attention_mask=True, verbose=False, **how
    )


def _check_embedded(tokenizer, encoder, prompts, ids):
    """Refuse a prompt with a token that the encoder has no embedding of."""
    size = encoder.get_input_embeddings().num_embeddings
    for prompt, token in zip(prompts, ids.amax(1).tolist()):
        if token >= size:
            raise ValueError(
                f"{tokenizer.name_or_path}: gives {_short(prompt)} token {token:,}, and "
                f"{encoder.name_or_path}/text_encoder embeds {size:,}. Change the prompt, or copy both "
                f"again, from "
                "one model."
            )


def tell_cut(tokenizer, prompts, say):
    """Log in one line how many prompts are longer than TEXT_LENGTH tokens, and the first of them; none logs
    nothing.
    """
    cut = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        cut += [
            prompt
            for prompt, ids in zip(batch, _tokenize(tokenizer, batch).input_ids)
            if len(ids) > TEXT_LENGTH
        ]
    if cut:
        say(
            f"WARNING: prompts over the limit of {TEXT_LENGTH} tokens are cut there: {len(cut):,}, the first "
            f"{_short(cut[0])}"
        )


def _short(prompt):
    """Show a prompt of any length and any characters."""
    return repr(prompt) if len(prompt) <= MAX_SHOWN else f"{prompt[:MAX_SHOWN]!r}..."
