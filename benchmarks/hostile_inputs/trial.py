"""A hostile input and the process in which it is tried; see hostile.py above."""

import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow  # noqa: F401 (imported before a refusal is measured)
import torch
from pyarrow import parquet  # noqa: F401

import train_distillation  # noqa: F401
from tests.conftest import SHORT_RUN
from wanlite.data.images import read_image_file

ROOT = Path(__file__).resolve().parent.parent.parent
REFUSED, SAME, ACCEPTED = "refused", "the same result", "accepted"
RESULTS = {  # {promise: outcomes that keep it}
    REFUSED: (REFUSED,),
    SAME: (REFUSED, SAME),
    ACCEPTED: (REFUSED, SAME, ACCEPTED),
}
MAX_SECONDS, MAX_MEGABYTES, MAX_LETTERS = 1, 200, 500
ALARM = 60  # seconds, after which an input counts as blocking
PROMPT = "a small red circle at the left on a white background"
DRAWN = ("config.json", "diffusion_pytorch_model.safetensors", "model_index.json", "run.json", "scheduler")
DRAWN += ("text_encoder", "tokenizer", "vae")
WEIGHTS = "diffusion_pytorch_model.safetensors"
BAR = "\x1b[A"  # of a progress bar above another
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


class Place(NamedTuple):
    """The folders of one input: the student's, one beside it, one for images, and one that nothing may open.

    `run` is a finished training of a few steps, shared by all inputs.
    """

    student: Path
    beside: Path
    images: Path
    outside: Path
    run: Path


class Input(NamedTuple):
    """One input: `prepare(place)` makes it and returns more arguments; `run(place, arguments)` uses it."""

    kind: str
    name: str
    promise: str
    prepare: Callable[[Place], Any]
    run: Callable[[Place, Sequence[Any]], Any]
    needs_run: bool = False


# ---- ways --------------------------------------------------------------------------------------------------


def draw(place: Place, arguments: Sequence[Any]) -> None:
    """Do what `python run_inference.py` does."""
    flags = ["--model", place.student, "--output_dir", place.images]
    if not {"--prompt", "--prompts_file", "--no-prompt"} & {*map(str, arguments)}:
        flags += ["--prompt", PROMPT]
    run_as_script("run_inference.py", *flags, *(each for each in arguments if each != "--no-prompt"))


def train(place: Place, arguments: Sequence[Any]) -> bool:
    """Do what `python train_distillation.py` does; returns whether the weights are those of the finished run."""
    folder = place.beside / "run"
    try:
        run_as_script("train_distillation.py", "--output_dir", folder, *SHORT_RUN, *arguments)
    except SystemExit as end:
        if end.code:
            raise
    sys.excepthook = sys.__excepthook__
    return (folder / WEIGHTS).read_bytes() == (place.run / WEIGHTS).read_bytes()


def _train_once(folder):
    number = os.fork()
    if number == 0:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            run_as_script("train_distillation.py", "--output_dir", folder, *SHORT_RUN)
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(1)
    if os.waitpid(number, 0)[1]:
        raise SystemExit(f"the training failed: {Path(f'{folder}.log').read_text()[-2000:]}")


def plan(place: Place, arguments: Sequence[Any]) -> None:
    """Do what `python train_distillation.py --dry_run` does."""
    run_as_script("train_distillation.py", "--output_dir", place.beside / "run", "--dry_run", *arguments)


