"""Sizes, counts and lengths that no weights back."""

import json

import pyarrow
from pyarrow import parquet

from benchmarks.hostile_inputs.builders import (
    ENCODER,
    SETTINGS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VAE,
    beside,
    edit,
)
from benchmarks.hostile_inputs.trial import ACCEPTED, REFUSED, SAME, Input, call, draw, plan
from wanlite import WanLitePipeline


def false_sizes() -> list[Input]:
    kind = "sizes without weights"

    def tokenizer(**changes):
        return edit(TOKENIZER, **changes)

    def prompts_of_run(prompts):
        def prepare(place):
            edit("run.json", validation_prompts=prompts)(place)
            return ["--no-prompt"]

        return prepare

    grow = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
    }
    template = [
        {"Sequence": {"id": "A", "type_id": 0}},
        *[{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 10**5,
    ]
    processor = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    many_ids = json.loads(json.dumps(processor)) | {
        "single": template[:2],
        "pair": template[:2],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1] * 10**5, "tokens": ["</s>"] * 10**5}},
    }
    added = [
        {
            "id": 35 + number,
            "content": f"<{number}>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number in range(10**5)
    ]

    def repeated(path):
        parquet.write_table(pyarrow.table({"prompt": ["a" * 2**19] * 3000}), path)

    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    plain = lambda **changes: edit(ENCODER, **changes)  # noqa: E731
    pipeline = call(lambda place: WanLitePipeline.from_pretrained(place.student))
    mapped = call(lambda place: WanLitePipeline.from_pretrained(place.student, device_map="cpu"))
    called = call(lambda place: WanLitePipeline.from_pretrained(place.student)("a ring"))
    rows = [
        ("a text encoder of 100,000 layers", REFUSED, plain(num_layers=10**5), draw),
        ("a million validation prompts", ACCEPTED, prompts_of_run(["a"] * 10**6), draw),
        ("forty replacements of a tokenizer", REFUSED, tokenizer(normalizer=grow), draw),
        ("a text encoder of 100,000 layers in a pipeline", REFUSED, plain(num_layers=10**5), pipeline),
        ("a text encoder of 100,000 layers with a device map", REFUSED, plain(num_layers=10**5), mapped),
        ("a vocabulary of 10^12", REFUSED, plain(vocab_size=10**12), draw),
        ("a width of 10^9 with a device map", REFUSED, plain(d_model=10**9), mapped),
        ("an autoencoder of width 10^9", REFUSED, edit(VAE, base_dim=10**9), draw),
        ("an autoencoder of 10^7 levels", REFUSED, edit(VAE, dim_mult=[1] * 10**6), draw),
        ("10^9 latent channels", REFUSED, edit(VAE, z_dim=10**9), draw),
        ("10^9 positions of a student", REFUSED, edit("config.json", rope_max_seq_len=10**9), draw),
        ("65,536 positions of a student", ACCEPTED, edit("config.json", rope_max_seq_len=65536), draw),
        ("a resolution of 10^400", REFUSED, edit("run.json", resolution=10**400 + 1), draw),
        ("a resolution of 10^400 in a pipeline", REFUSED, edit("run.json", resolution=10**400 + 1), called),
        ("a resolution of 10^15", REFUSED, edit("run.json", resolution=16 * 10**14), draw),
        ("10^9 steps", REFUSED, edit("run.json", num_inference_steps=10**9, schedule=None), draw),
        ("a schedule of 10^6 steps", REFUSED, edit(SETTINGS, disable_corrector=list(range(10**6))), draw),
        ("few_steps of 10^6 entries", SAME, edit("run.json", schedule={"few_steps": [4] * 10**6}), draw),
        (
            "a tokenizer that pads to 10^9",
            SAME,
            tokenizer(
                padding={
                    "strategy": {"Fixed": 10**9},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "<pad>",
                }
            ),
            draw,
        ),
        (
            "a tokenizer that pads to multiples of 2^40",
            SAME,
            tokenizer(
                padding={
                    "strategy": "BatchLongest",
                    "direction": "Right",
                    "pad_to_multiple_of": 2**40,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "<pad>",
                }
            ),
            draw,
        ),
        ("a template of 100,000 tokens", REFUSED, tokenizer(post_processor=processor), draw),
        ("a special token of 100,000 ids", REFUSED, tokenizer(post_processor=many_ids), draw),
        (
            "100,000 special tokens",
            REFUSED,
            edit(TOKENIZER_CONFIG, extra_special_tokens=[f"<{number}>" for number in range(10**5)]),
            draw,
        ),
        ("10^9 images", REFUSED, lambda place: ["--num_images_per_prompt", 10**9], draw),
        ("10^7 tokens beside the vocabulary", REFUSED, edit(TOKENIZER_CONFIG, extra_ids=10**7), draw),
        (
            "a scheduler of 10^10 timesteps",
            REFUSED,
            edit(SETTINGS, **flow, num_train_timesteps=10**10),
            pipeline,
        ),
        (
            "ratios of a resolution of 10^299",
            REFUSED,
            lambda place: (
                edit("run.json", resolution=10**299, settings={"aspect_ratios": ["3:2"]})(place)
                or ["--width", 64, "--height", 64]
            ),
            draw,
        ),
        ("a prompt of 0.5 MB in 3,000 rows", ACCEPTED, beside("a.parquet", repeated, "--prompts"), plan),
        ("100,000 added tokens", SAME, tokenizer(added_tokens=added), draw),
        (
            "a prompt of a million characters",
            ACCEPTED,
            lambda place: (
                edit("run.json", validation_prompts=["a ring " * 150_000])(place) or ["--no-prompt"]
            ),
            draw,
        ),
        ("a validation prompt of 30 MB", ACCEPTED, prompts_of_run(["a" * 3 * 10**7]), draw),
    ]
    return [Input(kind, *row) for row in rows]
