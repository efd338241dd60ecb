"""Output that is closed, full, or of a narrow encoding."""

import os
import shutil

from benchmarks.hostile_inputs.trial import ACCEPTED, PROMPT, REFUSED, SAME, Input, draw, train


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

    def deleted():
        os.mkdir("gone"), os.chdir("gone"), os.rmdir("../gone")

    cached = lambda place: shutil.copytree(place.run / "cache", place.beside / "run/cache") and None  # noqa: E731
    emoji = lambda place: ["--prompt", f"{PROMPT} \N{ARTIST PALETTE}"]  # noqa: E731
    nothing = lambda place: None  # noqa: E731
    rows = [
        ("drawing into a closed pipe", SAME, nothing, with_output(closed_pipe)),
        ("training into a closed pipe", SAME, cached, with_output(closed_pipe, train), True),
        ("drawing into a full device", SAME, nothing, with_output(full)),
        ("drawing without output", SAME, nothing, with_output(closed)),
        ("drawing in a deleted folder", REFUSED, nothing, with_output(deleted)),
        ("an emoji in an ASCII terminal", ACCEPTED, emoji, with_output(narrow)),
    ]
    return [Input(kind, *row) for row in rows]
