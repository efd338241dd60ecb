"""A teacher's config -> the shapes of students that can be projected from it. Configs are dicts."""

from collections.abc import Mapping
from typing import Any

MIN_HEAD_DIM = 6  # a rotary pair each for time, height and width
LARGE_WIDTH = 1024  # default width of the student of a teacher that is at least as wide
MAX_DEPTH = 16  # default depth of a student
SHARED_SETTINGS = (("num_channels", "in_channels"), ("text_dim", "text_dim"), ("freq_dim", "freq_dim"))

DEFAULT_EXPERT = "high"  # of two experts


def check_shape_fits(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Raise ValueError for a student that cannot be projected from a teacher; names the nearest possible shapes."""
    for ours, theirs in SHARED_SETTINGS:
        if student[ours] != teacher[theirs]:
            raise ValueError(
                f"the student's {ours} is {student[ours]}, the teacher's {teacher[theirs]}; they must agree."
            )
    if tuple(student["patch_size"]) != tuple(teacher["patch_size"]):
        raise ValueError(
            f"patch_size is {student['patch_size']}, the teacher's {teacher['patch_size']}; they must agree."
        )
    limits, head_dim = _limits(teacher, student["depth"]), teacher["attention_head_dim"]
    reasons = [
        f"--{name} {student[name]} is more than the teacher's {limit}"
        for name, limit in limits.items()
        if student[name] > limit
    ]
    if not reasons and not _are_heads_possible(teacher, student["hidden_size"], student["num_heads"]):
        size = student["hidden_size"] / student["num_heads"]
        reasons.append(
            f"{student['num_heads']} heads of {size:g} channels cannot be pruned from heads of {head_dim}: a head "
            f"keeps whole rotary pairs of every axis, an even number from {MIN_HEAD_DIM} to {head_dim}"
        )
    if reasons:
        raise ValueError(
            f"{'; '.join(reasons)}. The nearest possible shapes: {_nearest(teacher, student)}; or add "
            f"--projection none for a random start."
        )


def student_shape(
    teacher: Mapping[str, Any],
    hidden_size: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    ffn_dim: int | None = None,
) -> dict[str, Any]:
    """Return the arguments of a student of a teacher; sizes that are None follow from the teacher."""
    width = _width(teacher)
    hidden_size = hidden_size or (LARGE_WIDTH if width >= LARGE_WIDTH else width // 2)
    depth = depth or min(MAX_DEPTH, teacher["num_layers"])
    return {
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads or choose_num_heads(teacher, hidden_size, depth),
        "ffn_dim": ffn_dim or 4 * hidden_size,
        "num_channels": teacher["in_channels"],
        "text_dim": teacher["text_dim"],
        "freq_dim": teacher["freq_dim"],
        "patch_size": teacher["patch_size"],
        "rope_max_seq_len": teacher.get("rope_max_seq_len", 1024),
    }


def choose_num_heads(teacher: Mapping[str, Any], hidden_size: int, depth: int) -> int:
    """Return the largest possible number of heads with at least half the teacher's head size.

    In the tiny world, such heads train better than fewer whole heads.
    """
    counts = [
        heads
        for heads in range(1, _limits(teacher, depth)["num_heads"] + 1)
        if _are_heads_possible(teacher, hidden_size, heads)
        and 2 * hidden_size // heads >= teacher["attention_head_dim"]
    ]
    return max(counts, default=1)


def _width(teacher):
    return teacher["num_attention_heads"] * teacher["attention_head_dim"]


def _limits(teacher, depth):
    """Return the largest possible sizes; a student block can combine heads and neurons of all blocks of its span."""
    pooled = max(1, teacher["num_layers"] // depth)
    return {
        "hidden_size": _width(teacher),
        "depth": teacher["num_layers"],
        "ffn_dim": pooled * teacher["ffn_dim"],
        "num_heads": pooled * teacher["num_attention_heads"],
    }


def _are_heads_possible(teacher, hidden_size, num_heads):
    head_dim, remainder = divmod(hidden_size, num_heads)
    return remainder == 0 and head_dim % 2 == 0 and MIN_HEAD_DIM <= head_dim <= teacher["attention_head_dim"]


def _nearest(teacher, student, count=3):
    """Return the flags of the shapes that are nearest in width, then in heads."""
    depth = min(student["depth"], teacher["num_layers"])
    limits = _limits(teacher, depth)
    sizes = [
        (heads * size, heads)
        for heads in range(1, limits["num_heads"] + 1)
        for size in range(MIN_HEAD_DIM, teacher["attention_head_dim"] + 1, 2)
        if heads * size <= limits["hidden_size"]
    ]
    sizes.sort(
        key=lambda shape: (abs(shape[0] - student["hidden_size"]), abs(shape[1] - student["num_heads"]))
    )
    return " or ".join(
        f"--hidden_size {width} --num_heads {heads} --depth {depth} "
        f"--ffn_dim {min(student['ffn_dim'], limits['ffn_dim'])}"
        for width, heads in sizes[:count]
    )
