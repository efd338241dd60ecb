"""Control characters in names, texts and messages."""

import json
import shutil

import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from benchmarks.hostile_inputs.builders import (
    BIDI,
    ESCAPE,
    SETTINGS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    beside,
    captioned,
    edit,
    replace,
    several,
    text,
)
from benchmarks.hostile_inputs.trial import ACCEPTED, PROMPT, REFUSED, WEIGHTS, Input, call, draw, plan
from train_distillation import WanLiteStudent


def control_characters() -> list[Input]:
    kind = "control characters"

    def prompts_of_run(prompt):
        return lambda place: edit("run.json", validation_prompts=[prompt])(place) or ["--no-prompt"]

    def photos(place):
        folder = captioned(place)
        (folder / "a.png").rename(folder / f"{ESCAPE}.png")
        (folder / f"b{BIDI}.png").write_bytes(b"no image")
        (folder / f"b{BIDI}.txt").write_text("b")
        (folder / "c.txt").write_text(f"{ESCAPE} a photo {BIDI}")
        return ["--images", folder, "--num_images", 2]

    def renamed(change):
        def prepare(place):
            path = place.beside / f"a{ESCAPE}"
            shutil.move(place.student, path)
            change(path)
            return ["--model", path]

        return prepare

    def columns(path):
        parquet.write_table(pyarrow.table({f"a{ESCAPE}": ["a"], f"b{BIDI}": ["b"]}), path)

    def tensor_name(path):
        save_file({f"a{ESCAPE}": torch.zeros(1)}, path)

    student = call(lambda place: WanLiteStudent.from_pretrained(place.student))
    prompts = lambda name, write: beside(name, write, "--prompts_file")  # noqa: E731
    rows = [
        ("a validation prompt clears the terminal", ACCEPTED, prompts_of_run(f"{ESCAPE} a {BIDI}"), draw),
        (
            "few_steps of 5 MB of text",
            REFUSED,
            edit("run.json", schedule={"few_steps": "a" * 5 * 10**6}),
            draw,
        ),
        (
            "a prompt with a carriage return",
            ACCEPTED,
            lambda place: ["--prompt", f"a\rb{ESCAPE}\x9b2J\u2028"],
            draw,
        ),
        ("a file of prompts", ACCEPTED, prompts("a.txt", text(f"{PROMPT}{ESCAPE}{BIDI}")), draw),
        ("names of columns", REFUSED, prompts("a.parquet", columns), draw),
        ("names of columns of a CSV", REFUSED, prompts("a.csv", text(f"a{ESCAPE},b{BIDI}\n1,2")), draw),
        ("the name of a file of prompts", REFUSED, prompts(f"a{ESCAPE}.txt", text("")), draw),
        ("the name of a tensor", REFUSED, replace(WEIGHTS, tensor_name), student),
        ("the name of a tensor of the autoencoder", REFUSED, replace(f"vae/{WEIGHTS}", tensor_name), draw),
        ("a key of the scheduler", REFUSED, edit(SETTINGS, **{ESCAPE: ESCAPE}), draw),
        ("a key of a student", ACCEPTED, edit("config.json", **{f"a{ESCAPE}{BIDI}": 1}), draw),
        ("a class of a scheduler", REFUSED, edit(SETTINGS, _class_name=f"{ESCAPE}{BIDI}" * 10**5), draw),
        ("a class of a tokenizer", REFUSED, edit(TOKENIZER_CONFIG, tokenizer_class=ESCAPE * 10**5), draw),
        (
            "a name in a manifest",
            REFUSED,
            replace("vae/manifest.json", text(json.dumps({"files": {f"a{ESCAPE}" * 10**4: {"size": 1}}}))),
            draw,
        ),
        (
            "a name in an index",
            REFUSED,
            several(
                lambda place: (place.student / "text_encoder/model.safetensors").unlink(),
                replace(
                    "text_encoder/model.safetensors.index.json",
                    text(json.dumps({"weight_map": {"a": f"{ESCAPE}" * 10**4}})),
                ),
            ),
            draw,
        ),
        ("the name of a model's folder", ACCEPTED, renamed(lambda path: None), draw),
        (
            "the name of a broken model's folder",
            REFUSED,
            renamed(lambda path: (path / "config.json").unlink()),
            draw,
        ),
        ("names and captions of images", ACCEPTED, photos, plan),
        ("a setting of a run", ACCEPTED, edit("run.json", settings={"aspect_ratios": [ESCAPE]}), draw),
        ("steps of 1 MB of text", REFUSED, edit("run.json", num_inference_steps="a" * 10**6), draw),
        ("a resolution of text", REFUSED, edit("run.json", resolution=[ESCAPE * 10**5, BIDI]), draw),
        ("a part of a tokenizer", REFUSED, edit(TOKENIZER, normalizer={"type": ESCAPE * 10**5}), draw),
        (
            "a message of the tokenizers library",
            REFUSED,
            edit(TOKENIZER, model={"type": "WordLevel", "vocab": {}, "unk_token": [ESCAPE]}),
            draw,
        ),
    ]
    return [Input(kind, *row) for row in rows]
