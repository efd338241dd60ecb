"""--plan_for -> the memory of a machine that a dry run plans for; torch is not imported."""

import re
from typing import NamedTuple

UNKNOWN = 10**15  # bytes of CPU memory that is not named: enough for everything


class Machine(NamedTuple):
    """The bytes that a machine with a GPU has on the GPU and in CPU memory."""

    device_bytes: int
    cpu_bytes: int


def planned_machine(text: str) -> Machine:
    """Return the machine of --plan_for, "24GB" or "24GB,64GB"; raises ValueError for other texts."""
    sizes = [
        re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*(?:GB|G|GiB)\s*", size, re.IGNORECASE)
        for size in text.split(",")
    ]
    found = [float(size[1]) * 1e9 for size in sizes if size]
    if len(found) != len(sizes) or len(found) > 2 or min(found, default=0) <= 0:
        raise ValueError(
            f"--plan_for {text:.60} does not describe a machine, expected the memory of its GPU, and optionally its CPU "
            "memory, for example 24GB,64GB."
        )
    return Machine(round(found[0]), round(found[1]) if len(found) == 2 else UNKNOWN)
