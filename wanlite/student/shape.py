"""A teacher's config -> the shapes of students that can be cut from it."""


def check_cut(teacher, student):
    """Refuse a student that cannot be cut from a teacher, naming the nearest that can."""
    for ours, theirs in (("num_channels", "in_channels"), ("text_dim", "text_dim"), ("freq_dim", "freq_dim")):
        if student[ours] != teacher[theirs]:
            raise ValueError(
                f"the student's {ours} is {student[ours]}, the teacher's {teacher[theirs]}; they must agree."
            )
    if tuple(student["patch_size"]) != tuple(teacher["patch_size"]):
        raise ValueError(
            f"patch_size is {student['patch_size']}, the teacher's {teacher['patch_size']}; they must agree."
        )
    limits = _limits(teacher, student["depth"])
    reasons = [
        f"--{name} {student[name]} is more than the teacher's {most}"
        for name, most in limits.items()
        if student[name] > most
    ]
    if not reasons and not _can_be_cut(teacher, student["hidden_size"], student["num_heads"]):
        head_dim = student["hidden_size"] / student["num_heads"]
        reasons.append(
            f"{student['num_heads']} heads of {head_dim:g} channels cannot be cut from heads of "
            f"{teacher['attention_head_dim']}: a head keeps whole rotary pairs of every axis, an even number "
            f"from 6 to "
            f"{teacher['attention_head_dim']}"
        )
    if reasons:
        raise ValueError(
            f"{'; '.join(reasons)}. The nearest shapes that can be cut: {_nearest(teacher, student)}; or "
            f"take "
            "--projection none for a random start."
        )


def student_shape(teacher, hidden_size=None, depth=None, num_heads=None, ffn_dim=None):
    """Return the arguments of a student for a teacher of this config; where a size is None, the teacher's
    decides.
    """
    width = _width(teacher)
    hidden_size = hidden_size or (1024 if width >= 1024 else width // 2)
    depth = depth or min(16, teacher["num_layers"])
    return {
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads or default_heads(teacher, hidden_size, depth),
        "ffn_dim": ffn_dim or 4 * hidden_size,
        "num_channels": teacher["in_channels"],
        "text_dim": teacher["text_dim"],
        "freq_dim": teacher["freq_dim"],
        "patch_size": teacher["patch_size"],
        "rope_max_seq_len": teacher.get("rope_max_seq_len", 1024),
    }


def default_heads(teacher, hidden_size, depth):
    """Return the most heads that can be cut, of half the teacher's head size or more: measured better than
    fewer whole heads.
    """
    counts = [
        heads
        for heads in range(1, _limits(teacher, depth)["num_heads"] + 1)
        if _can_be_cut(teacher, hidden_size, heads)
        and 2 * hidden_size // heads >= teacher["attention_head_dim"]
    ]
    return max(counts, default=1)


def _width(teacher):
    return teacher["num_attention_heads"] * teacher["attention_head_dim"]


def _limits(teacher, depth):
    """Return the largest shape that can be cut; a student block pools the heads and neurons of all blocks in
    its span.
    """
    pooled = max(1, teacher["num_layers"] // depth)
    return {
        "hidden_size": _width(teacher),
        "depth": teacher["num_layers"],
        "ffn_dim": pooled * teacher["ffn_dim"],
        "num_heads": pooled * teacher["num_attention_heads"],
    }


def _can_be_cut(teacher, hidden_size, num_heads):
    head_dim, rest = divmod(hidden_size, num_heads)
    return rest == 0 and head_dim % 2 == 0 and 6 <= head_dim <= teacher["attention_head_dim"]


def _nearest(teacher, student, count=3):
    """Return the flags of the shapes nearest in width, then in heads."""
    depth = min(student["depth"], teacher["num_layers"])
    most = _limits(teacher, depth)
    sizes = [
        (heads * size, heads)
        for heads in range(1, most["num_heads"] + 1)
        for size in range(6, teacher["attention_head_dim"] + 1, 2)
        if heads * size <= most["hidden_size"]
    ]
    sizes.sort(
        key=lambda shape: (abs(shape[0] - student["hidden_size"]), abs(shape[1] - student["num_heads"]))
    )
    return " or ".join(
        f"--hidden_size {width} --num_heads {heads} --depth {depth} "
        f"--ffn_dim {min(student['ffn_dim'], most['ffn_dim'])}"
        for width, heads in sizes[:count]
    )
