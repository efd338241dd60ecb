"""Files of any content are refused quickly and cheaply, and nothing outside a folder is opened."""

import hashlib
import io
import json
import os
import resource
import shutil
import tarfile
import time
import zlib
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import TINY_TEACHER, fork
from tests.test_images import CONTENTS, SIZE, table, write_saved_dataset, write_tar
from wanlite.data.image_sources import list_images
from wanlite.data.images import MAX_DECODED, choose_images, decode
from wanlite.data.listed_images import Unusable
from wanlite.data.prompts import read_prompts
from wanlite.data.text_encoder import load_tokenizer
from wanlite.files.atomic import (
    _describe,
    find_corruption,
    find_corruption_once,
    new_folder,
    read_manifest,
    write_json,
)
from wanlite.files.cache import cache_folder, read_record, write_record
from wanlite.files.inside import OutsideError, check_inside, plain_name, resolve_inside
from wanlite.files.json_files import DOWNLOADED, OWN, SAVED, open_regular, read_json
from wanlite.files.text_files import open_text
from wanlite.files.weights import WeightsFile
from wanlite.student.saving import FILE_LIST
from wanlite.training.run_folder import MetricsLog, read_run

# ---- inside a folder ---------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place" / "below").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "place" / "own.txt").write_text("own")
    return tmp_path / "place"


OUTSIDE = [
    "../secret.txt",
    "below/../../secret.txt",
    "/etc/passwd",
    "link",
    "chain",
    "folder/secret.txt",
    "loop",
    "a\0",
]


@pytest.mark.parametrize("name", [*OUTSIDE, 7, "\ud800"])
def test_a_name_or_link_that_leads_out_is_refused(name, place):
    (place / "link").symlink_to("../secret.txt")
    (place / "chain").symlink_to("link")
    (place / "folder").symlink_to("..")
    (place / "loop").symlink_to("loop")
    with pytest.raises(OutsideError) as refused:
        resolve_inside(place, name)
    assert len(str(refused.value)) < 500 and str(refused.value).isprintable()


def test_names_and_links_inside_a_folder_are_accepted(place):
    (place / "below" / "up").symlink_to("../own.txt")
    (place.parent / "linked").symlink_to("place")
    for folder in (place, place.parent / "linked"):
        for name in ("own.txt", "below/../own.txt", "missing.txt", "below/up", str(folder / "own.txt")):
            assert resolve_inside(folder, name) == folder / name


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_links_to_blobs_of_the_hubs_cache_are_inside(kind, place):
    repository = place / f"{kind}--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/1/vae").mkdir(parents=True)
    (repository / "blobs/0").write_text("{}")
    (repository / "snapshots/1/vae/config.json").symlink_to("../../../blobs/0")
    (repository / "snapshots/1/vae/out.json").symlink_to(place / "own.txt")
    (place / "linked").symlink_to(repository / "snapshots/1")
    for folder in (repository / "snapshots/1", place / "linked"):
        assert resolve_inside(folder, "vae/config.json").read_text() == "{}"
        with pytest.raises(OutsideError, match="leads out of the folder"):
            resolve_inside(folder, "vae/out.json")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0b", None, 7, "../x.safetensors"])
def test_the_name_of_a_file_in_an_index_is_a_plain_one(name):
    with pytest.raises(OSError, match="index.json: names a file"):
        plain_name(name, "index.json")
    assert plain_name("a-00001-of-00002.safetensors", "index.json") == "a-00001-of-00002.safetensors"


def write_component(folder):
    with new_folder(folder / "vae") as partial:
        (partial / "config.json").write_text("{}")
        (partial / "weights.bin").write_bytes(bytes(1000))
    return folder


