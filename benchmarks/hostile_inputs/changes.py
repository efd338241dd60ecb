"""Files that change between a check and their use, and digests of pinned models."""

import json
import os
import shutil

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.hostile_inputs.builders import SETTINGS, TOKENIZER_CONFIG, edit, several, unseal
from benchmarks.hostile_inputs.trial import REFUSED, SAME, WEIGHTS, Input, Place, call, draw
from train_distillation import WanLiteStudent
from wanlite import WanLitePipeline


def changing_files() -> list[Input]:
    kind = "files that change"

    def overwritten(name, of):
        def run(place):
            pipeline = WanLitePipeline.from_pretrained(place.student)
            before = {key: value.clone() for key, value in of(pipeline).state_dict().items()}
            with open(place.student / name, "r+b") as file:
                file.write(b"\xff" * (place.student / name).stat().st_size)
            os.truncate(place.student / name, 100)
            after = of(pipeline).state_dict()
            return all(torch.equal(before[key], after[key]) for key in before)

        return call(run)

    def saved_between(place, arguments):
        """Save another student when the first has been loaded, and draw with the first."""
        original = WanLiteStudent.from_pretrained

        def load(cls, *positional, **named):
            found = original(*positional, **named)
            other = original(place.beside / "student")
            other.proj_out.weight.data += 1
            other.save_pretrained(place.student)
            return found

        digest = json.loads((place.beside / "digest.json").read_text())
        WanLiteStudent.from_pretrained = classmethod(load)
        draw(place, arguments)
        image = Image.open(next(place.images.glob("*.png")))
        return image.text["weights_sha256"] == digest["weights"]

    def note(place):
        import hashlib

        shutil.copytree(place.student, place.beside / "student")
        digest = hashlib.sha256((place.student / WEIGHTS).read_bytes()).hexdigest()
        (place.beside / "digest.json").write_text(json.dumps({"weights": digest}))

    def pinned(change, with_pipeline, **options):
        def prepare(place):
            from wanlite.student.digest import model_digest

            (place.beside / "pin").write_text(model_digest(place.student))
            change(place)
            return [] if with_pipeline else ["--sha256", (place.beside / "pin").read_text()]

        load = call(
            lambda place: bool(
                WanLitePipeline.from_pretrained(
                    place.student, sha256=(place.beside / "pin").read_text(), **options
                )
            )
        )
        return prepare, load if with_pipeline else draw

    def link_at(name):
        def prepare(place):
            place.images.mkdir(exist_ok=True)
            (place.outside / "mine").write_text("mine")
            (place.images / name).symlink_to("../outside/mine")

        return prepare

    def shift(place):
        path = place.student / f"vae/{WEIGHTS}"
        tensors = load_file(path)
        next(iter(tensors.values())).add_(0.01)
        save_file(tensors, path)
        unseal(path)

    def add(name, content):
        def prepare(place):
            (place.student / name).write_text(json.dumps(content))

        return prepare

    tokens = {"eos_token": "red", "pad_token": "blue"}
    more = {"weight_map": {"a": "model.safetensors"}}
    longer = edit(TOKENIZER_CONFIG, model_max_length=100)
    rows = [
        (
            "a student is overwritten after loading",
            SAME,
            lambda place: None,
            overwritten(WEIGHTS, lambda found: found.transformer),
        ),
        ("another student is saved after loading", SAME, note, saved_between),
        (
            "an autoencoder is overwritten after loading",
            SAME,
            lambda place: None,
            overwritten(f"vae/{WEIGHTS}", lambda found: found.vae),
        ),
        (
            "a text encoder is overwritten after loading",
            SAME,
            lambda place: None,
            overwritten("text_encoder/model.safetensors", lambda found: found.text_encoder),
        ),
        ("a pinned model has another autoencoder", REFUSED, *pinned(shift, False)),
        ("a pinned pipeline has another autoencoder", REFUSED, *pinned(shift, True)),
        ("a pinned pipeline has another tokenizer", REFUSED, *pinned(longer, True)),
        ("a pinned pipeline has another scheduler", REFUSED, *pinned(edit(SETTINGS, flow_shift=2.0), True)),
        (
            "a pinned pipeline of another order of the config",
            REFUSED,
            *pinned(edit("config.json", eps=1e-5), True),
        ),
        ("a pinned pipeline with a device map", REFUSED, *pinned(shift, True, device_map="cpu")),
        (
            "a pinned model has more files of a tokenizer",
            REFUSED,
            *pinned(add("tokenizer/special_tokens_map.json", tokens), False),
        ),
        (
            "a pinned pipeline has more added tokens",
            REFUSED,
            *pinned(add("tokenizer/added_tokens.json", {"ring": 3}), True),
        ),
        (
            "a pinned pipeline has an index of the text encoder",
            REFUSED,
            *pinned(add("text_encoder/model.safetensors.index.json", more), True),
        ),
        ("an unchanged pinned pipeline", SAME, *pinned(lambda place: None, True)),
        (
            "an image's name is a link",
            SAME,
            link_at("0000-a-small-red-circle-at-the-left-on-a-white-seed0.png"),
            draw,
        ),
        (
            "the log of a run is a link",
            SAME,
            several(
                lambda place: (place.beside / "run").mkdir(),
                lambda place: (place.outside / "mine").write_text("mine"),
                lambda place: (place.beside / "run/.metrics.jsonl.partial").symlink_to("../../outside/mine"),
            ),
            call(lambda place: write_metrics(place)),
        ),
    ]
    return [Input(kind, *row) for row in rows]


def write_metrics(place: Place) -> bool:
    """Write a log in a folder in which its partial file is a link; returns whether the target is unchanged."""
    from wanlite.training.run_folder import MetricsLog

    MetricsLog(place.beside / "run/metrics.jsonl", 0).write(step=1)
    return os.stat(place.outside / "mine").st_size == 4
