"""Wan's text encoder: an official or a ComfyUI file -> UMT5EncoderModel and its tokenizer. No torch until then.

Facts: Wan-Video/Wan2.2, wan/modules/t5.py; ComfyUI, comfy/text_encoders/wan.py.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..files.downloads import find_replacement
from ..files.json_files import DOWNLOADED, read_first_bytes, read_json, shorten, shown
from ..files.weights import broken_download
from .component_weights import fill, read_weights, shapes_of
from .keys import rename
from .names import SPIECE, TEXT_ENCODER_NAMES
from .search import visible

_ATTENTION = "encoder.block.0.layer.0.SelfAttention"
TOKENIZER_CLASSES = ("T5Tokenizer", "T5TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast", None)
_SETTINGS = {  # of every Wan's text encoder, and of those of the tiny worlds, that no tensor shows
    "layer_norm_epsilon": (1e-6,),
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,),
    "relative_attention_max_distance": (128, 64),
}
_PARTS = ("normalizer", "pre_tokenizer")
_KINDS = (  # in tokenizer.json of UMT5 and of the tiny world, and what transformers writes for them
    *("Sequence", "Precompiled", "Replace", "Strip", "Lowercase", "NFC", "NFKC", "Prepend"),
    *("Whitespace", "WhitespaceSplit", "Metaspace", "Unigram", "BPE", "WordLevel"),
)
_REGEXES = (" {2,}", " +", r"\s+", r"\s{2,}")  # UMT5's is the first
MAX_PARTS = 12  # UMT5's has eight
MAX_REPLACEMENT = 1  # characters that replace a match, or are put before a text: a text grows by at most a factor for each part
MAX_ADDED = 8  # tokens that a template adds to a prompt; UMT5's adds one
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NUM_TRAINED = "num_trained_pieces"  # in the config of a tokenizer whose other pieces no training has seen
MAX_EXTRA = 1000  # tokens beside those of the vocabulary
_RANDOM = ("dropout",)  # settings of a BPE with which a prompt has other tokens at every use
_FIRST_PIECES = ["<pad>", "</s>", "<unk>"]


def convert_text_encoder(path: Path) -> Any:
    """Return a UMT5EncoderModel with the weights of an official or a ComfyUI file."""
    import torch
    from transformers import UMT5EncoderModel

    weights = read_weights(path, torch.bfloat16)  # Wan's own dtype; float16 overflows in it
    tensors = rename(weights, TEXT_ENCODER_NAMES)
    try:
        config = _config_of(tensors)
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path}: lacks a tensor of every UMT5 encoder, or its sizes ({error}). Download it again."
        ) from None
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    return fill(UMT5EncoderModel, config, tensors, path)


def _config_of(tensors: dict[str, Any]) -> Any:
    """Return a UMT5Config, which follows from the shapes; raises LookupError for a missing tensor."""
    from transformers import UMT5Config

    shapes = shapes_of(tensors)
    num_words, width = shapes["shared.weight"]
    neurons, _ = shapes["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"]
    buckets, heads = shapes[f"{_ATTENTION}.relative_attention_bias.weight"]
    return UMT5Config(
        vocab_size=num_words,
        d_model=width,
        d_ff=neurons,
        num_heads=heads,
        d_kv=shapes[f"{_ATTENTION}.q.weight"][0] // heads,
        num_layers=sum(name.endswith("SelfAttention.q.weight") for name in shapes),
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        dtype=str(tensors["shared.weight"].dtype).removeprefix("torch."),
    )


def check_text_settings(config: dict[str, Any], path: Path) -> None:
    """Refuse settings that change embeddings and that no tensor shows."""
    for name, values in _SETTINGS.items():
        if (found := config.get(name, values[0])) not in values:
            raise ValueError(
                f"{path}: {name} is {found!r:.60}, expected {values[0]!r}, as in every Wan. Download it again."
            )


def convert_tokenizer(path: Path) -> Any:
    """Return the tokenizer that a ComfyUI text encoder carries; it splits text as sentencepiece itself does."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]
    from transformers.convert_slow_tokenizer import import_protobuf

    with safe_open(path, "np") as file:
        content = file.get_tensor(SPIECE).tobytes()
    try:
        model = import_protobuf().ModelProto.FromString(content)
    except Exception as error:
        raise ValueError(
            f"{path}: {SPIECE} is not a sentencepiece model ({error}). Download it again, or put a tokenizer/ of "
            "diffusers' layout beside it."
        ) from None
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if (first := [piece for piece, _ in pieces[:3]]) != _FIRST_PIECES:
        raise ValueError(
            f"{path}: {SPIECE} begins with {first}, expected <pad>, </s> and <unk>, as in UMT5's. Put a "
            "tokenizer/ of diffusers' layout beside it."
        )
    return T5TokenizerFast(
        vocab=pieces,
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap or None,
        extra_ids=0,
    )


def check_pieces(largest: int, num_embedded: int, tokenizer: Path, encoder: Path) -> None:
    """Refuse a tokenizer with pieces up to number `largest` beside an encoder that embeds fewer."""
    if largest >= num_embedded:
        raise ValueError(
            f"{tokenizer}: has tokens up to number {largest:,}, and {encoder} embeds {num_embedded:,}: they belong to "
            "two models. Download or copy both again, from one model."
        )


