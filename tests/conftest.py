"""Shared fixtures: the tiny teacher in both layouts, embeddings of a few prompts, and a run of a few
steps.
"""

import atexit
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import forked
from tests.refusals import EXECUTED, REFUSED, SMALL
from train_distillation import WanLiteStudent
from wanlite.data.text_encoder import encode_prompts, load_text_encoder
from wanlite.network import pack_text
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher

ROOT = Path(__file__).resolve().parent.parent
os.environ["WANLITE_CACHE"] = tempfile.mkdtemp(prefix="wanlite-")  # converted parts of teachers
atexit.register(shutil.rmtree, os.environ["WANLITE_CACHE"], ignore_errors=True)
forked.remember_environment()
TINY_TEACHER = ROOT / "tiny_teacher"
A14B = {"width": 5120, "ffn_dim": 13824, "num_layers": 40, "channels": 16, "model_type": "t2v"}
WAN_1_3B = {"width": 1536, "ffn_dim": 8960, "num_layers": 30, "channels": 16, "model_type": "t2v"}
TI2V_5B = {"width": 3072, "ffn_dim": 14336, "num_layers": 30, "channels": 48, "model_type": "ti2v"}
TO_OFFICIAL = [
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    (".attn1.to_out.0", ".self_attn.o"),
    (".attn2.to_out.0", ".cross_attn.o"),
    (".attn1.to_", ".self_attn."),
    (".attn2.to_", ".cross_attn."),
    (".attn1.norm_", ".self_attn.norm_"),
    (".attn2.norm_", ".cross_attn.norm_"),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
    (".scale_shift_table", ".modulation"),
]

# `pytest -m fast` excludes these files, and all other tests that use one of RUNNERS, which start a process.
SLOW_FILES = {
    "test_bad_student_arguments.py",
    "test_bad_student_config.py",
    "test_bad_student_costs.py",
    "test_bad_student_files.py",
    "test_bad_student_index.py",
    "test_bad_student_weights.py",
    "test_benchmark_samples.py",
    "test_benchmarks.py",
    "test_calibration.py",
    "test_compiling.py",
    "test_emoji.py",
    "test_file_validation.py",
    "test_initialization_and_validation.py",
    "test_odd_students.py",
    "test_package.py",
    "test_plan.py",
    "test_projection.py",
    "test_ranks.py",
    "test_resolutions.py",
    "test_save_load_integration.py",
    "test_second_device.py",
    "test_shapes.py",
    "test_single_files.py",
    "test_static.py",
    "test_student_saving.py",
    "test_teacher.py",
    "test_tiny_teachers.py",
}
RUNNERS = {
    "finished_run",
    "fork",
    "projected_run",
    "read_refusal",
    "run_script",
    "shell",
    "subprocess",
    "train",
}


ONE_IN = 3  # slow tests that a run of the whole suite samples


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help=f"all slow tests, instead of one in {ONE_IN}")


def samples(config):
    """Return whether a run has a sample of the slow tests; one of named files or tests has all of them."""
    return not config.getoption("--all") and config.args == config.getini("testpaths")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.name not in SLOW_FILES and not RUNNERS & names_used(item):
            item.add_marker(pytest.mark.fast)
    if samples(config):
        left_out = choose_left_out(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def choose_left_out(items):
    """Return the slow tests that this commit leaves out; a later commit runs them."""
    units = {}  # a file that is slow as a whole, or a test
    for item in items:
        if item.get_closest_marker("slow"):
            is_whole_file = item.getparent(pytest.Module).get_closest_marker("slow")
            unit = item.path if is_whole_file else item.nodeid
            units.setdefault(unit, []).append(item)
    first = int(read_commit()[:6] or "0", 16)
    return {item for number, unit in enumerate(units.values(), first) if number % ONE_IN for item in unit}


def read_commit():
    """Return the name of the commit, an empty text outside a repository or without git."""
    with suppress(OSError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return ""


def names_used(item):
    """Return the fixtures of a test and the names in its code."""
    return {*item.fixturenames, *item.function.__code__.co_names}


def official_name(name):
    """Translate a diffusers name to the dialect of Wan's own repository."""
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in TO_OFFICIAL:
        name = name.replace(ours, theirs)
    return name


def write_official(source, target, num_shards=3):
    """Write the experts of a diffusers teacher in the layout of Wan's own repository, in shards with an
    index.
    """
    for ours, theirs in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        folder = target / theirs
        folder.mkdir(parents=True)
        config = json.loads((source / ours / "config.json").read_text())
        tensors = {}
        for path in (source / ours).glob("*.safetensors"):
            tensors |= {official_name(name): tensor for name, tensor in load_file(path).items()}
        heads, size = config["num_attention_heads"], config["attention_head_dim"]
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "_class_name": "WanModel",
                    "dim": heads * size,
                    "ffn_dim": config["ffn_dim"],
                    "freq_dim": config["freq_dim"],
                    "in_dim": config["in_channels"],
                    "num_heads": heads,
                    "num_layers": config["num_layers"],
                    "out_dim": config["out_channels"],
                    "text_len": 512,
                    "eps": config["eps"],
                    "model_type": "t2v",
                }
            )
        )
        weight_map = {}
        for number in range(num_shards):
            shard = f"diffusion_pytorch_model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
            part = {name: tensors[name] for name in sorted(tensors)[number::num_shards]}
            save_file(part, folder / shard)
            weight_map |= dict.fromkeys(part, shard)
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )


