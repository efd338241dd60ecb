"""Values of other types in every file, and files of other bytes."""

import json
import random

import torch
from safetensors.torch import save_file

from benchmarks.hostile_inputs.builders import (
    ENCODER,
    ODD,
    SETTINGS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VAE,
    edit,
    header_file,
    replace,
    unseal,
)
from benchmarks.hostile_inputs.trial import ACCEPTED, REFUSED, WEIGHTS, Input, call, draw, plan
from train_distillation import WanLiteStudent
from wanlite import WanLitePipeline
from wanlite.pipeline.lora_files import FILE, read_lora


def other_types(seed: int, count: int = 60) -> list[Input]:
    kind = "values of other types"

    def tokens_beyond(place):
        path = place.student / TOKENIZER
        content = json.loads(path.read_text())
        content["model"]["vocab"] |= {"red": 10**6}
        path.write_text(json.dumps(content))
        unseal(path)

    def dataset(place):
        folder = place.beside / "photos"
        folder.mkdir()
        (folder / "state.json").write_text('{"_data_files": null}')
        return ["--images", folder]

    def raw(name, content):
        return replace(name, lambda path: path.write_bytes(content))

    def lora(metadata=None, **more):
        """Return a way that reads a LoRA, and a change that writes it beside the student."""

        def prepare(place):
            (place.beside / "lora").mkdir()
            layer = "transformer.blocks.0.attn1.to_q"
            matrices = {
                f"{layer}.lora_A.weight": torch.ones(2, 8),
                f"{layer}.lora_B.weight": torch.ones(8, 2),
            }
            renamed = {f"{layer}.{name}": tensor for name, tensor in more.items()}
            save_file(matrices | renamed, place.beside / "lora" / FILE, metadata)

        return prepare, call(lambda place: bool(read_lora(WanLitePipeline, place.beside / "lora", {})))

    key, nan = "lora_adapter_metadata", torch.full((2, 8), float("nan"))
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA////"}
    tensors = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    student = call(lambda place: WanLiteStudent.from_pretrained(place.student))
    rows = [
        ("a token beyond the embedding", REFUSED, tokens_beyond, draw),
        ("a beta_schedule of evil", REFUSED, edit(SETTINGS, beta_schedule="evil"), draw),
        ("a precompiled_charsmap of rubbish", REFUSED, edit(TOKENIZER, normalizer=charsmap), draw),
        ("a dataset without files", REFUSED, dataset, plan),
        ("a duplicate key", REFUSED, raw("run.json", b'{"resolution": 64, "resolution": 128}'), draw),
        ("NaN in a config", REFUSED, raw("config.json", b'{"eps": NaN}'), draw),
        ("Infinity in run.json", REFUSED, raw("run.json", b'{"resolution": Infinity}'), draw),
        (
            "1e400 in run.json",
            REFUSED,
            raw("run.json", b'{"resolution": 64, "schedule": {"flow_shift": 1e400}}'),
            draw,
        ),
        ("a number of 4,000 digits", REFUSED, raw("run.json", b'{"resolution": ' + b"9" * 4000 + b"}"), draw),
        ("a number of 5,000 digits", REFUSED, raw("run.json", b'{"resolution": ' + b"9" * 5000 + b"}"), draw),
        ("a byte-order mark", REFUSED, raw("run.json", b'\xef\xbb\xbf{"resolution": 64}'), draw),
        ("UTF-16", REFUSED, raw("run.json", '{"resolution": 64}'.encode("utf-16")), draw),
        (
            "surrogates in a prompt",
            REFUSED,
            lambda place: raw("run.json", b'{"validation_prompts": ["\\ud800"]}')(place) or ["--no-prompt"],
            draw,
        ),
        (
            "zero bytes in a prompt",
            ACCEPTED,
            raw(
                "run.json",
                b'{"validation_prompts": ["\\u0000 a"], "resolution": 64, "num_inference_steps": 1}',
            ),
            draw,
        ),
        (
            "overlapping tensors",
            REFUSED,
            replace(WEIGHTS, header_file({"a": tensors["a"], "b": tensors["a"]}, body=bytes(4))),
            student,
        ),
        (
            "negative offsets",
            REFUSED,
            replace(WEIGHTS, header_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}})),
            student,
        ),
        (
            "a shape of 2^62",
            REFUSED,
            replace(
                f"vae/{WEIGHTS}",
                header_file({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
            ),
            draw,
        ),
        ("an empty safetensors file", REFUSED, replace(f"vae/{WEIGHTS}", header_file({})), draw),
        (
            "a header without an end",
            REFUSED,
            replace("text_encoder/model.safetensors", header_file(b"{", 2**64 - 1)),
            draw,
        ),
        (
            "a vocabulary of numbers",
            REFUSED,
            edit(TOKENIZER, model={"type": "WordLevel", "vocab": {"a": "b"}, "unk_token": 7}),
            draw,
        ),
        ("a tokenizer of an unknown model", REFUSED, edit(TOKENIZER, model={"type": "Evil"}), draw),
        ("a tokenizer without a model", REFUSED, edit(TOKENIZER, model=...), draw),
        ("a tokenizer with a lone pad", REFUSED, edit(TOKENIZER_CONFIG, pad_token=...), draw),
    ]
    rows += [
        ("settings of a LoRA nested 100,000 times", REFUSED, *lora({key: "[" * 10**5})),
        ("a LoRA of rank 10^9", REFUSED, *lora({key: '{"transformer.r": 1000000000}'})),
        ("a LoRA of NaN", REFUSED, *lora(**{"lora_A.weight": nan})),
        ("a LoRA with a vector", REFUSED, *lora(lora_magnitude_vector=torch.ones(8))),
    ]
    rows += _changed_values(random.Random(seed), count)  # noqa: S311 (values, no secrets)
    return [Input(kind, *row) for row in rows]


FILES = ("run.json", "config.json", SETTINGS, TOKENIZER, TOKENIZER_CONFIG, ENCODER, VAE, "model_index.json")


def _changed_values(choice, count):
    """Yield inputs in which one key of one file, known when it is prepared, has another value."""
    pipeline = call(lambda place: WanLitePipeline.from_pretrained(place.student))

    def change(name, share, value):
        def prepare(place):
            keys = sorted(json.loads((place.student / name).read_text()))
            key = keys[int(share * len(keys))]
            print_key[0] = key
            edit(name, **{key: value})(place)

        return prepare

    print_key = [""]
    for number in range(count):
        name, share, value = choice.choice(FILES), choice.random(), choice.choice(ODD)
        way = pipeline if name == "model_index.json" else draw
        shown = json.dumps(value)[:20]
        yield f"value {number}: {name} at {share:.2f} is {shown}", ACCEPTED, change(name, share, value), way
