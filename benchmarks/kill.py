"""Kill training runs at random moments, resume them, and compare their weights with those of an uninterrupted run.

    python benchmarks/kill.py                          # 100 kills
    python benchmarks/kill.py --flips 200              # 200 kills, each followed by a flipped bit
    python benchmarks/kill.py --quick --json kill.json

Prints the kills by moment. Each run is a process that is forked after the import of torch, and does the same as the
command line. It is killed once, three of four by SIGKILL and one by SIGTERM. Every third kill is during a save. Every
tenth run starts without a cache, so that it can be killed while it projects or generates. Then the same command runs
to its end.

identical  ended with the weights of the uninterrupted run, byte for byte
lost       a checkpoint or finished student from before the kill did not verify after it
refused    the same command did not resume

With --flips, a random bit of a random file in the run's folder is flipped between the kill and the second run. Files
are chosen by kind, with equal shares. The table counts by kind:

identical  as above
refused    the command ended with exit code 2, and named the file or its folder
silent     anything else: other weights, a traceback, or a refusal that names neither
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# two runs at once; sums depend on the number of threads
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WEIGHTS = "diffusion_pytorch_model.safetensors"
RUN = (
    "--num_trajectories",
    "64",
    "--max_train_steps",
    "12",
    "--train_batch_size",
    "16",
    "--checkpointing_steps",
    "2",
    "--validation_steps",
    "4",
    "--lr_warmup_steps",
    "2",
    "--num_held_out",
    "16",
    "--teacher_steps",
    "8",
    "--report_to",
    "none",
    "--few_step_train_steps",
    "4",
    "--matching_steps",
    "4",  # four steps of each phase
    "--rollout_states",
    "8",
    "--validation_trajectories",
    "8",
)
PRINTED = {"in a save": "during a save"}  # {moment: its name in the table}
NUM_SAVES = 7  # six checkpoints and the student
SAVING = 0.02  # seconds after the first sign of a save within which the run is killed

Job = dict[str, Any]  # the moment and the folder of a kill


def read_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="runs that are killed once each")
    parser.add_argument("--flips", type=int, help="runs that are killed, and of which one bit is flipped")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--quick", action="store_true", help="2 kills")
    parser.add_argument(
        "--folder", type=Path, help="new folder of the runs (default: a temporary one, removed at the end)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    arguments.kills = 2 if arguments.quick else arguments.flips or arguments.kills
    if arguments.kills < 1 or arguments.jobs < 1 or (arguments.flips or 1) < 1:
        parser.error("expected --kills, --flips and --jobs of at least 1.")
    if arguments.folder and arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"--folder {arguments.folder} is not empty. Name a new one.")
    return arguments


# ---- a run -------------------------------------------------------------------------------------------------


def start(folder: str | Path) -> int:
    """Fork a process that trains in `folder` like the command line; returns its number."""
    number = os.fork()
    if number == 0:
        code: Any = 1
        try:
            with open(f"{folder}.log", "a") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            import train_distillation as script

            sys.argv = ["train_distillation.py", "--output_dir", str(folder), *RUN]
            code = script.main(*script.read_settings())
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return number


def finish(number: int) -> int:
    """Wait for a process; returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def digest(folder: Path) -> str | None:
    """Return the sha256 of a finished run's weights, None if they are missing."""
    path = folder / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def signs(folder: Path) -> set[str]:
    """Return the names of the saves that are being written."""
    return {
        path.name for path in (*folder.glob(".saving-*"), *(folder / "checkpoints").glob(".step-*.partial"))
    }


def kept(folder: Path) -> tuple[set[int], bool]:
    """Return the steps of the checkpoints in a folder, and whether it holds a student."""
    steps = {int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")}
    return steps, (folder / WEIGHTS).exists()


def has_lost(folder: Path, before: tuple[set[int], bool]) -> bool:
    """Whether a checkpoint or student from before the kill does not verify now."""
    from train_distillation import WanLiteStudent
    from wanlite.training.checkpoints import latest_checkpoint

    steps, has_student = before
    newest, skipped = latest_checkpoint(folder)
    try:
        if has_student:
            WanLiteStudent.from_pretrained(folder)
    except (OSError, ValueError):
        return True
    return bool(skipped) or (bool(steps) and (newest is None or int(newest.name[5:]) < max(steps)))


def strike(
    number: int, folder: Path, moment: Mapping[str, Any], how: signal.Signals
) -> tuple[tuple[set[int], bool], str] | None:
    """Kill a process at its moment; returns kept() before the kill, and its description, None if the run had ended."""
    began, wanted = time.monotonic(), moment["save"] or 0
    seen: set[str] = set()
    while len(seen) < wanted or time.monotonic() - began < moment["after"]:
        if len(seen) < wanted:
            seen |= signs(folder)
            began = time.monotonic()
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return None
        time.sleep(0.0005)
    before, saving = kept(folder), signs(folder)
    if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return None
    os.kill(number, how)
    return before, "in a save" if saving else describe(folder, *before)


def describe(folder: Path, steps: set[int], has_student: bool) -> str:
    """Return the moment of a kill outside of saves, by the files in the folder."""
    if has_student:
        return "after the student was saved"
    if steps:
        return "between checkpoints"
    return "before the first checkpoint" if (folder / "run.json").exists() else "before the first step"


def kill_and_finish(job: Job) -> dict[str, Any]:
    """Kill a run at its moment and run it again to its end; returns its row.

    A run that ends before the kill is repeated with an earlier one, and one without a bit to flip with a later one.
    """
    folder, how = Path(job["folder"]), signal.Signals[job["signal"]]
    folder.mkdir(parents=True)
    if job["cache"]:
        shutil.copytree(job["cache"], folder / "cache")
    number = start(folder)
    struck = strike(number, folder, job, how)
    code = finish(number)
    if struck is None or code == 0 and how == signal.SIGKILL:  # it had just ended by itself
        shutil.rmtree(folder)
        return kill_and_finish(job | {"after": job["after"] / 2, "save": job["save"] and job["save"] - 1})
    before, where = struck
    if job["flip"] is not None and not files_by_kind(folder):
        shutil.rmtree(folder)
        return kill_and_finish(job | {"after": 2 * job["after"] + 0.1})
    if job["flip"] is not None:
        return flip_and_finish(folder, job)
    lost = has_lost(folder, before)
    codes = (
        {-how} if how == signal.SIGKILL else {0, 3, -how}
    )  # 3: stopped, can be resumed; 0: it was finished
    refused = code not in codes or (code != 0 and finish(start(folder)) != 0)
    is_identical = digest(folder) == job["digest"]
    if is_identical and not (lost or refused):
        shutil.rmtree(folder)  # a failed run is kept, with its log
    return {
        "signal": job["signal"],
        "where": where,
        "lost": lost,
        "refused": refused,
        "identical": is_identical,
    }


# ---- a flipped bit -----------------------------------------------------------------------------------------


def kind_of(folder: Path, path: Path) -> str:
    """Return the kind of a file of a run: its place, without digests, step numbers and names of processes."""
    return re.sub(r"-[0-9a-f]{5,}|[0-9a-f]{16,}|\d+", "*", str(path.relative_to(folder)))


def files_by_kind(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a run that have bits to flip, by kind."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size and not path.name.endswith((".lock", ".log")):
            kinds.setdefault(kind_of(folder, path), []).append(path)
    return kinds


def flip(folder: Path, seed: float) -> Path:
    """Flip a random bit of a random file; kinds of files have equal shares."""
    choice, kinds = random.Random(seed), files_by_kind(folder)  # noqa: S311 (bits, no secrets)
    path = choice.choice(kinds[choice.choice(sorted(kinds))])
    content = bytearray(path.read_bytes())
    content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    path.write_bytes(content)
    return path


def flip_and_finish(folder: Path, job: Job) -> dict[str, Any]:
    """Flip a bit in the folder of a killed run and run it again; returns its row."""
    path = flip(folder, job["flip"])
    log = Path(f"{folder}.log")
    length = log.stat().st_size
    code = finish(start(folder))
    printed = log.read_text(errors="replace")[length:]
    is_named = code == 2 and "Traceback" not in printed
    is_named &= any(part in printed for part in (path.name, str(path.parent)))
    is_identical = code == 0 and digest(folder) == job["digest"]
    if is_identical or is_named:
        shutil.rmtree(folder)
    else:  # a failed run is kept, with its log
        log.write_text(f"{log.read_text(errors='replace')}\na bit was flipped in {path}; exit code {code}\n")
    return {
        "signal": job["signal"],
        "where": kind_of(folder, path),
        "identical": is_identical,
        "refused": is_named and not is_identical,
        "silent": not (is_identical or is_named),
        "lost": False,
    }


# ---- all runs ----------------------------------------------------------------------------------------------


def moments(
    arguments: argparse.Namespace,
    folder: Path,
    seconds: Mapping[bool, float],
    cache: Path,
    expected: str | None,
) -> Iterator[Job]:
    """Yield the jobs, each with a random moment; `seconds` are those of a run without and with a cache."""
    moment = random.Random(arguments.seed)  # noqa: S311 (moments, no secrets)
    for count in range(arguments.kills):
        has_cache, how = count % 10 != 9, "SIGTERM" if count % 4 == 1 else "SIGKILL"
        save = moment.randint(1, NUM_SAVES) if has_cache and count % 3 == 0 else None
        yield {
            "save": save,
            "after": moment.uniform(0, SAVING if save else seconds[has_cache]),
            "signal": how,
            "cache": cache if has_cache else None,
            "folder": str(folder / f"{count:04d}"),
            "digest": expected,
            "flip": moment.random() if arguments.flips else None,
        }


def run_uninterrupted(folder: Path) -> tuple[dict[bool, float], str | None]:
    """Run twice, without and with a cache; returns the seconds of each, and the digest of their weights."""
    seconds, digests = {}, []
    for has_cache in (False, True):
        if has_cache:
            shutil.copytree(folder / "uninterrupted-0" / "cache", folder / "uninterrupted-1" / "cache")
        began = time.monotonic()
        if code := finish(start(folder / f"uninterrupted-{has_cache:d}")):
            log = folder / f"uninterrupted-{has_cache:d}.log"
            raise SystemExit(f"kill.py: the uninterrupted run ended with code {code}; see {log}")
        seconds[has_cache] = time.monotonic() - began
        digests.append(digest(folder / f"uninterrupted-{has_cache:d}"))
    if digests[0] != digests[1]:
        raise SystemExit(
            "kill.py: two uninterrupted runs, without and with a cache, end with different weights."
        )
    return seconds, digests[0]


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Kill and finish all runs; returns the figures and a row for each run."""
    import torch
    from tqdm import tqdm

    import train_distillation  # noqa: F401 (for all runs, which are forked)

    torch.set_num_threads(1)
    seconds, expected = run_uninterrupted(folder)
    slowdown = min(arguments.jobs, 2) ** 0.5  # of a run beside another one
    slower = {has_cache: each * slowdown for has_cache, each in seconds.items()}
    jobs = moments(arguments, folder, slower, folder / "uninterrupted-0" / "cache", expected)
    began = time.monotonic()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("fork")) as pool:
        kills = pool.map(kill_and_finish, jobs)
        rows = list(tqdm(kills, desc="killing", total=arguments.kills, unit="run"))
    return {
        "kills": len(rows),
        **{name: sum(row[name] for row in rows) for name in columns(arguments)},
        "where": Counter(row["where"] for row in rows),
        "signals": Counter(row["signal"] for row in rows),
        "seconds_uninterrupted": round(seconds[True], 2),
        "seconds": round(time.monotonic() - began),
    }, rows


def columns(arguments: argparse.Namespace) -> tuple[str, ...]:
    return ("identical", "refused", "silent") if arguments.flips else ("identical", "lost", "refused")


def print_table(figures: Mapping[str, Any], rows: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Print the kills by moment or by flipped file, and their sum."""
    kind = "flipped" if "silent" in names else "killed"
    print(f"\n| {kind} | kills | {' | '.join(names)} |\n|---|---|---|---|---|")
    for where in sorted(figures["where"]):
        found = [row for row in rows if row["where"] == where]
        counts = " | ".join(str(sum(row[name] for row in found)) for name in names)
        print(f"| {PRINTED.get(where, where)} | {len(found)} | {counts} |")
    print(f"| **all** | {figures['kills']} | {' | '.join(str(figures[name]) for name in names)} |")
    print(
        f"\n{dict(figures['signals'])}; an uninterrupted run takes {figures['seconds_uninterrupted']} s; "
        f"{figures['seconds']} s in total"
    )


def main() -> int:
    """Kill and resume runs, and print the table; returns 1 if a run failed."""
    arguments = read_arguments()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="kill-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"killing {arguments.kills} runs once each{', then flipping a bit' if arguments.flips else ''}, "
        f"{arguments.jobs} in parallel; writing to {folder}",
        flush=True,
    )
    figures, rows = measure(arguments, folder)
    print_table(figures, rows, columns(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.flips:
        is_good = not figures["silent"]
    else:
        is_good = figures["identical"] == figures["kills"] and not figures["lost"] and not figures["refused"]
    if is_good and not arguments.folder:
        shutil.rmtree(folder)
    elif not is_good:
        print(f"the failed runs are in {folder}", file=sys.stderr)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
