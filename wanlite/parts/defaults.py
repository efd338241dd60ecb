"""Names and default steps of small parts. No torch, so that a command line can be checked at once."""

from typing import NamedTuple

PARTS = ("small", "large")
LARGE_WIDTH = 1024  # of a text encoder: from here on its parts are real ones
STUDENT_IMAGES = 4000


class Steps(NamedTuple):
    """Default steps for the parts of a tiny world, and for real ones."""

    tiny: int
    real: int

    def __str__(self) -> str:
        return f"{self.real:,}, {self.tiny:,} for the tiny world's"


# Those of the tiny world are measured by benchmarks/small_parts.py, the others are estimates.
STEPS = {"decoder": Steps(1500, 20_000), "reading": Steps(1500, 15_000), "text_velocity": Steps(400, 4000)}
