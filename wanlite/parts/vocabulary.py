"""A tokenizer and prompts -> a tokenizer of the same class with the pieces of these prompts alone.

Kept pieces have the embeddings that they had. A Unigram tokenizer splits a text into the pieces of highest score, so a
text whose pieces are all kept is split as before. One that knows single characters keeps those of ASCII, and spells
other words with them; any other piece becomes <unk>.
"""

import json
import string
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from ..data.prompts import read_prompts
from ..data.text_encoder import NUM_TRAINED, load_tokenizer, tokenize
from ..files.atomic import write_json
from ..files.json_files import DOWNLOADED, read_json
from ..network import TEXT_LENGTH

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
KINDS = ("Unigram", "WordLevel")  # whose pieces can be removed one by one
SPACE = "▁"  # of a Unigram's pieces
TOGETHER = 1024  # prompts that are tokenized together
MAX_NAMED = 10  # words in an error
NUMBERED = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
)  # settings of old numbers


@dataclass(frozen=True)
class Vocabulary:
    """The numbers of the kept pieces in the large tokenizer, in the order of the small one, which has `num_trained`
    pieces of the prompts before those that only spell other words.
    """

    kept: Tensor
    num_trained: int
    tokenizer: Any
    scripts: dict[str, tuple[int, int]]  # {script: pieces kept, and all}

    def cut(self, encoder: Any) -> Any:
        """Return an encoder with the embeddings of the kept pieces."""
        config, numbers = encoder.config.to_dict(), self.kept.tolist()
        config |= {"vocab_size": len(numbers)}
        for name in ("pad_token_id", "eos_token_id"):
            config[name] = numbers.index(config[name]) if config.get(name) in numbers else None
        own = UMT5EncoderModel(UMT5Config(**config)).to(encoder.device, encoder.dtype)
        weights = encoder.state_dict()
        rows = encoder.shared.weight.detach()[self.kept.to(encoder.device)]
        own.load_state_dict(weights | dict.fromkeys(("shared.weight", "encoder.embed_tokens.weight"), rows))
        return own.eval().requires_grad_(False)

    def describe(self) -> str:
        """Return the numbers of pieces, and the scripts that remain."""
        remaining = ", ".join(
            f"{script} {kept:,} of {count:,}" for script, (kept, count) in self.scripts.items() if kept
        )
        return (
            f"{len(self.kept):,} of {sum(count for _, count in self.scripts.values()):,} pieces: {remaining}"
        )


def read_vocabulary(path: str | None, log: Callable[[str], Any] | None = None) -> list[str]:
    """Return the prompts whose words stay, none without a file; errors as of read_prompts()."""
    return [] if path is None else read_prompts(path, log)