def wan_shapes(width, ffn_dim, num_layers, channels, **_):
    """Return {diffusers name: shape} of a Wan with head size 128."""

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    condition = "condition_embedder."
    shapes = {
        "patch_embedding.weight": (width, channels, 1, 2, 2),
        "patch_embedding.bias": (width,),
        "scale_shift_table": (1, 2, width),
    }
    shapes |= linear(f"{condition}text_embedder.linear_1", width, 4096) | linear(
        f"{condition}text_embedder.linear_2", width, width
    )
    shapes |= linear(f"{condition}time_embedder.linear_1", width, 256) | linear(
        f"{condition}time_embedder.linear_2", width, width
    )
    shapes |= linear(f"{condition}time_proj", 6 * width, width) | linear("proj_out", 4 * channels, width)
    for block in (f"blocks.{index}." for index in range(num_layers)):
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= linear(f"{block}{attention}.{part}", width, width)
            shapes |= {f"{block}{attention}.norm_{kind}.weight": (width,) for kind in "qk"}
        shapes |= linear(f"{block}ffn.net.0.proj", ffn_dim, width) | linear(
            f"{block}ffn.net.2", width, ffn_dim
        )
        shapes |= {f"{block}scale_shift_table": (1, 6, width)} | {
            f"{block}norm2.{kind}": (width,) for kind in ("weight", "bias")
        }
    return shapes


def write_sparse(path, shapes):
    """Write a safetensors file of float32 zeros of which only the header takes disk space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def wan_config(model, dialect):
    """Return the config.json of one expert with the sizes of `model`."""
    if dialect == "official":
        return {
            "_class_name": "WanModel",
            "dim": model["width"],
            "eps": 1e-06,
            "ffn_dim": model["ffn_dim"],
            "freq_dim": 256,
            "in_dim": model["channels"],
            "model_type": model["model_type"],
            "num_heads": model["width"] // 128,
            "num_layers": model["num_layers"],
            "out_dim": model["channels"],
            "text_len": 512,
        }
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": model["ffn_dim"],
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": model["channels"],
        "num_attention_heads": model["width"] // 128,
        "num_layers": model["num_layers"],
        "out_channels": model["channels"],
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }


def write_sparse_wan(folder, model, dialect, num_shards):
    """Write one expert with the real shapes of `model`, filled with zeros."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(wan_config(model, dialect)))
    shapes = {
        official_name(name) if dialect == "official" else name: shape
        for name, shape in wan_shapes(**model).items()
    }
    if num_shards == 1:
        return write_sparse(folder / "diffusion_pytorch_model.safetensors", shapes)
    names, weight_map = list(shapes), {}
    for number in range(num_shards):
        shard = f"diffusion_pytorch_model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        start, end = (edge * len(names) // num_shards for edge in (number, number + 1))
        write_sparse(folder / shard, {name: shapes[name] for name in names[start:end]})
        weight_map |= dict.fromkeys(names[start:end], shard)
    metadata = {"total_size": 4 * sum(map(math.prod, shapes.values()))}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": metadata, "weight_map": weight_map})
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def official_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    write_official(TINY_TEACHER, folder)
    return folder


@pytest.fixture(scope="session")
def teacher():
    return Teacher(open_teacher_files(TINY_TEACHER))


@pytest.fixture(scope="session")
def prompt_embeddings():
    """Four prompts and the empty one four times, as TextTokens."""
    tokenizer, encoder = load_text_encoder(TINY_TEACHER)
    prompts = [
        "a small red circle at the left on a white background",
        "at the top, a large blue ring on black",
        "a large green cross left of a small cyan square on a grey background",
        "something else entirely",
    ]
    return (
        pack_text(encode_prompts(tokenizer, encoder, prompts)),
        pack_text(encode_prompts(tokenizer, encoder, [""] * 4)),
    )


