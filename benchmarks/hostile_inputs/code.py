"""Configs that choose code, a kernel, a quantizer or a download."""

import json

from benchmarks.hostile_inputs.builders import ENCODER, SETTINGS, TOKENIZER_CONFIG, edit, replace, text
from benchmarks.hostile_inputs.trial import ACCEPTED, REFUSED, SAME, Input, call, draw
from train_distillation import WanLiteStudent
from wanlite import WanLitePipeline


def foreign_code() -> list[Input]:
    kind = "code and network"
    evil = "import os; open('executed', 'w')"

    def with_code(name, prepare):
        def write(place):
            (place.student / name).write_text(evil)
            prepare(place)

        return write

    pipeline = call(lambda place: WanLitePipeline.from_pretrained(place.student))
    mapped = call(lambda place: WanLitePipeline.from_pretrained(place.student, device_map="cpu"))
    variant = call(lambda place: WanLitePipeline.from_pretrained(place.student, variant="fp16"))
    student = call(lambda place: WanLiteStudent.from_pretrained(place.student))
    auto = {"AutoModel": "evil--code.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    kernel = edit(ENCODER, attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    adapter = text(json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA"}))
    rows = [
        ("a kernel for attention", SAME, kernel, draw),
        ("a kernel for attention with a device map", ACCEPTED, kernel, mapped),
        (
            "an auto_map of the tokenizer",
            SAME,
            with_code("tokenizer/evil.py", edit(TOKENIZER_CONFIG, auto_map=auto)),
            draw,
        ),
        ("a class of the tokenizer", REFUSED, edit(TOKENIZER_CONFIG, tokenizer_class="evil.Evil"), draw),
        ("a backend of the tokenizer", SAME, edit(TOKENIZER_CONFIG, backend="mistral-common"), draw),
        (
            "an auto_map of the text encoder",
            SAME,
            with_code("text_encoder/evil.py", edit(ENCODER, auto_map=auto)),
            draw,
        ),
        (
            "an auto_map with a device map",
            ACCEPTED,
            with_code("text_encoder/evil.py", edit(ENCODER, auto_map=auto)),
            mapped,
        ),
        (
            "another file of the tokenizer",
            REFUSED,
            edit(TOKENIZER_CONFIG, fast_tokenizer_files=["../../outside/tokenizer.1.0.json"]),
            draw,
        ),
        ("a quantizer of the text encoder", SAME, edit(ENCODER, quantization_config=quantization), draw),
        ("a quantizer with a device map", ACCEPTED, edit(ENCODER, quantization_config=quantization), mapped),
        (
            "a module in model_index.json",
            ACCEPTED,
            with_code("evil.py", edit("model_index.json", vae=["evil", "Evil"])),
            pipeline,
        ),
        (
            "a class in model_index.json",
            ACCEPTED,
            with_code("pipeline.py", edit("model_index.json", _class_name=["pipeline", "Evil"])),
            pipeline,
        ),
        (
            "a module with a device map",
            ACCEPTED,
            with_code("evil.py", edit("model_index.json", vae=["evil", "Evil"])),
            mapped,
        ),
        (
            "an unknown part in model_index.json",
            ACCEPTED,
            edit("model_index.json", evil=["os", "system"]),
            pipeline,
        ),
        (
            "an adapter beside the text encoder",
            SAME,
            replace("text_encoder/adapter_config.json", adapter),
            draw,
        ),
        (
            "an adapter with a device map",
            ACCEPTED,
            replace("text_encoder/adapter_config.json", adapter),
            mapped,
        ),
        (
            "a pickle of a variant",
            ACCEPTED,
            replace("vae/diffusion_pytorch_model.fp16.bin", text("cos\nsystem\n(S'a'\ntR.")),
            variant,
        ),
        ("a scheduler of another class", REFUSED, edit(SETTINGS, _class_name="evil/scheduler"), draw),
        (
            "a student of another class",
            ACCEPTED,
            edit("config.json", _class_name="Evil", auto_map=auto),
            student,
        ),
        ("a name on the hub in a config", ACCEPTED, edit("config.json", _name_or_path="evil/model"), draw),
        (
            "a missing folder that could be a name",
            REFUSED,
            lambda place: ["--model", "someone/student"],
            draw,
        ),
    ]
    return [Input(kind, *row) for row in rows]
