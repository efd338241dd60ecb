"""The hostile inputs of hostile.py: a function for each class, which returns its inputs."""

import json
import os
import random
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import torch
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.hostile_trial import (
    ACCEPTED,
    PROMPT,
    REFUSED,
    ROOT,
    SAME,
    WEIGHTS,
    Input,
    Place,
    call,
    draw,
    plan,
    train,
)
from train_distillation import WanLiteStudent
from wanlite import WanLitePipeline

ESCAPE, BIDI = "\x1b[2J\x1b]0;a\x07", "\u202egnp.\u2066"
HUGE = 3 * 10**9  # bytes of a sparse file
ODD = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    0.5,
    "",
    "a",
    "\ud800",
    [],
    [[]],
    {},
    {"a": [1]},
    [None] * 3,
)
SETTINGS = "scheduler/scheduler_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
ENCODER, VAE = "text_encoder/config.json", "vae/config.json"


def inputs(seed: int = 0) -> list[Input]:
    """Return all inputs; `seed` chooses the changed values among those of other types."""
    classes = (
        damaged_caches,
        links_out,
        endless_reads,
        changing_files,
        foreign_code,
        false_sizes,
        lambda: other_types(seed),
        other_images,
        control_characters,
        closed_streams,
        private_paths,
    )
    return [each for make in classes for each in make()]


def select(found: Sequence[Input], only: str | None, most: int | None) -> list[Input]:
    """Return the inputs whose class or name contains `only`, at most `most` of each class."""
    matching = [each for each in found if only is None or only in each.kind or only in each.name]
    classes = dict.fromkeys(each.kind for each in matching)
    return [each for kind in classes for each in islice((one for one in matching if one.kind == kind), most)]


# ---- builders ----------------------------------------------------------------------------------------------


