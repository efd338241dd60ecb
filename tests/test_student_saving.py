"""Saving a student: a reader always finds the previous student or the new one, whenever the writer stops."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch.nn.utils import prune

from tests.conftest import fork
from train_distillation import WanLiteStudent
from wanlite.files.weights import WeightsFile
from wanlite.student.saving import ALIGNED

NARROW, WIDE = (
    dict(
        hidden_size=width,
        depth=2,
        num_heads=2,
        ffn_dim=32,
        num_channels=4,
        text_dim=8,
        freq_dim=32,
        rope_max_seq_len=32,
    )
    for width in (16, 24)
)
WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SHARDED = {"max_shard_size": "10KB"}


def student(shape, value):
    """Return a student with all weights equal to `value`, so that a mixture of two is visible."""
    made = WanLiteStudent(**shape)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


def found(folder, **arguments):
    """Load the student; return its width and the value of all its weights."""
    loaded = WanLiteStudent.from_pretrained(folder, **arguments)
    values = {value for tensor in loaded.state_dict().values() for value in tensor.unique().tolist()}
    assert len(values) == 1, f"a mixture of {values}"
    return loaded.config.hidden_size, values.pop()


def names(folder):
    return {path.name for path in folder.iterdir()}


# ---- killed writers and concurrent readers -----------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second",
    [({}, {}), ({}, SHARDED), (SHARDED, {}), (SHARDED, SHARDED)],
    ids=["file-file", "file-shards", "shards-file", "shards-shards"],
)
@pytest.mark.parametrize("renames", [0, 1, 2, 3, 7])
def test_a_save_killed_at_any_rename_leaves_one_student_and_the_next_finishes_it(
    first, second, renames, tmp_path, monkeypatch
):
    student(NARROW, 1).save_pretrained(tmp_path, **first)

    def save_and_die():
        replace, count = os.replace, iter(range(99))

        def counted(source, target):
            if str(source).find("files.json") < 0 and next(count) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = counted
        student(WIDE, 2).save_pretrained(tmp_path, **second)

    code = fork(save_and_die)
    left = found(tmp_path)
    assert left in ([(16, 1), (24, 2)] if code == -signal.SIGKILL else [(24, 2)])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(
            "wanlite.student.saving.check_space",
            lambda *_: (_ for _ in ()).throw(OSError("the disk is full")),
        )
        student(NARROW, 3).save_pretrained(tmp_path)
    assert found(tmp_path) in [left, (24, 2)] and not list(
        tmp_path.glob(".saving-*")
    )  # completed without a new save
    student(NARROW, 3).save_pretrained(tmp_path)
    assert found(tmp_path) == (16, 3) and names(tmp_path) == {"config.json", WEIGHTS}


def test_a_reader_beside_a_writer_never_loads_a_mixture(tmp_path):
    student(NARROW, 1).save_pretrained(tmp_path)
    pair = [
        (student(NARROW, 1), {}),
        (student(WIDE, 2), {}),
        (student(NARROW, 1), SHARDED),
        (student(WIDE, 2), SHARDED),
    ]

    def write_for_ever():
        while True:
            for made, arguments in pair:
                made.save_pretrained(tmp_path, **arguments)

    writer, seen = multiprocessing.get_context("fork").Process(target=write_for_ever), []
    writer.start()
    try:
        deadline = time.time() + 4
        while time.time() < deadline:
            seen.append(found(tmp_path))
    finally:
        writer.kill()
        writer.join()
    assert set(seen) == {(16, 1), (24, 2)} and len(seen) > 20


def test_a_writer_killed_at_random_moments_leaves_one_student_each_time(tmp_path):
    made = {2: student(WIDE, 2), 3: student(NARROW, 3)}
    made[3].save_pretrained(tmp_path)

    def write_for_ever():
        while True:
            made[2].save_pretrained(tmp_path, **SHARDED)
            made[3].save_pretrained(tmp_path)

    for number in range(12):
        fork(write_for_ever, kill_after=0.02 + 0.0173 * number)
        assert found(tmp_path) in [(24, 2), (16, 3)]
    made[2].save_pretrained(tmp_path)
    assert found(tmp_path) == (24, 2) and names(tmp_path) == {"config.json", WEIGHTS}


def test_concurrent_saves_leave_the_student_of_one_process(tmp_path):
    def save(value, arguments):
        made = student(NARROW if value % 2 else WIDE, value)
        for _ in range(5):
            made.save_pretrained(tmp_path, **arguments)

    writers = [
        multiprocessing.get_context("fork").Process(target=save, args=(value, SHARDED if value > 2 else {}))
        for value in (1, 2, 3, 4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert found(tmp_path) in [(16, 1), (24, 2), (16, 3), (24, 4)] and not [
        name for name in names(tmp_path) if name[0] == "."
    ]


def test_only_rank_zero_writes(tmp_path):
    def of_rank(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=rank, world_size=2)
        student(NARROW, 1 + rank).save_pretrained(tmp_path / "student")
        student(NARROW, 1 + rank).save_pretrained(tmp_path / f"every-{rank}", is_main_process=True)
        torch.distributed.barrier()

    ranks = [multiprocessing.get_context("fork").Process(target=of_rank, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert found(tmp_path / "student") == (16, 1)
    assert [found(tmp_path / f"every-{rank}") for rank in (0, 1)] == [(16, 1), (16, 2)]


# ---- files after a save ------------------------------------------------------------------------------------


def test_files_of_an_older_save_are_deleted_and_other_variants_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    student(NARROW, 1).save_pretrained(tmp_path, variant="fp16", **SHARDED)
    others = names(tmp_path) - {"config.json"}
    for value, arguments in enumerate([SHARDED, {}, SHARDED, SHARDED, {}], 2):
        student(NARROW, value).save_pretrained(tmp_path, **arguments)
        index = json.loads((tmp_path / INDEX).read_text()) if arguments else {"weight_map": {"": WEIGHTS}}
        assert names(tmp_path) == others | {
            "config.json",
            *index["weight_map"].values(),
            *([INDEX] if arguments else []),
        }
        assert found(tmp_path) == (16, value) and found(tmp_path, variant="fp16") == (16, 1)


def test_the_second_file_name_is_deleted_since_it_takes_precedence_over_an_index(tmp_path):
    student(NARROW, 1).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_model.safetensors")
    student(NARROW, 2).save_pretrained(tmp_path, **SHARDED)
    assert found(tmp_path) == (16, 2) and "diffusion_model.safetensors" not in names(tmp_path)


@pytest.mark.parametrize(
    "named, words",
    [
        ({"variant": ""}, "variant '' cannot be part of a file name"),
        ({"variant": 5}, "variant 5"),
        ({"variant": "a/b"}, "variant 'a/b'"),
        ({"max_shard_size": None}, "max_shard_size is None, expected bytes"),
        ({"max_shard_size": -1}, "max_shard_size is -1"),
    ],
)
def test_a_save_that_would_not_load_is_refused(named, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        student(NARROW, 1).save_pretrained(tmp_path, **named)
    assert not list(tmp_path.iterdir())


def test_a_save_to_nowhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="save_directory is empty"):
        student(NARROW, 1).save_pretrained("")
    assert not list(tmp_path.iterdir())


def test_stock_diffusers_reads_shards_and_variants(tmp_path):
    student(NARROW, 1).save_pretrained(tmp_path, **SHARDED)
    student(NARROW, 2).save_pretrained(tmp_path, variant="fp16")
    for variant, value in ((None, 1), ("fp16", 2)):
        stock = WanTransformer3DModel.from_pretrained(tmp_path, variant=variant)
        assert stock.proj_out.weight.unique().tolist() == [value]


def test_the_same_student_is_the_same_bytes(tmp_path):
    for number in range(8):
        student(NARROW, 1).save_pretrained(tmp_path / f"{number}")
    assert len({(tmp_path / f"{number}" / WEIGHTS).read_bytes() for number in range(8)}) == 1
    with WeightsFile(tmp_path / "0" / WEIGHTS) as weights:  # every tensor can be mapped by stock
        assert {entry.start % ALIGNED for entry in weights.entries.values()} == {0}
    assert (
        found(tmp_path / "0") == (16, 1)
        and load_file(tmp_path / "0" / WEIGHTS).keys() == student(NARROW, 1).state_dict().keys()
    )


def test_saved_files_have_the_read_permissions_of_the_others(tmp_path):
    student(NARROW, 1).save_pretrained(tmp_path)
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "other").stat().st_mode}


# ---- students that are not saved ---------------------------------------------------------------------------


def broken(made):
    made.proj_out.bias.data[0] = float("nan")


def overflowing(made):
    made.half().proj_out.bias.data[0] = float("inf")


def adapted(made):
    made.blocks[0].attn1.to_q.lora_A = torch.nn.ModuleDict(
        {"default": torch.nn.Linear(16, 2)}
    )  # as peft registers them


class InEightBits(torch.Tensor):
    """A weight that is a tensor of another class, as from torchao and GGUF."""


def quantised(made):
    for layer in (made.proj_out, made.blocks[1].ffn.net[2]):
        layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(InEightBits))


def quantised_by_names(made):
    """Quanto and bitsandbytes store the codes and scales of a weight under their own names."""
    weight = made.proj_out.weight.data
    del made.proj_out.weight
    made.proj_out.weight = torch.nn.Module()
    for name, value in (("_data", weight.to(torch.int8)), ("_scale", weight[:, :1])):
        made.proj_out.weight.register_buffer(name, value)


def cast_by_layers(made):
    made.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def adapted_and_quantised(made):
    adapted(made)
    quantised(made)


def without_a_layer(made):
    made.proj_out = torch.nn.Identity()


@pytest.mark.parametrize(
    "change, words",
    [
        (broken, "proj_out.bias"),
        (overflowing, "proj_out.bias"),
        (lambda made: made.double(), r"weights of another dtype in .*\(torch.float64\) and in .* more"),
        (lambda made: made.to("meta"), "offloaded"),
        (lambda made: made.register_parameter("more", torch.nn.Parameter(torch.ones(1))), "more"),
        (lambda made: made.blocks.append(made.blocks[0]), "blocks.2"),
        (adapted, r"found an adapter in blocks.0.attn1.to_q \(lora_A\). .*save_lora_adapter"),
        (
            quantised,
            r"quantised weights in blocks.1.ffn.net.2 \(InEightBits\) and in 1 more layers. Save the student "
            r"before",
        ),
        (quantised_by_names, r"quantised weights in proj_out \(weight._data\). Save the student before"),
        (
            cast_by_layers,
            r"quantised weights in blocks.0.attn1.to_k \(torch.float8_e4m3fn\) and in 19 more layers",
        ),
        (
            lambda made: torch.ao.quantization.quantize_dynamic(made, {torch.nn.Linear}, inplace=True),
            "quantised .*_packed_params",
        ),
        (adapted_and_quantised, "an adapter in .*; quantised weights in .* Fuse .* Save the student before"),
        (
            lambda made: prune.l1_unstructured(made.proj_out, "weight", 0.5),
            r"a parametrization in proj_out \(weight_",
        ),
        (
            lambda made: torch.nn.utils.parametrizations.weight_norm(made.proj_out),
            "a parametrization in proj_out ",
        ),
        (
            without_a_layer,
            r"another layer than a student's in proj_out \(proj_out.bias is missing\). Put the student's own",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_student_that_would_not_load_again_is_not_saved_over_another(change, words, tmp_path):
    student(NARROW, 1).save_pretrained(tmp_path)
    made = student(WIDE, 2)
    change(made)
    with pytest.raises(ValueError, match=words):
        made.save_pretrained(tmp_path)
    assert found(tmp_path) == (16, 1) and names(tmp_path) == {"config.json", WEIGHTS}


def compiled_block(made):
    made.blocks[0] = torch.compile(made.blocks[0])
    return made


@pytest.mark.parametrize(
    "change", [torch.compile, compiled_block, lambda made: made.to(memory_format=torch.channels_last_3d)]
)
def test_a_change_that_keeps_every_weight_saves_the_same_file(change, tmp_path):
    change(student(WIDE, 2)).save_pretrained(tmp_path)
    assert found(tmp_path) == (24, 2)


def test_an_unknown_keyword_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="does not take use_flashpack without push_to_hub"):
        student(NARROW, 1).save_pretrained(tmp_path / "student", use_flashpack=True)
    assert not (tmp_path / "student").exists()


def test_a_pickle_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="safetensors only"):
        student(NARROW, 1).save_pretrained(tmp_path / "student", safe_serialization=False)
    assert not (tmp_path / "student").exists()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "student").write_text("mine")
    with pytest.raises(OSError, match="student"):
        student(NARROW, 1).save_pretrained(tmp_path / "student")
    assert (tmp_path / "student").read_text() == "mine"


def test_a_full_disk_leaves_the_existing_student(small_disk):
    student(NARROW, 1).save_pretrained(small_disk)
    large = student(NARROW | {"ffn_dim": 4096, "depth": 8}, 2)
    with pytest.raises(OSError, match="no space left: .* MB are needed"):
        large.save_pretrained(small_disk)
    assert found(small_disk) == (16, 1) and names(small_disk) == {"config.json", WEIGHTS}
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:  # until the disk is full
            ballast.write(bytes(4096))
    with pytest.raises(OSError):
        student(WIDE, 2).save_pretrained(small_disk)
    assert found(small_disk) == (16, 1)
    (small_disk / "ballast").unlink()
    student(WIDE, 2).save_pretrained(small_disk)
    assert found(small_disk) == (24, 2)


# ---- the hub -----------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Serves the hub's endpoints for the folders organisation/model below `folder`: the list of files and
    the files.
    """

    folder, commit = None, "0" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requested.append(self.path)
        is_list, path = self.path.startswith("/api/models/"), self.path.split("?")[0].strip("/").split("/")
        path = path[2:4] if is_list else [*path[:2], *path[4:]]  # organisation/model/resolve/revision/file
        content, found = b"no such repository", self.folder.joinpath(*path)
        if found.exists() and is_list:
            tree = [
                {
                    "type": "file",
                    "path": str(file.relative_to(found)),
                    "size": file.stat().st_size,
                    "oid": "0" * 40,
                }
                for file in found.rglob("*")
                if file.is_file()
            ]
            model = {
                "id": "/".join(path),
                "sha": self.commit,
                "siblings": [{"rfilename": file["path"]} for file in tree],
            }
            content = json.dumps(tree if "/tree/" in self.path else model)
        elif found.exists():
            content = found.read_bytes()
        content = content.encode() if isinstance(content, str) else content
        self.send_response(200 if found.exists() else 404)
        headers = {
            "Content-Length": len(content),
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.commit,
        }
        for name, value in (
            headers if found.exists() else headers | {"X-Error-Code": "RepoNotFound"}
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub; `requested` are the requested paths."""

    class Here(Hub):
        folder, requested = tmp_path / "on the hub", []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Here.stop = lambda: (server.shutdown(), thread.join(), server.server_close())
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield Here
    if thread.is_alive():
        Here.stop()


def test_a_hub_name_is_downloaded_once_and_then_read_from_the_cache(hub, tmp_path, monkeypatch):
    student(NARROW, 1).save_pretrained(hub.folder / "someone/student")
    student(WIDE, 2).save_pretrained(hub.folder / "someone/student/inner", **SHARDED)
    (hub.folder / "someone/student/evil.bin").write_bytes(b"\x80")
    monkeypatch.chdir(tmp_path)
    arguments = {"cache_dir": tmp_path / "cache"}
    assert found("someone/student", **arguments) == (16, 1)
    assert not any(
        path.endswith(("evil.bin", "inner/config.json")) for path in hub.requested
    )  # only the needed files are fetched
    assert found("someone/student", subfolder="inner", **arguments) == (24, 2)
    hub.stop()
    assert found("someone/student", local_files_only=True, **arguments) == (16, 1)
    assert found("someone/student", **arguments) == (16, 1)  # without a network, the cache is used
    with pytest.raises(OSError, match="someone/other: no such folder here, and not available on the hub"):
        found("someone/other", local_files_only=True, **arguments)


def test_an_unknown_hub_name_is_refused_in_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        OSError, match="someone/nothing: no such folder here, and not available on the hub"
    ) as refused:
        found("someone/nothing", cache_dir=tmp_path / "cache")
    assert "\n" not in str(refused.value)


def test_an_existing_folder_takes_precedence_over_a_hub_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student(NARROW, 1).save_pretrained("someone/student")
    assert found("someone/student") == (16, 1)
    with pytest.raises(OSError, match="someone/other: no such folder"):
        found("someone/other")
    assert hub.requested == []


def test_a_student_pushed_to_the_hub_loads_again(tmp_path, monkeypatch):
    pushed = []

    def upload_folder(*, repo_id, folder_path, **_):
        pushed.append((repo_id, sorted(os.listdir(folder_path)), found(folder_path)))

    monkeypatch.setattr(
        "diffusers.utils.hub_utils.create_repo", lambda name, **_: type("Repo", (), {"repo_id": f"me/{name}"})
    )
    monkeypatch.setattr(
        "diffusers.utils.hub_utils.load_or_create_model_card",
        lambda *_, **__: type("Card", (), {"save": lambda self, path: open(path, "w").close()})(),
    )
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card: card)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload_folder)
    student(NARROW, 1).save_pretrained(tmp_path / "student", push_to_hub=True)
    assert pushed == [("me/student", ["README.md", "config.json", WEIGHTS], (16, 1))] and found(
        tmp_path / "student"
    ) == (16, 1)
