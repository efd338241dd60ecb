"""Settings and a teacher -> what a run is about: its prompts and images, and the student's shape."""

import json
from pathlib import Path

from ..data.grammar import varied_prompts
from ..data.images import choose_images
from ..data.prompts import read_prompts
from ..files.atomic import write_json
from ..phases import PHASE_NAMES
from ..student.shape import check_shape_fits, student_shape
from ..training.run_folder import read_run
from ..world.record import read_world

DEFAULT_PROMPTS = 4000  # of the tiny world or of a grammar, where no prompts file is named


def choose_prompts(settings, say=None):
    """Return training prompts and held-out prompts; no trajectory of training starts from a held-out one."""
    count = settings.num_trajectories or DEFAULT_PROMPTS
    if settings.prompts is None and (world := read_world(settings.teacher)):
        each = max(1, settings.num_held_out // 2)
        one, two = (world.captions(settings.seed + 1, each, held_out=True, num_objects=n) for n in (1, 2))
        return world.captions(settings.seed, count), [prompt for pair in zip(one, two) for prompt in pair]
    if settings.prompts is None:
        num_held_out = min(settings.num_held_out, max(1, count // 20))
        held_out = varied_prompts(settings.seed, num_held_out, held_out=True)
        return varied_prompts(settings.seed, count), held_out
    wanted = settings.num_trajectories and settings.num_trajectories + settings.num_held_out
    prompts = list(dict.fromkeys(read_prompts(settings.prompts, say, wanted, settings.seed)))
    num_held_out = min(settings.num_held_out, max(1, len(prompts) // 20))
    if len(prompts) == 1 and say:
        say("prompts  there is one: it is trained on, and held out as well")
    return (prompts[:-num_held_out] or prompts)[: settings.num_trajectories], prompts[-num_held_out:]


def choose_data(settings, sizes, say, is_main_process=True):
    """Return training prompts, held-out prompts, and images captioned and of `sizes`, whose captions are
    among the former.

    What was found of images is kept in the cache, by their contents: only new ones are decoded. A dry run
    keeps nothing.
    """
    training, held_out = choose_prompts(settings, say)
    if settings.images is None:
        return training, held_out, []
    record = Path(settings.cache_dir) / "images.json"
    seen = _read_seen(record)
    known = len(seen)
    images = choose_images(settings.images, sizes, settings.num_images, held_out, say, seen, is_main_process)
    if len(seen) > known and is_main_process and not settings.dry_run:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, seen)
    return list(dict.fromkeys([*training, *(image.caption for image in images)])), held_out, images


def _read_seen(record):
    """Return the record of images that were decoded before; empty if it cannot be read."""
    try:
        seen = json.loads(record.read_text(encoding="utf-8"))
        return seen if isinstance(seen, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def choose_shape(settings, files):
    """Return the student's shape: that of --student, or the one that the flags and the teacher's shape give.

    Raises ValueError for a student of another teacher, and for a shape that cannot be projected.
    """
    if settings.student is not None:
        if read_run(settings.student)["teacher"] != files.fingerprint:
            raise ValueError(
                f"--student {settings.student}: was distilled from another teacher than {settings.teacher}. "
                f"Use the "
                "same, or leave --student out."
            )
        return read_run(settings.student)["student"]
    if (settings.feature_directions or 1) > files.width:
        raise ValueError(
            f"--feature_directions {settings.feature_directions} is more than the {files.width} of the "
            f"teacher's "
            "token states. Lower it, or leave it out."
        )
    shape = student_shape(
        files.config, settings.hidden_size, settings.depth, settings.num_heads, settings.ffn_dim
    )
    if settings.projection != "none":
        check_shape_fits(files.config, shape)
    return shape


def describe_schedule(settings, few_steps, phases):
    """Return what run.json says of the schedule: where its levels come from, the numbers of steps, the phases
    trained so far.
    """
    earlier = read_run(settings.student)["schedule"]["phases"] if settings.student is not None else {}
    steps = {
        name: earlier.get(name, 0) + sum(last - first for phase, first, last in phases if phase == name)
        for name in PHASE_NAMES
    }
    return {"flow_shift": settings.flow_shift, "few_steps": few_steps or None, "phases": steps}
