"""Reads that block, or that have no bound."""

import os
import shutil
import socket
import tarfile
import zlib

import pyarrow
from pyarrow import parquet

from benchmarks.hostile_inputs.builders import (
    SETTINGS,
    TOKENIZER,
    VAE,
    beside,
    captioned,
    header_file,
    png,
    replace,
    several,
    tar_header,
    text,
    write_sparse,
)
from benchmarks.hostile_inputs.trial import ACCEPTED, REFUSED, ROOT, SAME, WEIGHTS, Input, draw, plan


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

    def nested(place):
        (place.student / "vae" / "/".join("d" * 200)).mkdir(parents=True)

    def archive(header):
        def prepare(place):
            folder = captioned(place)
            with tarfile.open(folder / "x.tar", "w") as tar:
                for name in ("a.png", "a.txt"):
                    tar.add(folder / name, name)
            content = (folder / "x.tar").read_bytes()
            (folder / "x.tar").write_bytes(header + content)
            return ["--images", folder]

        return prepare

    def empty_rows(path):
        columns = {"image": pyarrow.binary(), "text": pyarrow.string()}
        rows = {name: pyarrow.nulls(10**7, kind) for name, kind in columns.items()}
        parquet.write_table(pyarrow.table(rows), path)

    long_name = tar_header("a", b"00000000002", b"L") + b"ab".ljust(512, b"\0")
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
            "an image of 64 megapixels",
            REFUSED,
            photo(lambda path: path.write_bytes(png([], (8000, 8000)))),
            draw,
        ),
        ("folders in folders in the autoencoder's", REFUSED, nested, draw),
        (
            "a tar with a member of 2^80 bytes",
            REFUSED,
            archive(tar_header("z.png", b"\x80" + b"\x7f" * 11)),
            plan,
        ),
        ("a tar of 20,000 names of names", REFUSED, archive(long_name * 20_000), plan),
        ("a table of ten million empty images", REFUSED, beside("i.parquet", empty_rows, "--images"), plan),
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