def check_tokenizer(folder: Path) -> int:
    """Refuse a tokenizer without a vocabulary, or with JSON that cannot be read.

    Returns the largest number of a piece in tokenizer.json, 0 without the file; added tokens do not count.
    """
    largest = 0
    vocabularies = [
        path for path in (folder / "tokenizer.json", *visible(folder.glob("*.model"))) if path.exists()
    ]
    if not vocabularies:
        raise OSError(f"{folder}: lacks tokenizer.json, and spiece.model as well. Download the folder again.")
    for path in (path for path in (vocabularies[0], *(folder / name for name in _CONFIGS)) if path.exists()):
        if path.suffix != ".json":
            if find_replacement(read_first_bytes(path)):
                raise broken_download(path, "not a sentencepiece model")
        elif path.name == "tokenizer.json":
            content = read_json(path, DOWNLOADED)
            _check_parts(content, path)
            largest = _find_largest(content)
        else:
            _check_tokenizer_settings(read_json(path, DOWNLOADED), path)
    return largest


def _find_largest(tokenizer: dict[str, Any]) -> int:
    """Return the largest number of a piece, 0 for a vocabulary that cannot be read; its loader refuses that."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
        if not isinstance(vocabulary, dict):  # a Unigram's: pairs of a piece and its score
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        return max((number for piece, number in vocabulary.items() if piece not in added), default=0)
    except (LookupError, TypeError, ValueError):
        return 0


def _check_tokenizer_settings(settings: dict[str, Any], path: Path) -> None:
    """Refuse settings that choose code or another file than the checked one, and tokens without number."""
    if long := [
        name for name, value in settings.items() if isinstance(value, (list, dict)) and len(value) > MAX_EXTRA
    ]:
        raise OSError(  # transformers adds each of them in Python
            f"{path}: {shown(long[0])} has {len(settings[long[0]]):,} entries, expected at most {MAX_EXTRA}; UMT5's has "
            "300. Download it again."
        )
    count = settings.get(NUM_TRAINED, 0)
    if type(count) is not int or count < 0:
        raise OSError(f"{path}: {NUM_TRAINED} is {shorten(count)}, expected a whole number. Copy it again.")
    if (name := settings.get("tokenizer_class")) not in TOKENIZER_CLASSES:
        raise OSError(
            f"{path}: tokenizer_class is {name!r:.60}, expected T5TokenizerFast, as in every Wan; code of a "
            "model is never run. Download it again."
        )
    if "fast_tokenizer_files" in settings:
        raise OSError(
            f"{path}: fast_tokenizer_files is {shorten(settings['fast_tokenizer_files'])}, expected none: the "
            "tokenizer is read from tokenizer.json. Remove the key."
        )
    count = settings.get("extra_ids", 0)
    if type(count) is not int or not 0 <= count <= MAX_EXTRA:
        raise OSError(
            f"{path}: extra_ids is {shorten(count)}, expected at most {MAX_EXTRA}; UMT5 has 300. Download it again."
        )


def _check_parts(tokenizer: dict[str, Any], path: Path) -> None:
    """Refuse parts of a tokenizer that a Wan's lacks: some make a text longer at every use."""
    if not isinstance(tokenizer.get("model"), dict):
        raise OSError(f"{path}: has no model, which holds a tokenizer's vocabulary. Download it again.")
    for name in _RANDOM:
        if value := tokenizer["model"].get(name):
            raise OSError(
                f"{path}: {name} is {shorten(value)}, expected none: tokens would be random. Remove the key."
            )
    _check_template(tokenizer.get("post_processor"), path)
    parts = [part for name in _PARTS for part in _flatten(tokenizer.get(name))]
    parts.append({"type": tokenizer["model"].get("type")})  # without its vocabulary
    if len(parts) > MAX_PARTS:
        raise OSError(f"{path}: has {len(parts)} parts, expected at most {MAX_PARTS}. Download it again.")
    for part in parts:
        added = [part.get(name, "") for name in ("content", "prepend", "replacement")]
        is_short = all(isinstance(text, str) and len(text) <= MAX_REPLACEMENT for text in added)
        if part.get("type") not in (*_KINDS, None) or not is_short or not _is_plain(part.get("pattern")):
            raise OSError(
                f"{path}: has a part {shorten(part)}, expected those of a UMT5's tokenizer. Download it again."
            )


def _is_plain(pattern: Any) -> bool:
    """Whether a pattern matches one or more characters, in a time that does not explode."""
    if not isinstance(pattern, dict):
        return pattern is None
    text = pattern.get("String")
    return pattern.get("Regex") in _REGEXES if text is None else isinstance(text, str) and text != ""


def _check_template(template: Any, path: Path) -> None:
    """Refuse a template that makes a long text of any prompt."""
    if template is None:
        return
    kind = template.get("type") if isinstance(template, dict) else None
    lists = [template.get(name) for name in ("single", "pair")] if kind == "TemplateProcessing" else []
    tokens = template.get("special_tokens") if lists else None
    each_token = tokens.values() if isinstance(tokens, dict) else [None]
    lists += [found.get("ids") if isinstance(found, dict) else None for found in each_token]
    if not all(isinstance(each, list) and len(each) <= MAX_ADDED for each in lists):
        raise OSError(
            f"{path}: has a post_processor {shorten(template)}, expected a template that adds at most {MAX_ADDED} "
            "tokens. Download it again."
        )


def _flatten(part: Any) -> list[dict[str, Any]]:
    """Return a part of a tokenizer and the parts in it, which are lists under various names."""
    found: list[dict[str, Any]] = []
    waiting = [part]  # no recursion: parts may be nested deeper than calls
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            found.append(each)
            waiting += [inner for value in each.values() if isinstance(value, list) for inner in value]
    return found
