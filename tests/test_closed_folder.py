"""Drawing opens nothing outside of the student's folder, and needs no network."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

WATCHED = """
import json, os, runpy, sys
from pathlib import Path
opened, network = set(), []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.add(os.path.abspath(os.fsdecode(arguments[0])))
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        network.append([event, repr(arguments)])
        raise OSError("no network")

sys.addaudithook(watch)
record, *sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    Path(record).write_text(json.dumps({"opened": sorted(opened), "network": network}))
"""
SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib")  # of the interpreter and the C library


def environment(folder):
    """Return the variables of a process with its own home, without HF_HUB_OFFLINE."""
    places = {name: folder / name.lower().removesuffix("dir") for name in ("HOME", "TMPDIR")}
    for place in places.values():
        place.mkdir()
    return {"PATH": "/usr/bin:/bin"} | {name: str(place) for name, place in places.items()}


@pytest.mark.parametrize("name", ["plain", "outputs/wan_t2i"])
def test_drawing_opens_nothing_outside_the_folder_and_needs_no_network(name, finished_run, tmp_path):
    folder = tmp_path / name
    shutil.copytree(finished_run[0], folder, ignore=shutil.ignore_patterns("cache", "checkpoints"))
    (folder.parent / "diffusion_pytorch_model.safetensors").write_text("a file of another model")
    (folder.parent / "config.json").write_text("{}")
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, tmp_path / "record", ROOT / "run_inference.py", "--model", name]
        + ["--prompt", "a red ring", "--output_dir", "images", "--num_inference_steps", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert process.returncode == 0, process.stderr
    record = json.loads((tmp_path / "record").read_text())
    own = [folder, tmp_path / "images", tmp_path / "home", tmp_path / "tmp", tmp_path / "record", ROOT]
    libraries = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent]
    outside = [
        path
        for path in record["opened"]
        if not any(Path(path).is_relative_to(place) for place in (*own, *libraries, *SYSTEM))
    ]
    assert outside == [] and record["network"] == []
    assert list(tmp_path.glob("images/*.png")) and time.monotonic() - began < 600


@pytest.mark.parametrize("arguments", [(), ("--model", "outputs/wan_t2i"), ("--model", "someone/student")])
def test_a_missing_folder_is_not_requested_from_the_hub(arguments, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, tmp_path / "record", ROOT / "run_inference.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert process.returncode == 2 and "no such folder" in process.stderr
    assert json.loads((tmp_path / "record").read_text())["network"] == []