def write_sparse(path: Path, size: int = HUGE) -> None:
    """Write a file of zeros that take no space on the disk."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)


def unseal(path: Path) -> None:
    """Remove the digest of a changed file, as its author would."""
    (path.parent / "manifest.json").unlink(missing_ok=True)


def edit(name: str, **changes: Any) -> Callable[[Place], None]:
    """Return a change of values in a JSON file; a value of `...` removes the key."""

    def prepare(place):
        path = place.student / name
        content = json.loads(path.read_text()) | changes
        content.pop("drawing_sha256", None)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        unseal(path)

    return prepare


def replace(name: str, write: Callable[[Path], Any]) -> Callable[[Place], None]:
    """Return a change that replaces a file by what `write(path)` makes."""

    def prepare(place):
        path = place.student / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        unseal(path)
        write(path)

    return prepare


def several(*changes: Callable[[Place], Any]) -> Callable[[Place], None]:
    """Return a change that makes several ones in turn."""

    def prepare(place):
        for change in changes:
            change(place)

    return prepare


def link_out(name: str, is_absolute: bool = False) -> Callable[[Place], None]:
    """Return a change that moves a file outside and leaves a link to it."""

    def prepare(place):
        path, target = place.student / name, place.outside / Path(name).name
        shutil.move(path, target) if path.exists() else target.write_text("{}")
        path.symlink_to(target if is_absolute else os.path.relpath(target, path.parent))
        if path.is_file():
            unseal(path)

    return prepare


def beside(name: str, write: Callable[[Path], Any], *flags: Any) -> Callable[[Place], list]:
    """Return a change that makes a file beside the student, named by the last of the `flags`."""

    def prepare(place):
        write(place.beside / name)
        return [*flags, place.beside / name]

    return prepare


def text(content: str) -> Callable[[Path], int]:
    """Return a function that writes a text."""
    return lambda path: path.write_bytes(content.encode("utf-8", "surrogatepass"))


def save_image(path: Path, **options: Any) -> None:
    """Write an image of the size that the tiny student draws."""
    Image.new("RGB", (64, 64), "red").save(path, **options)


def png(chunks: Sequence[tuple[bytes, bytes]], size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a PNG file with more chunks before its pixels."""
    width, height = size
    rows = zlib.compress((b"\0" + b"\xff\0\0" * min(width, 10**4)) * min(height, 10**4))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *chunks,
        (b"IDAT", rows),
        (b"IEND", b""),
    ]
    body = (
        struct.pack(">I", len(each)) + kind + each + struct.pack(">I", zlib.crc32(kind + each))
        for kind, each in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def header_file(header: Any, length: int | None = None, body: bytes = b"") -> Callable[[Path], int]:
    """Return a function that writes a safetensors file with this header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if length is None else length
    return lambda path: path.write_bytes(struct.pack("<Q", size % 2**64) + content + body)


def captioned(place: Place) -> Path:
    """Make a folder of three captioned images beside the student."""
    folder = place.beside / "photos"
    folder.mkdir()
    for number, name in enumerate("abc"):
        Image.new("RGB", (80, 80), (0, 0, 80 * number)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo {name}")
    return folder


# ---- damaged caches ----------------------------------------------------------------------------------------


def damaged_caches() -> list[Input]:
    kind = "damaged cache"

    def damage(pattern, change):
        def prepare(place):
            folder = shutil.copytree(place.run / "cache", place.beside / "run/cache")
            for path in sorted(folder.glob(pattern))[:1]:
                change(path)

        return prepare

    def flip(path, name=None):
        content = bytearray(path.read_bytes())
        position = len(content) - 2
        if name:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            position = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
        content[position] ^= 1
        path.write_bytes(content)

    def change(path, how):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        how(tensors)
        save_file(tensors, path, metadata)

    def nan(tensors):
        next(value for value in tensors.values() if value.is_floating_point()).view(-1)[0] = float("nan")

    shard, text_shard = "trajectories-*/shard-*", "text-*/shard-*"
    rows = [
        ("a bit of the velocity", shard, lambda path: flip(path, "velocity")),
        ("noise levels are missing", shard, lambda path: change(path, lambda each: each.pop("noise_level"))),
        ("NaN in the embeddings", text_shard, lambda path: change(path, nan)),
        ("an empty shard", shard, lambda path: path.write_bytes(b"")),
        ("a pipe for a shard", text_shard, lambda path: (path.unlink(), os.mkfifo(path))),
        ("a folder for a shard", shard, lambda path: (path.unlink(), path.mkdir())),
        (
            "a row more in all tensors",
            shard,
            lambda path: change(
                path,
                lambda each: each.update({key: torch.cat([value, value[:1]]) for key, value in each.items()}),
            ),
        ),
        (
            "an older shard for another",
            "trajectories-*",
            lambda folder: shutil.copy(
                *sorted(folder.parent.glob("text-*/shard-*"))[:1], next(folder.glob("shard-*"))
            ),
        ),
        ("a header of 3 GB", text_shard, lambda path: header_file(b"{", 2**63)(path)),
        ("a broken provenance", "text-*/provenance.json", lambda path: path.write_text("[" * 10**6)),
    ]
    return [Input(kind, name, SAME, damage(pattern, how), train, True) for name, pattern, how in rows]


# ---- links out ---------------------------------------------------------------------------------------------


def links_out() -> list[Input]:
    kind = "links and names out"

    def index_out(name):
        def prepare(place):
            path = place.student / "text_encoder/model.safetensors"
            shutil.move(path, place.outside / "x.safetensors")
            with safe_open(place.outside / "x.safetensors", "np") as file:
                weight_map = dict.fromkeys(file.keys(), name.format(outside=place.outside))
            (path.parent / f"{path.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
            unseal(path)

        return prepare

    def folder_out(name):
        def prepare(place):
            shutil.move(place.student / name, place.outside / name)
            (place.student / name).symlink_to(f"../outside/{name}")

        return prepare

    def manifest_out(place):
        (place.outside / "secret").write_text("a secret")
        path = place.student / "vae/manifest.json"
        content = json.loads(path.read_text())
        content["files"]["../../outside/secret"] = {"size": 8}
        path.write_text(json.dumps(content))

    def loop(place):
        path = place.student / TOKENIZER
        path.unlink()
        path.symlink_to("tokenizer.json")

    def photos_out(change):
        def prepare(place):
            folder = captioned(place)
            change(folder, place.outside)
            return ["--images", folder, "--num_images", 2]

        return prepare

    def caption_out(folder, outside):
        (outside / "secret.txt").write_text("a secret")
        (folder / "a.txt").unlink()
        (folder / "a.txt").symlink_to("../../outside/secret.txt")

    def metadata_out(folder, outside):
        save_image(outside / "secret.png")
        rows = [
            {"file_name": "../../outside/secret.png", "text": "a"},
            {"file_name": str(outside / "secret.png"), "text": "b"},
        ]
        rows += [{"file_name": f"{name}.png", "text": name} for name in "abc"]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def tar_out(folder, outside):
        save_image(outside / "secret.png")
        with tarfile.open(folder / "x.tar", "w") as tar:
            for name in ("a.png", "a.txt", "b.png", "b.txt"):
                tar.add(folder / name, name)
            for number, target in enumerate((f"{outside}/secret.png", "../../outside/secret.png")):
                entry = tarfile.TarInfo(f"link{number}.png")
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)

    pipeline = call(lambda place: WanLitePipeline.from_pretrained(place.student))
    student = call(lambda place: WanLiteStudent.from_pretrained(place.student))
    rows = [
        ("run.json is a link", REFUSED, link_out("run.json"), draw),
        ("an index of the text encoder", REFUSED, index_out("../../outside/x.safetensors"), draw),
        ("a caption is a link", ACCEPTED, photos_out(caption_out), plan),
        ("an index with an absolute name", REFUSED, index_out("{outside}/x.safetensors"), draw),
        (
            "an index with a name in another folder",
            REFUSED,
            index_out("../vae/../../outside/x.safetensors"),
            pipeline,
        ),
        ("the tokenizer is a link", REFUSED, link_out(TOKENIZER, True), draw),
        ("the scheduler is a link", REFUSED, link_out(SETTINGS), draw),
        ("the config of a pipeline is a link", REFUSED, link_out("config.json", True), pipeline),
        ("the weights of a student are a link", REFUSED, link_out(WEIGHTS), student),
        ("the folder of the autoencoder is a link", REFUSED, folder_out("vae"), draw),
        ("the folder of the scheduler is a link", REFUSED, folder_out("scheduler"), pipeline),
        ("model_index.json is a link", REFUSED, link_out("model_index.json"), pipeline),
        ("added_tokens.json is a link", REFUSED, link_out("tokenizer/added_tokens.json"), draw),
        ("a chat template is a link", REFUSED, link_out("tokenizer/chat_template.jinja"), draw),
        (
            "a template in a folder is a link",
            REFUSED,
            several(
                lambda place: (place.student / "tokenizer/additional_chat_templates").mkdir(),
                link_out("tokenizer/additional_chat_templates/a.jinja"),
            ),
            draw,
        ),
        ("a manifest names a file outside", REFUSED, manifest_out, draw),
        ("a loop of links", REFUSED, loop, draw),
        (
            "a link through /proc",
            REFUSED,
            several(
                lambda place: shutil.move(place.student / SETTINGS, place.outside / "s"),
                lambda place: (place.student / SETTINGS).symlink_to(f"/proc/self/root{place.outside}/s"),
            ),
            draw,
        ),
        ("rows of metadata lead out", ACCEPTED, photos_out(metadata_out), plan),
        ("links in a tar", ACCEPTED, photos_out(tar_out), plan),
    ]
    return [Input(kind, *row) for row in rows]


# ---- reads without an end ----------------------------------------------------------------------------------


def endless_reads() -> list[Input]:
    kind = "reads without an end"

    def teacher(name, write):
        def prepare(place):
            folder = place.beside / "teacher"
            shutil.copytree(ROOT / "tiny_teacher", folder)
            (folder / name).unlink(missing_ok=True)
            write(folder / name)
            return ["--teacher", folder]

        return prepare

    def nested_parquet(path):
        rows = pyarrow.array([[[["a"] * 50] * 50] * 50] * 40)
        parquet.write_table(pyarrow.table({"prompt": rows}), path)

    def photo(write):
        def prepare(place):
            write(place.beside / "a.png")
            return ["--image", place.beside / "a.png"]

        return prepare

    bomb = zlib.compress(bytes(2**30), 9)
    prompts = lambda name, write: beside(name, write, "--prompts_file")  # noqa: E731
    rows = [
        ("run.json is a pipe", REFUSED, replace("run.json", os.mkfifo), draw),
        ("a model_index.json of 3 GB", REFUSED, teacher("model_index.json", write_sparse), plan),
        (
            "a line of 300 MB",
            REFUSED,
            prompts("a.txt", lambda path: path.write_bytes(b"a" * 3 * 10**8)),
            draw,
        ),
        ("a tokenizer is a pipe", REFUSED, replace(TOKENIZER, os.mkfifo), draw),
        ("a tokenizer of 3 GB", REFUSED, replace(TOKENIZER, write_sparse), draw),
        ("a chat template of 3 GB", REFUSED, replace("tokenizer/chat_template.jinja", write_sparse), draw),
        (
            "a sentencepiece model of 3 GB",
            REFUSED,
            several(
                lambda place: (place.student / TOKENIZER).unlink(),
                replace("tokenizer/spiece.model", write_sparse),
            ),
            draw,
        ),
        ("merges of 3 GB", SAME, replace("tokenizer/merges.txt", write_sparse), draw),
        (
            "a scheduler is /dev/zero",
            REFUSED,
            replace(SETTINGS, lambda path: path.symlink_to("/dev/zero")),
            draw,
        ),
        (
            "a config is a socket",
            REFUSED,
            several(
                lambda place: os.chdir(place.student),
                lambda place: (place.student / "config.json").unlink(),
                lambda place: socket.socket(socket.AF_UNIX).bind("config.json"),
            ),
            draw,
        ),
        ("a manifest of 3 GB", REFUSED, replace("vae/manifest.json", write_sparse), draw),
        ("a config nested a million times", REFUSED, replace(VAE, text("[" * 10**6)), draw),
        (
            "an autoencoder with a header of 100 MB",
            REFUSED,
            replace(f"vae/{WEIGHTS}", header_file(b" " * 10**8)),
            draw,
        ),
        ("prompts are a pipe", REFUSED, prompts("a.txt", os.mkfifo), draw),
        (
            "prompts are /dev/zero",
            REFUSED,
            prompts("a.jsonl", lambda path: path.symlink_to("/dev/zero")),
            draw,
        ),
        ("prompts nested a million times", REFUSED, prompts("a.json", text("[" + "[" * 10**6)), draw),
        ("prompts of nested lists", REFUSED, prompts("a.parquet", nested_parquet), draw),
        ("a quote without its end", REFUSED, prompts("a.csv", text('prompt\n"' + "a\n" * 10**6)), draw),
        ("an image is a pipe", REFUSED, photo(os.mkfifo), draw),
        (
            "an image of 10 gigapixels",
            REFUSED,
            photo(lambda path: path.write_bytes(png([], (10**5, 10**5)))),
            draw,
        ),
        (
            "an image with a text that unpacks to 1 GB",
            ACCEPTED,
            photo(
                lambda path: path.write_bytes(
                    png([(b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"b\0\1\0\0\0" + bomb)])
                )
            ),
            draw,
        ),
        (
            "an image with a profile that unpacks to 1 GB",
            ACCEPTED,
            photo(lambda path: path.write_bytes(png([(b"iCCP", b"a\0\0" + bomb)]))),
            draw,
        ),
    ]
    return [Input(kind, *row) for row in rows]


# ---- files that change -------------------------------------------------------------------------------------


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


# ---- code and network --------------------------------------------------------------------------------------


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


# ---- sizes that no weights back ----------------------------------------------------------------------------


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


# ---- values of other types ---------------------------------------------------------------------------------


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


# ---- other images ------------------------------------------------------------------------------------------


def other_images() -> list[Input]:
    kind = "other images"

    def batch(prepare):
        def with_batch(place):
            path = place.beside / "prompts.txt"
            path.write_text(f"{PROMPT}\na blue cross\na ring\n{PROMPT} and a ring")
            prepare(place)
            return ["--prompts_file", path, "--batch_size", 4]

        return with_batch

    def keeping_manifest(name, **changes):
        def prepare(place):
            path = place.student / name
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return prepare

    rows = [
        ("thresholding", REFUSED, edit(SETTINGS, thresholding=True), draw),
        ("padding on the left", SAME, edit(TOKENIZER_CONFIG, padding_side="left"), draw),
        (
            "padding on the left by the tokenizer",
            SAME,
            edit(
                TOKENIZER,
                padding={
                    "strategy": "BatchLongest",
                    "direction": "Left",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "<pad>",
                },
            ),
            draw,
        ),
        (
            "truncation to two tokens",
            SAME,
            edit(
                TOKENIZER,
                truncation={"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            ),
            draw,
        ),
        ("a length of two tokens", SAME, edit(TOKENIZER_CONFIG, model_max_length=2), draw),
        (
            "a lower-case setting of the tokenizer",
            REFUSED,
            keeping_manifest(TOKENIZER_CONFIG, do_lower_case=False),
            draw,
        ),
        ("another epsilon of the text encoder", REFUSED, edit(ENCODER, layer_norm_epsilon=0.1), draw),
        (
            "another activation of the text encoder",
            REFUSED,
            edit(ENCODER, feed_forward_proj="gated-silu", dense_act_fn="silu"),
            draw,
        ),
        (
            "another distance of the text encoder",
            REFUSED,
            edit(ENCODER, relative_attention_max_distance=8),
            draw,
        ),
        ("a text encoder in half precision", SAME, keeping_manifest(ENCODER, dtype="bfloat16"), draw),
        ("dropout in the autoencoder", SAME, edit(VAE, dropout=0.5), draw),
        ("dropout in the text encoder", SAME, edit(ENCODER, dropout_rate=0.5), draw),
        ("another order of the solver", REFUSED, edit(SETTINGS, solver_order=2), draw),
        ("another spacing of timesteps", REFUSED, edit(SETTINGS, timestep_spacing="trailing"), draw),
        ("a shift of the last step", REFUSED, edit(SETTINGS, shift_terminal=0.1), draw),
        ("an unknown setting of the scheduler", REFUSED, edit(SETTINGS, evil=1), draw),
        ("another epsilon of the student", REFUSED, edit("config.json", eps=0.1), draw),
        ("another patch of the student", REFUSED, edit("config.json", patch_size=[1, 1, 4]), draw),
        ("another stride of the autoencoder", REFUSED, edit(VAE, scale_factor_spatial=16), draw),
        (
            "other statistics of the autoencoder",
            REFUSED,
            keeping_manifest(VAE, latents_mean=[0.1] * 16),
            draw,
        ),
    ]
    return [Input(kind, *row) for row in rows]


# ---- control characters ------------------------------------------------------------------------------------


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


# ---- closed pipes, encodings, signals ----------------------------------------------------------------------


def closed_streams() -> list[Input]:
    kind = "closed streams"

    def with_output(make, run=draw):
        def way(place, arguments):
            make()
            return run(place, arguments)

        return way

    def closed_pipe():
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1), os.dup2(writing, 2)

    def full():
        number = os.open("/dev/full", os.O_WRONLY)
        os.dup2(number, 1), os.dup2(number, 2)

    def narrow():
        import sys

        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")

    def closed():
        import sys

        os.close(1), os.close(2)
        sys.stdout = sys.stderr = None

    cached = lambda place: shutil.copytree(place.run / "cache", place.beside / "run/cache") and None  # noqa: E731
    emoji = lambda place: ["--prompt", f"{PROMPT} \N{ARTIST PALETTE}"]  # noqa: E731
    nothing = lambda place: None  # noqa: E731
    rows = [
        ("drawing into a closed pipe", SAME, nothing, with_output(closed_pipe)),
        ("training into a closed pipe", SAME, cached, with_output(closed_pipe, train), True),
        ("drawing into a full device", SAME, nothing, with_output(full)),
        ("drawing without output", SAME, nothing, with_output(closed)),
        ("an emoji in an ASCII terminal", ACCEPTED, emoji, with_output(narrow)),
    ]
    return [Input(kind, *row) for row in rows]


# ---- paths of this machine ---------------------------------------------------------------------------------


def _holds(folder: Path, *words: str) -> bool:
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return any(word.encode() in content for word in words for content in files)


def private_paths() -> list[Input]:
    kind = "paths of this machine"

    def drawing(*arguments):
        def way(place, more):
            draw(place, [*arguments, *more])
            return not _holds(place.images, str(place.student.parent))

        return way

    def saved(place):
        pipeline = WanLitePipeline.from_pretrained(place.student)
        pipeline.save_pretrained(place.beside / "saved")
        teacher = json.loads((place.student / "run.json").read_text())["settings"]["teacher"]
        return not _holds(place.beside / "saved", str(place.student.parent), str(Path(teacher).absolute()))

    def published(place):
        from wanlite.training.publishing import copy_without_paths

        record = json.loads((place.student / "run.json").read_text())
        record["settings"] |= {
            "teacher": str(place.student.parent / "wan"),
            "prompts": str(place.beside / "p.txt"),
        }
        record.setdefault("report", {})["directory"] = str(place.student.parent)
        (place.student / "run.json").write_text(json.dumps(record))
        return not _holds(copy_without_paths(place.student, "someone/student"), str(place.student.parent))

    def photo(place):
        save_image(place.beside / "a.png")
        return ["--image", place.beside / "a.png", "--mask", place.beside / "a.png"]

    def prompts(place):
        (place.beside / "p.txt").write_text(PROMPT)
        return ["--prompts_file", place.beside / "p.txt"]

    nothing = lambda place: None  # noqa: E731
    rows = [
        ("an image", SAME, nothing, drawing()),
        ("a grid", SAME, nothing, drawing("--num_images_per_prompt", 2)),
        ("an image that was changed", SAME, photo, drawing()),
        ("an image of a file of prompts", SAME, prompts, drawing()),
        ("a saved pipeline", SAME, nothing, call(saved)),
        ("a published run", SAME, nothing, call(published)),
    ]
    return [Input(kind, *row) for row in rows]