def choose_vocabulary(tokenizer: Any, kept_prompts: Sequence[str], prompts: Sequence[str]) -> Vocabulary:
    """Return the Vocabulary with the pieces of `kept_prompts`; a student draws `prompts`.

    Raises ValueError if it lacks words of `prompts`, which are listed, and for a tokenizer of another kind.
    """
    trained = find_pieces(tokenizer, kept_prompts)
    lost = [prompt for prompt, ids in split_all(tokenizer, prompts) if not trained.issuperset(ids)]
    if lost:
        words = find_words(tokenizer, lost, lambda ids: not trained.issuperset(ids))
        named = ", ".join(words[:MAX_NAMED]) + (", ..." if len(words) > MAX_NAMED else "")
        raise ValueError(
            f"the vocabulary lacks words of {len(lost):,} of the student's {len(prompts):,} prompts: {named}. Add "
            "prompts with these words to the file."
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        content = read_json(Path(folder) / TOKENIZER, DOWNLOADED)
        pieces = list_pieces(content["model"])
        kept = sorted(trained) + sorted(find_spelling(content["model"], pieces) - trained)
        write_json(Path(folder) / TOKENIZER, cut_tokenizer(content, kept))
        config = read_json(Path(folder) / TOKENIZER_CONFIG, DOWNLOADED)
        config = {name: value for name, value in config.items() if name not in NUMBERED}
        config |= {NUM_TRAINED: len(trained)} | ({"extra_ids": 0} if "extra_ids" in config else {})
        write_json(Path(folder) / TOKENIZER_CONFIG, config)
        own = load_tokenizer(folder)
    vocabulary = Vocabulary(torch.tensor(kept), len(trained), own, count_scripts(pieces, kept))
    check_same(vocabulary, tokenizer, prompts)
    return vocabulary


def split_all(tokenizer: Any, prompts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield prompts and the numbers of their pieces."""
    for start in range(0, len(prompts), TOGETHER):
        batch = prompts[start : start + TOGETHER]
        yield from zip(batch, tokenize(tokenizer, batch, truncation=True, max_length=TEXT_LENGTH).input_ids)


def find_pieces(tokenizer: Any, prompts: Sequence[str]) -> set[int]:
    """Return the numbers of the pieces of prompts, with those of padding, the end and unknown words."""
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} - {None}
    return special.union(*(ids for _, ids in split_all(tokenizer, prompts)))


def find_words(tokenizer: Any, prompts: Sequence[str], is_lost: Any) -> list[str]:
    """Return the words of prompts for whose pieces `is_lost` holds, the most frequent first."""
    words = Counter(word for prompt in prompts for word in prompt.split())
    ids = tokenize(tokenizer, list(words), add_special_tokens=False).input_ids
    return [
        word
        for (word, _), own in sorted(zip(words.items(), ids), key=lambda each: -each[0][1])
        if is_lost(own)
    ]


def list_pieces(model: dict[str, Any]) -> list[str]:
    """Return the pieces of the model in tokenizer.json by number; raises ValueError for another kind of model."""
    if model.get("type") not in KINDS:
        raise ValueError(
            f"the tokenizer is a {model.get('type')}, expected {' or '.join(KINDS)}: no piece can leave it. Leave "
            "--vocabulary out."
        )
    if model["type"] == "Unigram":
        return [piece for piece, _ in model["vocab"]]
    return sorted(model["vocab"], key=model["vocab"].get)


def find_spelling(model: dict[str, Any], pieces: list[str]) -> set[int]:
    """Return the numbers of the single characters that spell a word of ASCII; none in a tokenizer of whole words."""
    if model["type"] != "Unigram":
        return set()
    letters = {*string.printable, "", SPACE}
    return {
        number
        for number, piece in enumerate(pieces)
        if piece in letters or piece.removeprefix(SPACE) in letters
    }


def cut_tokenizer(content: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the content of tokenizer.json with the pieces `kept`, numbered in this order."""
    numbers, model = {old: new for new, old in enumerate(kept)}, dict(content["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept]
        model["unk_id"] = numbers[model["unk_id"]]
    else:
        model["vocab"] = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
    added = [
        token | {"id": numbers[token["id"]]} for token in content["added_tokens"] if token["id"] in numbers
    ]
    changed = {"model": model, "added_tokens": added}
    if tokens := (content.get("post_processor") or {}).get("special_tokens"):
        tokens = {
            name: each | {"ids": [numbers[number] for number in each["ids"]]} for name, each in tokens.items()
        }
        changed["post_processor"] = content["post_processor"] | {"special_tokens": tokens}
    return content | changed


def count_scripts(pieces: list[str], kept: list[int]) -> dict[str, tuple[int, int]]:
    """Return {script: (pieces kept, all pieces)}, the most frequent first; `other` has digits and signs."""
    names = [_script(piece) for piece in pieces]
    counts, remaining = Counter(names), Counter(names[number] for number in kept if number < len(names))
    return {name: (remaining[name], count) for name, count in counts.most_common()}


def _script(piece):
    """Return the script of the first letter of a piece, as Unicode names it."""
    letter = next((each for each in piece if each.isalpha()), None)
    return "other" if letter is None else unicodedata.name(letter, "other").split()[0].capitalize()


def check_same(vocabulary: Vocabulary, tokenizer: Any, prompts: Sequence[str]) -> None:
    """Raise ValueError unless both tokenizers split prompts into the same pieces."""
    for (prompt, ids), (_, own) in zip(
        split_all(tokenizer, prompts), split_all(vocabulary.tokenizer, prompts)
    ):
        if vocabulary.kept[own].tolist() != list(ids):
            raise ValueError(
                f"{json.dumps(prompt, ensure_ascii=False)}: is split into other pieces without the ones that leave. "
                "Leave --vocabulary out."
            )