@pytest.fixture(scope="session")
def noisy():
    return torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def pytest_terminal_summary(terminalreporter, config):
    """Print which slow tests ran, and the cost of all rejections, from all processes."""
    if samples(config):
        terminalreporter.write_line(
            f"one in {ONE_IN} slow tests, chosen by the commit; pytest --all runs all of them"
        )
    costs = [
        cost
        for report in terminalreporter.getreports("")
        for name, found in getattr(report, "user_properties", ())
        if name == "refused"
        for cost in found
    ]
    if costs:
        seconds, megabytes = map(max, zip(*costs))
        terminalreporter.write_line(
            f"{len(costs)} bad inputs refused, slowest {seconds:.2f} s of processor time, largest {megabytes:.0f} MB"
        )


def run_script(*arguments, cwd=ROOT, timeout=300, environment=None):
    """Run a script and return the finished process with its output as text; code runs as a user runs it."""
    arguments = list(map(str, arguments))
    if arguments[0] != "-c" and environment is None and forked.has_same_environment():
        return forked.run(arguments, cwd, timeout)
    return start_script(*arguments, cwd=cwd, timeout=timeout, environment=environment)


def start_script(*arguments, cwd=ROOT, timeout=300, environment=None):
    """Run a script as a user does, in a new process that imports all libraries."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | forked.FIXED | (environment or {}),
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def fork(work, kill_after=None):
    """Run `work` in a forked process; return its exit code (-9 after a kill)."""
    forked.import_libraries()
    number = os.fork()
    if number == 0:
        try:
            torch.set_num_threads(torch.get_num_threads())  # its pool of threads does not survive a fork
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(number, 9)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def loud_student(seed=0, **config):
    """Return a student with random output weights; those of a new one are zero."""
    torch.manual_seed(seed)
    student = WanLiteStudent(**config)
    torch.nn.init.normal_(student.proj_out.weight)
    return student.eval()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refuse_pickle(folder, weights, name, load, monkeypatch):
    """Check that loading a folder with a pickle for weights is an OSError and never calls torch.load."""
    opened = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **_: opened.append(arguments))
    (folder / weights).unlink()
    (folder / name).write_bytes(pickle.dumps({"weight": Payload(folder / "executed")}))
    with pytest.raises(OSError):
        load(folder.parent)
    assert not opened and not (folder / "executed").exists()


@pytest.fixture(scope="session")
def sound_student():
    return loud_student(**SMALL)


@pytest.fixture(scope="session")
def sound_template(sound_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    sound_student.save_pretrained(folder)
    WanLiteStudent.from_pretrained(folder)  # the imports of the first load are not a cost of any row
    return folder


@pytest.fixture
def sound_folder(sound_template, tmp_path, monkeypatch, record_property):
    """A sound student's folder in a home of its own; the test may not use the network or run a payload."""
    shutil.copytree(sound_template, tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    connections = []
    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, lambda *address, **_: connections.append(address) or 1)
    yield tmp_path / "student"
    assert connections == [] and list(tmp_path.rglob(EXECUTED)) == []
    record_property("refused", [(cost.busy, cost.megabytes) for cost in REFUSED])
    REFUSED.clear()


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of 3 MB, or of the size in MB that the test is parametrised with."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={getattr(request, 'param', 3)}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder], capture_output=True).returncode:
        pytest.skip("only an administrator makes file systems")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# Two steps of each phase.


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(TINY_TEACHER, tmp_path / "wan")
    return tmp_path / "wan"


@pytest.fixture
def official_copy(official_teacher, tmp_path):
    shutil.copytree(official_teacher, tmp_path / "official")
    return tmp_path / "official"


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def change(folder, how):
    """Apply `how` to the tensors of an expert's only file, write them back and return them."""
    tensors = load_file(weights_of(folder))
    how(tensors)
    save_file(tensors, weights_of(folder))
    return tensors


def read_jobs(folder, kind):
    """Return the jobs of each shard of one kind in a run's cache."""
    shards = []
    for path in sorted((folder / "cache").glob(f"{kind}-*/shard-*")):
        with safe_open(path, "pt") as file:
            shards.append(json.loads(file.metadata()["jobs"])[2])
    return shards


SHORT_RUN = (
    "--num_trajectories",
    "64",
    "--max_train_steps",
    "6",
    "--few_step_train_steps",
    "2",
    "--matching_steps",
    "2",
    "--rollout_states",
    "8",
    "--train_batch_size",
    "16",
    "--checkpointing_steps",
    "3",
    "--validation_steps",
    "3",
    "--lr_warmup_steps",
    "2",
    "--num_held_out",
    "16",
    "--report_to",
    "none",
    "--teacher_steps",
    "8",
    "--reference_steps",
    "8",
    "--validation_trajectories",
    "16",
)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A complete run of a few steps with the tiny teacher, started from the command line."""
    folder = tmp_path_factory.mktemp("run") / "wan_t2i"
    process = run_script(ROOT / "train_distillation.py", "--output_dir", folder, *SHORT_RUN)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout
