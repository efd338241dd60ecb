"""Try to surprise drawing, loading and training with hostile files, and count the inputs that behave as promised.

    python benchmarks/hostile.py --model outputs/wan_t2i
    python benchmarks/hostile.py --quick --only "links out" --show

Prints a row for each class of inputs in hostile_inputs/. Each input changes a copy of the student's folder, or
a file beside it, in a process that is forked after the imports; that process then does the same as the command line.

as promised   a refusal is one printable line of at most 500 characters with exit code 2, and costs less than a second
              of processor time and 200 MB beyond the imports; an accepted input draws the same images, or ends with
              the same weights; no file outside of the folder is opened, and no network is used
seconds       processor time of the slowest refusal
MB            memory of the largest refusal, beyond the imports
characters    length of the longest refusal
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY_TEACHER = ROOT / "tiny_teacher"


def read_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default="outputs/wan_t2i",
        help="folder of a small saved student (default: outputs/wan_t2i)",
    )
    parser.add_argument(
        "--run", type=Path, help="folder of a finished short run, as tests make it (default: one is trained)"
    )
    parser.add_argument("--only", help="classes or inputs whose names contain this text (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the changed values (default: 0)")
    parser.add_argument("--quick", action="store_true", help="the first two inputs of each class")
    parser.add_argument("--show", action="store_true", help="print the outcome of each input as well")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file (default: none)")
    return parser.parse_args()


def run_all(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Try all inputs in a temporary folder; returns a row for each."""
    from benchmarks.hostile_inputs import inputs, select
    from benchmarks.hostile_inputs.trial import Trial

    trial = Trial(arguments.model, folder, arguments.run)
    chosen = select(inputs(arguments.seed), arguments.only, 2 if arguments.quick else None)
    rows = []
    for each in chosen:
        began = time.monotonic()
        row = trial.run(each)
        rows.append(row | {"wall": time.monotonic() - began})
        if arguments.show or row["fault"]:
            print(f"{row['class']}: {row['input']}: {row['fault'] or row['outcome']}", flush=True)
            if row["fault"] or arguments.show:
                print(f"    {row['printed'][-300:]!r}", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a row for each class, and their sum."""
    lines = ["class                       inputs  as promised  not  seconds   MB  characters"]
    for name in [*dict.fromkeys(row["class"] for row in rows), ""]:
        own = [row for row in rows if name in ("", row["class"])]
        costs = [row for row in own if row["outcome"] == "refused"]
        good = sum(not row["fault"] for row in own)
        figures = (max((row[key] for row in costs), default=0) for key in ("seconds", "megabytes", "letters"))
        lines.append(
            "{:<27} {:>6} {:>12} {:>4} {:>8.2f} {:>4.0f} {:>11}".format(
                name or "all", len(own), good, len(own) - good, *figures
            )
        )
    return "\n".join(lines)


def main() -> int:
    """Print the table; returns 1 if an input did not behave as promised."""
    arguments = read_arguments()
    folder = Path(tempfile.mkdtemp(prefix="wanlite-hostile-"))
    try:
        rows = run_all(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
