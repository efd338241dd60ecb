"""Prompts -> embeddings, as a stock pipeline makes them."""

import gc
import json
import shutil
import time

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanPipeline
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from tests.conftest import TINY_TEACHER, change, refuse_pickle
from train_distillation import WanLiteStudent
from wanlite import WanLitePipeline
from wanlite.data.shards import SHARD_SIZE, read_shard, shard_path
from wanlite.data.text_encoder import (
    encode_once,
    encode_prompts,
    lazy_encoder,
    load_text_encoder,
    warn_of_truncation,
)
from wanlite.generation.student import encode_once as encode_student_prompts
from wanlite.network import TextTokens, pack_text, unpack_text
from wanlite.parts.folder import load_pipeline
from wanlite.serving.drawing import PromptEncoder
from wanlite.teacher.components import check_components
from wanlite.training.teacher_data import PromptEmbeddings

PROMPTS = [
    "a small red circle at the left on a white background",
    "  A  SMALL &amp;amp; red\tring ",
    "",
    "qzx unknown words",
]


def test_padded_embeddings_equal_those_of_a_stock_pipeline():
    tokenizer, encoder = load_text_encoder(TINY_TEACHER)
    pipeline = WanPipeline(tokenizer, encoder, vae=None, scheduler=None)
    expected, _ = pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512, device="cpu"
    )
    found = unpack_text(pack_text(encode_prompts(tokenizer, encoder, PROMPTS)))
    assert found.shape == (4, 512, 64) and torch.allclose(found, expected, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_batch():
    tokenizer, encoder = load_text_encoder(TINY_TEACHER)
    seen = []
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    together, pairs, alone = (
        encode_prompts(tokenizer, encoder, PROMPTS, at_once) for at_once in (10**4, 25, 1)
    )
    length = seen[0][1]
    assert 10 < length <= 12 and seen == [(4, length), *[(2, length)] * 2, *[(1, length)] * 4]
    assert all(torch.allclose(a, b, atol=1e-5) for each in (pairs, alone) for a, b in zip(together, each))


def test_prompts_are_encoded_once_and_only_lost_ones_again(tmp_path):
    prompts, encoded = [f"{number} rings" for number in range(SHARD_SIZE + 6)], []
    encode = lazy_encoder(TINY_TEACHER, "cpu")

    def counted(prompts):
        encoded.append(prompts)
        return encode(prompts)

    tokenizer, encoder = load_text_encoder(TINY_TEACHER)
    expected = encode_prompts(tokenizer, encoder, prompts)
    for _ in range(2):
        found = encode_once(Accelerator(cpu=True), counted, prompts, tmp_path)
        assert list(found) == prompts and all(torch.equal(*pair) for pair in zip(found.values(), expected))
    path = shard_path(tmp_path, 0, [(prompt,) for prompt in prompts[:SHARD_SIZE]])
    path.unlink()
    with pytest.raises(OSError, match="no such file. All machines of a run need one shared disk"):
        read_shard(path)
    encode_once(Accelerator(cpu=True), counted, prompts, tmp_path)
    assert [len(prompts) for prompts in encoded] == [SHARD_SIZE, 6, SHARD_SIZE]


def test_the_encoder_is_freed_after_encoding():
    def count():
        return sum(type(each) is UMT5EncoderModel for each in gc.get_objects())

    gc.collect()
    before, encode = count(), lazy_encoder(TINY_TEACHER, "cpu")
    assert count() == before and len(encode(["a ring"])["length"]) == 1 and count() == before + 1
    del encode
    assert count() == before


def test_packing_and_unpacking_are_inverse_up_to_the_full_length():
    embeddings = [torch.randn(length, 5) for length in (1, 7, 8)]
    padded = unpack_text(pack_text(embeddings, text_length=8), text_length=8)
    for row, embedding in zip(padded, embeddings):
        assert torch.equal(row[: len(embedding)], embedding) and not row[len(embedding) :].any()


def test_the_bias_counts_the_padding():
    text = pack_text([torch.ones(3, 2), torch.ones(5, 2)], text_length=512)
    assert isinstance(text, TextTokens) and text.tokens.shape == (2, 6, 2)
    weights = text.logit_bias.exp().sum(1)
    assert torch.allclose(weights, torch.full((2,), 512.0))


def test_a_pickle_in_place_of_the_encoder_is_never_opened(tmp_path, monkeypatch):
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(TINY_TEACHER / part, tmp_path / part)
    refuse_pickle(
        tmp_path / "text_encoder", "model.safetensors", "pytorch_model.bin", load_text_encoder, monkeypatch
    )


def test_code_beside_the_tokenizer_is_never_run(tmp_path):
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(TINY_TEACHER / part, tmp_path / part)
    config = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(
        json.dumps(
            config | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
        )
    )
    (tmp_path / "tokenizer/evil.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Tokenizer: pass\n"
    )
    with pytest.raises(OSError, match="tokenizer: .*tokenizer_class is 'Tokenizer'"):
        load_text_encoder(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def wan(tmp_path):
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(TINY_TEACHER / part, tmp_path / part)
    return tmp_path


QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda tensors: tensors.pop(QUERY), f"lacks {QUERY} .1 of"),
        (
            lambda tensors: tensors.update({f"module.{name}": tensors.pop(name) for name in list(tensors)}),
            "lacks encoder.block.0",
        ),
        (lambda tensors: tensors.update({"decoder.x": torch.zeros(3)}), "holds unknown decoder.x"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(3, 3)}), f"holds in another shape {QUERY}"),
        (lambda tensors: tensors[QUERY].fill_(float("nan")), f"{QUERY} holds NaN"),
        (
            lambda tensors: tensors["shared.weight"][30:].fill_(float("inf")),
            "shared.weight holds NaN or infinity",
        ),
    ],
)
def test_a_text_encoder_with_missing_foreign_or_infinite_weights_is_refused(how, words, wan):
    change(wan / "text_encoder", how)
    with pytest.raises(ValueError, match=f"text_encoder: .*{words}"):
        load_text_encoder(wan)