BREAKS = {
    "a link out": lambda vae: (
        (vae / "config.json").unlink() or (vae / "config.json").symlink_to("/etc/hostname")
    ),
    "a folder that is a link": lambda vae: (
        shutil.move(vae, vae.parent.parent / "elsewhere") and vae.symlink_to("../elsewhere")
    ),
    "a pipe": lambda vae: os.mkfifo(vae / "pipe"),
    "a device": lambda vae: (vae / "zero").symlink_to("/dev/zero"),
    "a huge config": lambda vae: os.truncate(vae / "config.json", 3 * 10**9),
    "an index that leads out": lambda vae: (vae / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../elsewhere/x.safetensors"}})
    ),
    "an index of other types": lambda vae: (vae / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": [1]}}'
    ),
    "an index without files": lambda vae: (vae / "model.safetensors.index.json").write_text("{}"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_component_that_reaches_outside_is_refused(name, tmp_path):
    folder = write_component(tmp_path / "student")
    check_inside(folder, "vae")
    BREAKS[name](folder / "vae")
    with pytest.raises(OSError, match="vae"):
        check_inside(folder, "vae")


def test_every_component_of_the_tiny_teacher_is_inside():
    for component in ("tokenizer", "text_encoder", "vae", "transformer"):
        check_inside(TINY_TEACHER, component)


def test_a_manifest_that_names_a_file_outside_is_a_corruption(tmp_path):
    write_component(tmp_path / "student")
    (tmp_path / "secret").write_text("secret")
    files = read_manifest(tmp_path / "student/vae")["files"]
    write_json(tmp_path / "student/vae/manifest.json", {"files": files | {"../../secret": {"size": 6}}})
    assert "leads out of the folder" in find_corruption(tmp_path / "student/vae")


def test_a_run_record_that_is_a_link_to_outside_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other.json").write_text('{"settings": {}}')
    (tmp_path / "run/run.json").symlink_to("../other.json")
    with pytest.raises(OSError, match="leads out of the folder"):
        read_run(tmp_path / "run")


def test_a_save_moves_no_file_that_an_earlier_one_names_outside(tmp_path, sound_student):
    stage = tmp_path / "student/.saving-1-0"
    stage.mkdir(parents=True)
    write_json(stage / FILE_LIST, {"files": ["../../secret"], "infix": ""})
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(OSError, match="names a file"):
        sound_student.save_pretrained(tmp_path / "student")
    assert (tmp_path / "secret").read_text() == "secret"


def test_images_captions_and_tables_outside_of_their_folder_are_named(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "secret.png").write_bytes(CONTENTS[0])
    for name in "abc":
        (place / f"{name}.png").write_bytes(CONTENTS[0])
        (place / f"{name}.txt").write_text(name)
    (place / "a.txt").unlink()
    (place / "a.txt").symlink_to("../secret.txt")
    (place / "b.png").unlink()
    (place / "b.png").symlink_to("../secret.png")
    printed = []
    assert [image.caption for image in choose_images(place, SIZE, log=printed.append)] == ["c"]
    assert "outside the folder (2: a.png, b.png)" in printed[0] and "secret" not in printed[0]


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.tar", "metadata.jsonl", "state.json", "dataset_dict.json", "train"]
)
def test_a_table_of_images_outside_of_its_folder_is_refused(name, tmp_path):
    (tmp_path / "place").mkdir()
    parquet.write_table(table(), tmp_path / "a.parquet")
    write_tar(tmp_path / "a.tar", [("a.png", CONTENTS[0]), ("a.txt", b"a")])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    write_saved_dataset(tmp_path / "saved")
    for each in ("dataset_dict.json", "train", "train/state.json"):
        (tmp_path / Path(each).name).symlink_to(tmp_path / "saved" / each)
    if name == "train":
        (tmp_path / "place/dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "place" / name).symlink_to(tmp_path / name)
    with pytest.raises(OSError, match="leads out of the folder"):
        list_images(tmp_path / "place")
    if name.startswith("a."):  # a link that the user names is followed
        assert list_images(tmp_path / "place" / name)


# ---- bounds ------------------------------------------------------------------------------------------------


def write_zeros(path):
    path.touch()
    os.truncate(path, 3 * 10**9)


HOSTILE = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "zeros": write_zeros,
    "depth": lambda path: path.write_bytes(b"[" * 40_000_000),
    "one line": lambda path: path.write_bytes(b"a" * 300_000_000),
    "folder": Path.mkdir,
}
READERS = {
    "saved.json": lambda path: read_json(path, SAVED),
    "downloaded.json": lambda path: read_json(path, DOWNLOADED),
    "own.json": lambda path: read_json(path, OWN),
    "prompts.txt": read_prompts,
    "prompts.jsonl": read_prompts,
    "prompts.json": read_prompts,
    "prompts.csv": read_prompts,
    "prompts.parquet": read_prompts,
    "images.parquet": lambda path: choose_images(str(path), SIZE),
    "images.tar": lambda path: choose_images(str(path), SIZE),
    "metadata.jsonl": lambda path: choose_images(str(path.parent), SIZE),
    "metadata.csv": lambda path: choose_images(str(path.parent), SIZE),
    "state.json": lambda path: choose_images(str(path.parent), SIZE),
    "a.png": lambda path: choose_images(str(path.parent), SIZE),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_a_second_and_200_megabytes(kind, reader, tmp_path):
    path = tmp_path / "place" / reader
    path.parent.mkdir()
    HOSTILE[kind](path)
    if reader == "a.png":
        path.with_suffix(".txt").write_text("a")

    assert fork(lambda: check_refused(READERS[reader], path)) == 0


def check_refused(read, path):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((OSError, ValueError)) as refused:
        read(path)
    seconds = time.process_time() - began
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert seconds < 1 and megabytes < 200 and len(str(refused.value)) < 500, (seconds, megabytes)


def write_compressed_parquet(path):
    rows = ["a" * 2**27]
    parquet.write_table(pyarrow.table({"prompt": rows}), path, compression="zstd", use_dictionary=False)


def write_compressed_dataset(path):
    image = pyarrow.array([bytes(2**29)], pyarrow.binary())
    part = pyarrow.table({"image": image, "caption": ["a"]})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.ipc.new_stream(file, part.schema, options=options) as stream,
    ):
        stream.write_table(part)
    path.with_name("state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))


def write_large_header(path):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a" * 2**25}) as tar:
        entry = tarfile.TarInfo("a.png")
        tar.addfile(entry, io.BytesIO())


UNPACKED = {
    "prompts.parquet": (write_compressed_parquet, read_prompts, "in a group of 1 rows"),
    "a.arrow": (write_compressed_dataset, lambda path: list_images(path.parent), "too large to be unpacked"),
    "a.tar": (write_large_header, list_images, "a header of"),
}


@pytest.mark.parametrize(
    "read",
    [
        open_text,
        WeightsFile,
        lambda path: read_json(path, OWN),
        lambda path: open_regular(path).read(10),
        lambda path: open_regular(path).readall(),
        lambda path: open_regular(path).read_at(bytearray(10), 0),
        lambda path: hashlib.file_digest(open_regular(path), "sha256"),
        lambda path: io.BufferedReader(open_regular(path)).read(10),
    ],
    ids=["text", "weights", "json", "bytes", "all bytes", "a place", "hash", "buffered"],
)
def test_a_file_that_a_disk_does_not_deliver_is_named(read):
    unreadable = "/proc/self/mem"  # a regular file; its first page cannot be read
    with pytest.raises(
        OSError, match=rf"^{unreadable}: cannot be read \(Input/output error\)\. Check its disk"
    ):
        read(unreadable)


@pytest.mark.parametrize("name", UNPACKED)
def test_a_small_file_with_a_large_content_is_refused(name, tmp_path):
    write, read, words = UNPACKED[name]
    assert fork(lambda: write(tmp_path / name)) == 0
    assert (tmp_path / name).stat().st_size < 2**26
    with pytest.raises(ValueError, match=words):
        read(tmp_path / name)


def test_an_image_is_bounded_by_its_bytes_in_memory():
    width = 8200  # with 4 bytes a pixel; the limit of pixels is not reached
    header = b"IHDR" + width.to_bytes(4, "big") * 2 + bytes([8, 6, 0, 0, 0])
    content = (
        b"\x89PNG\r\n\x1a\n\0\0\0\r"
        + header
        + zlib.crc32(header).to_bytes(4, "big")
        + b"\0\0\0\x10IDAT"
        + bytes(64)
    )
    assert width**2 * 3 < MAX_DECODED < width**2 * 4
    with pytest.raises(Unusable, match="269 MB of pixels"):
        decode(content)


def test_a_log_of_any_bytes_is_read_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "seconds": 2.0}\n' + bytes(5000) + b"\n" + b"[" * 10**5 + b'\n{"step": 9}\n{"st'
    )
    assert MetricsLog(path, 5).seconds == 2.0 and path.read_text() == '{"step": 1, "seconds": 2.0}\n'
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        MetricsLog(path, 5)


# ---- digests -----------------------------------------------------------------------------------------------


def flip_bits(path, count):
    """Yield after each of `count` flips of one bit, evenly spaced over a file, which is restored afterwards."""
    content = path.read_bytes()
    for number in range(count):
        changed = bytearray(content)
        changed[number * len(content) // count] ^= 1 << number % 8
        path.write_bytes(changed)
        os.utime(path, ns=(number, number))
        yield number
    path.write_bytes(content)


def test_a_flipped_bit_of_a_record_is_noticed_or_changes_nothing(tmp_path):
    known = {f"{number:064x}": [640, 480 + number] for number in range(4)}
    write_record(tmp_path / "images.json", known)
    assert read_record(tmp_path / "images.json") == known
    for _ in flip_bits(tmp_path / "images.json", 300):
        assert read_record(tmp_path / "images.json") in ({}, known)


def test_a_flipped_bit_of_a_provenance_is_refused_or_changes_nothing(tmp_path):
    folder = cache_folder(tmp_path, "text", prompts=["a", "b"], seed=3)
    refused = 0
    for _ in flip_bits(folder / "provenance.json", 100):
        try:
            assert cache_folder(tmp_path, "text", prompts=["a", "b"], seed=3) == folder
        except ValueError as error:
            refused += folder.name in str(error)
    assert refused > 50


def test_a_flipped_bit_of_a_component_is_found_by_hashing_it_once(tmp_path, monkeypatch):
    vae = write_component(tmp_path) / "vae"
    hashed = []
    monkeypatch.setattr(
        "wanlite.files.atomic._describe", lambda path, find=_describe: hashed.append(path) or find(path)
    )
    assert find_corruption_once(vae) is find_corruption_once(vae) is None and len(hashed) == 2
    for path in (vae / "config.json", vae / "weights.bin"):
        for _ in flip_bits(path, 2):
            assert f"{path.name} differs from its manifest" in find_corruption_once(vae)


def test_a_component_that_differs_from_its_manifest_is_not_loaded(tmp_path):
    with new_folder(tmp_path / "tokenizer") as partial:
        shutil.copytree(TINY_TEACHER / "tokenizer", partial, dirs_exist_ok=True)
    load_tokenizer(tmp_path / "tokenizer")
    for _ in flip_bits(tmp_path / "tokenizer/tokenizer.json", 1):
        with pytest.raises(OSError, match="tokenizer.json differs from its manifest"):
            load_tokenizer(tmp_path / "tokenizer")