def run_as_script(script: str, *arguments: Any) -> None:
    """Run a script in this process as the command line does."""
    sys.argv = [script, *map(str, arguments)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def call(function: Callable[[Place], Any]) -> Callable[[Place, Sequence[Any]], Any]:
    """Return a way that calls a function of the library; its errors for users count as refusals.

    The function returns whether the result is the expected one.
    """

    def run(place: Place, arguments: Sequence[Any]) -> bool:
        try:
            return function(place) is True
        except (OSError, ValueError, TypeError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(2)

    return run


# ---- the process of an input -------------------------------------------------------------------------------


class Trial:
    """Tries inputs on copies of a student, each in a process of its own."""

    def __init__(self, student: Path, folder: Path, run: Path | None = None):
        torch.set_num_threads(1)
        self.finished = run.absolute() if run else folder / "run"
        self.student, self.folder, self.count = student.absolute(), folder, 0
        self.expected: dict[str, str] = {}
        row = self.run(Input("", "", ACCEPTED, lambda place: None, draw))
        if row["fault"]:
            raise SystemExit(f"{student}: cannot be drawn with: {row['printed']}")
        self.expected = row["images"]

    def run(self, each: Input) -> dict[str, Any]:
        """Return the outcome of an input, its cost, and its fault or None."""
        self.count += 1
        home = self.folder / f"{self.count:04d}"
        folders = (home / name for name in ("student", "beside", "images", "outside"))
        place = Place(*folders, self.finished)
        if each.needs_run and not place.run.exists():
            _train_once(place.run)
        for folder in (place.student, place.beside, place.outside):
            folder.mkdir(parents=True)
        for name in DRAWN:
            source = self.student / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, place.student / name)
        try:
            arguments = [*(each.prepare(place) or ())]
            row = self._fork(each, place, arguments, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)
        return {"class": each.kind, "input": each.name, "promise": each.promise} | row

    def _fork(self, each, place, arguments, home):
        number = os.fork()
        if number == 0:
            os._exit(_child(each, place, arguments, home))
        status, usage = os.wait4(number, 0)[1:]
        code = os.waitstatus_to_exitcode(status)
        printed = (home / "printed").read_text(errors="replace")
        found: dict[str, Any] = {"megabytes": 0, "outside": [], "network": []}
        with suppress(OSError, ValueError):
            found |= json.loads((home / "found").read_text())
        images = {
            path.name: hashlib.sha256(read_image_file(path, "").tobytes()).hexdigest()
            for path in sorted(place.images.glob("*.png"))
            if not path.is_symlink()
        }
        row = {
            "code": code,
            "images": images,
            "printed": printed,
            "seconds": usage.ru_utime + usage.ru_stime,
            "megabytes": found["megabytes"],
            "letters": len(printed.strip().splitlines()[-1]) if printed.strip() else 0,
        }
        is_same = sorted(images.values()) == sorted(self.expected.values()) or found.get("is_same")
        row["outcome"] = REFUSED if code == 2 else SAME if code == 0 and is_same else ACCEPTED
        return row | {"fault": _fault(each, row, found)}


def _child(each, place, arguments, home):
    """Run an input in this process, which was forked for it; returns the exit code."""
    opened: list[str] = []
    network: list[str] = []

    def watch(event, values):
        if event == "open" and isinstance(values[0], (str, bytes)):
            opened.append(os.path.realpath(os.fsdecode(values[0])))
        if event in NETWORK:
            network.append(event)
            raise OSError("no network")

    file = os.open(home / "printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ |= {"HOME": str(home / "home"), "WANLITE_CACHE": str(home / "cache")}
    os.chdir(home)
    signal.alarm(ALARM)
    sys.addaudithook(watch)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, code = process_memory("VmRSS:"), 0
    found: dict[str, Any] = {}
    try:
        found["is_same"] = bool(each.run(place, arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        code = _end(*sys.exc_info())
    with suppress(OSError):
        sys.stdout.flush(), sys.stderr.flush()
    outside = sorted({path for path in opened if Path(path).is_relative_to(place.outside)})
    found |= {"megabytes": process_memory("VmHWM:") - before, "outside": outside, "network": network}
    (home / "found").write_text(json.dumps(found))
    return code


def _end(kind, error, trace):
    """Report an error that nothing caught, as the interpreter does; returns the exit code."""
    try:
        sys.excepthook(kind, error, trace)
    except SystemExit as end:
        return end.code
    return 1


def process_memory(name: str) -> float:
    """Return a line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _fault(each: Input, row: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Return how an outcome differs from the promise, None if it does not."""
    printed = row["printed"].replace(BAR, "")
    if row["code"] < 0:
        return f"ended by signal {-row['code']}"
    if "Traceback (most" in printed or "The traceback is in" in printed:
        return "a traceback"
    if row["code"] not in (0, 2):
        return f"exit code {row['code']}"
    if not all(letter.isprintable() or letter in "\n\r" for letter in printed):
        return "control characters"
    if row["outcome"] not in RESULTS[each.promise]:
        return f"{row['outcome']}, promised: {each.promise}"
    if found["outside"] or found["network"]:
        return f"opened {found['outside']}, {found['network']}"
    if row["outcome"] != REFUSED:
        return None
    if not printed.strip():
        return "no message"
    costs = {"letters": MAX_LETTERS, "seconds": MAX_SECONDS, "megabytes": MAX_MEGABYTES}
    for name, most in costs.items():
        if row[name] > most and (name == "letters" or each.run is not train):  # which trains before it
            return f"{row[name]:.2f} {name}"
    return None