def test_an_embedding_stored_once_or_twice_is_the_same(wan):
    path = wan / "text_encoder/model.safetensors"
    change(
        wan / "text_encoder",
        lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}),
    )
    assert len(load_file(path)) == 23
    expected, found = (load_text_encoder(folder)[1].state_dict() for folder in (TINY_TEACHER, wan))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name, content",
    [
        ("text_encoder/model.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        ("text_encoder/model.safetensors", b""),
        ("tokenizer/tokenizer.json", b"version https://git-lfs.github.com/spec/v1"),
        ("text_encoder/config.json", b"[" * 100_000),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line_with_its_folder(name, content, wan):
    (wan / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name.partition('/')[0]}: cannot be loaded .*again") as refused:
        load_text_encoder(wan)
    assert "\n" not in str(refused.value)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("truncation", ["left", "right"])
def test_embeddings_do_not_depend_on_the_padding_side_of_a_tokenizer(padding, truncation, wan):
    prompts = [*PROMPTS, " ".join(["red ring"] * 300)]
    batches = [prompts[:4], *([prompt] for prompt in prompts)]
    expected = [
        embedding for batch in batches for embedding in encode_prompts(*load_text_encoder(wan), batch)
    ]
    change_json(wan / "tokenizer/tokenizer_config.json", padding_side=padding, truncation_side=truncation)
    side = padding.capitalize()
    change_json(
        wan / "tokenizer/tokenizer.json",
        truncation={"direction": side, "max_length": 7, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 20},
            "direction": side,
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    )
    found = [embedding for batch in batches for embedding in encode_prompts(*load_text_encoder(wan), batch)]
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
EMPTY_MATCHES = {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "a"}


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [DOUBLING] * 40},
        {"type": "Sequence", "normalizers": [EMPTY_MATCHES] * 40},
        {"type": "Nonsense"},
        {"type": "Precompiled", "precompiled_charsmap": "cnViYmlzaA=="},
    ],
)
def test_a_tokenizer_with_parts_that_no_wan_has_is_refused(normalizer, wan):
    change_json(wan / "tokenizer/tokenizer.json", normalizer=normalizer)
    with pytest.raises(OSError, match="tokenizer.*again"):
        encode_prompts(*load_text_encoder(wan), ["a ring"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("attn_implementation", "evil/kernel"),
        ("_attn_implementation", "evil/kernel"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("auto_map", {"AutoModel": "evil.Model"}),
    ],
)
def test_no_key_of_a_text_encoder_chooses_code(key, value, wan):
    expected = encode_prompts(*load_text_encoder(wan), PROMPTS)
    change_json(wan / "text_encoder/config.json", **{key: value})
    found = encode_prompts(*load_text_encoder(wan), PROMPTS)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("sizes", [{"num_layers": 10**5}, {"d_model": 10**7}, {"vocab_size": 10**9}])
def test_sizes_of_a_text_encoder_are_compared_before_it_is_made(sizes, wan):
    change_json(wan / "text_encoder/config.json", **sizes)
    began = time.process_time()
    with pytest.raises((OSError, ValueError), match="text_encoder"):
        load_text_encoder(wan)
    assert time.process_time() - began < 1


def test_an_encoder_does_not_change_with_its_file(wan):
    _, encoder = load_text_encoder(wan)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    path = wan / "text_encoder/model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def change_vocabulary(folder, how):
    path = folder / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    how(tokenizer)
    path.write_text(json.dumps(tokenizer))


def test_a_tokenizer_and_a_text_encoder_of_two_models_are_refused(wan):
    change_vocabulary(wan, lambda tokenizer: tokenizer["model"]["vocab"].update(purple=35))
    with pytest.raises(
        ValueError,
        match=rf"^{wan}/tokenizer: has tokens up to number 35, and {wan}/text_encoder embeds 35: they ",
    ):
        load_text_encoder(wan)


def test_every_entry_point_refuses_a_tokenizer_of_another_model(finished_run, tmp_path):
    run, teacher = tmp_path / "run", tmp_path / "teacher"
    for source, folder in ((finished_run[0], run), (TINY_TEACHER, teacher)):
        shutil.copytree(source, folder)
        change_vocabulary(folder, lambda tokenizer: tokenizer["model"]["vocab"].update(purple=35))
        (folder / "tokenizer/manifest.json").unlink(missing_ok=True)
    components = {part: teacher / part for part in ("tokenizer", "text_encoder", "vae")}
    config = json.loads((teacher / "transformer/config.json").read_text())
    for folder, load in (
        (run, lambda: PromptEncoder(run, "cpu")),
        (run, lambda: encode_student_prompts(run, "cpu", PROMPTS)),
        (run, lambda: WanLitePipeline.from_pretrained(run)),
        (run, lambda: WanLitePipeline.from_pretrained(run, device_map="cpu")),
        (run, lambda: load_pipeline(run, WanLiteStudent, "cpu")),
        (teacher, lambda: lazy_encoder(teacher, "cpu")(PROMPTS)),
        (teacher, lambda: check_components(components, config)),
    ):
        two = f"^{folder}/tokenizer: has tokens up to number 35, and {folder}/text_encoder embeds 35: they "
        with pytest.raises(ValueError, match=two):
            load()


def test_a_prompt_with_a_token_outside_the_embedding_is_refused(wan):
    change_vocabulary(
        wan,
        lambda tokenizer: tokenizer["added_tokens"].append(
            {
                "id": 35,
                "content": "<extra>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ),
    )
    tokenizer, encoder = load_text_encoder(wan)
    assert len(encode_prompts(tokenizer, encoder, PROMPTS)) == 4
    encoder.register_forward_pre_hook(lambda module, inputs: pytest.fail("it was encoded"))
    with pytest.raises(
        ValueError,
        match=rf"^{wan}/tokenizer: gives 'a <extra> ring' token 35, and {wan}/text_encoder embeds 35",
    ):
        encode_prompts(tokenizer, encoder, ["a ring", "a <extra> ring"])


def test_prompts_over_the_limit_are_counted_in_one_line_with_the_first(tmp_path, capsys):
    tokenizer, printed = load_text_encoder(TINY_TEACHER)[0], []
    long, exact = " ".join(["a small red\x1b circle"] * 200), " ".join(["ring"] * 511)
    warn_of_truncation(tokenizer, ["a ring", exact], printed.append)
    assert printed == []
    warn_of_truncation(tokenizer, ["a ring", long, exact, f"{exact} ring"], printed.append)
    assert len(printed) == 1 and len(printed[0]) < 200 and printed[0].isprintable()
    assert printed[0].startswith(
        "WARNING: prompts truncated to the limit of 512 tokens: 2, first 'a small red"
    )
    for _ in range(2):  # from the cache the second time
        PromptEmbeddings(Accelerator(cpu=True), TINY_TEACHER, tmp_path, ["a ring", f"{exact} ring", exact])
        assert "512 tokens: 1, first 'ring ring" in capsys.readouterr().out
