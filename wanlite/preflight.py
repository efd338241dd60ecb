"""Settings of a run, checked and completed before torch is imported: what cannot work is said at once, with what to do.

A run has up to three parts, one after the other: `velocity` (stage 1), `segments` (stage 2a), `matching` (stage 2b).
"""

import json
import math
import os
import re
import shutil
from importlib import import_module
from pathlib import Path

WORLDS = ("wanlite.shapes", "wanlite.emoji")     # what a tiny teacher's record may name
WIDEST = 4                 # aspect ratio of a bucket
PARTS = ("velocity", "segments", "matching")
OWN_PATH_ROUNDS = 2        # how often in the part of segments the student's own path is walked
SEGMENT_SHARE = 5 / 7      # of the steps, where --segment_steps is left open
MOST_LOOKED_AT, LEAST_LOOKED_AT = 64, 4     # walks of a kind that a validation is held against
SHOWN = 8                  # prompts in the grids; as many are drawn from as many seeds each to see how varied pictures are
LEAST_VALIDATED = 16       # prompts of validations, where there are as many
LOOKED_AT = 20             # of a large teacher: one for so many trajectories, where --validation_walks is left open
FEWEST = 300               # trajectories, where --num_trajectories is left open: few prompts have several each, from other noise
#                            (benchmarks/few_prompts.py: 30 learn nothing in 200 steps, 300 draw 9 of 10 right, 500 hardly more)
MOST_OWN, OWN_SHARE = 512, 8     # states on the student's own path, and of a large teacher one for so many trajectories, where
#                                  --own_path_pictures is left open


def check_all(checks, together=False):
    """Run checks one after the other; the first that fails raises, or where `together` all that do in one, a line each."""
    failed = []
    for check in checks:
        try:
            check()
        except (OSError, ValueError) as error:
            if not together:
                raise
            failed.append(str(error))
    if failed:
        raise ValueError("\n".join(dict.fromkeys(failed)))


def read_record(teacher):
    """Return the training record of a tiny teacher, or an empty dict for any other teacher."""
    path = Path(teacher) / "training.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: is no JSON object. It tells a tiny teacher from others: take its folder out of the repository "
                         "again, or delete the file beside any other teacher.")
    return record


def read_world(teacher):
    """Return the module of the world that a tiny teacher draws, or None for any other teacher."""
    name = read_record(teacher).get("world")
    return import_module(name) if name in WORLDS else None


def complete_resolution(resolution, unit=16):
    """Return --resolution as a run records it: one number for a square, else [width, height].

    Raises ValueError for sides that do not divide into tokens of `unit` pixels.
    """
    sides = [resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) not in (1, 2):
        raise ValueError(f"--resolution {' '.join(map(str, sides))}: expected one number, for a square, or WIDTH HEIGHT.")
    for side in sides:
        if side % unit or side <= 0:
            nearest = max(unit, round(side / unit) * unit)
            raise ValueError(f"--resolution {side} is not divisible by {unit}; the nearest is {nearest}.")
    return sides[0] if sides[0] == sides[-1] else sides


def bucket_sizes(size, aspect_ratios, unit=16):
    """Return the sizes (width, height) of about the area of `size` that have `aspect_ratios`, as "3:2"; None for `size` alone.

    Sides are multiples of `unit`; ratios that come out as one size are one bucket. Raises ValueError for what is no ratio.
    """
    if aspect_ratios is None:
        return [size]
    sizes, area = {}, size[0] * size[1]
    for said in aspect_ratios:
        sides = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", said)
        ratio = int(sides[1]) / int(sides[2]) if sides else 0
        if not 1 / WIDEST <= ratio <= WIDEST:
            raise ValueError(f"--aspect_ratios {said}: expected WIDTH:HEIGHT as 3:2, from 1:{WIDEST} to {WIDEST}:1.")
        width, height = (max(1, round((area * each) ** 0.5 / unit)) * unit for each in (ratio, 1 / ratio))
        sizes[width, height] = None
    return list(sizes)


def check_together(settings):
    """Refuse settings that contradict each other, prompts that say nothing, and places that nothing can be written to."""
    if settings.num_images is not None and settings.images is None:
        raise ValueError(f"--num_images is {settings.num_images}, expected --images beside it.")
    if 0 < (settings.own_path_pictures or 0) < len(settings.aspect_ratios or ()):
        raise ValueError(f"--own_path_pictures is {settings.own_path_pictures}, expected 0, or at least one for each of the "
                         f"{len(settings.aspect_ratios)} --aspect_ratios.")
    if any(not prompt.strip() for prompt in settings.validation_prompts or ()):
        raise ValueError("--validation_prompts has one that says nothing, expected words in each. Leave it out.")
    if settings.cache_dir is not None and Path(settings.cache_dir).exists() and not Path(settings.cache_dir).is_dir():
        raise ValueError(f"--cache_dir {settings.cache_dir}: is a file, expected a folder. Name another.")
    output = Path(settings.output_dir).absolute()
    if not Path(os.path.normpath(output / settings.logging_dir)).is_relative_to(output):
        raise ValueError(f"--logging_dir {settings.logging_dir}: is not inside --output_dir, expected a folder's name, as logs.")
    if settings.project_only and (settings.student is not None or settings.projection == "none"):
        raise ValueError("--project_only saves what is projected, and --student or --projection none projects nothing. Leave one "
                         "of them out.")
    if settings.expert == "span" and settings.projection == "calibrated":
        raise ValueError("--expert span goes with --projection weights: a student is calibrated against one expert. Add "
                         "--projection weights, or choose --expert low or high.")
    if settings.matching_steps and settings.mixed_precision == "fp16":
        raise ValueError("--matching_steps goes with --mixed_precision no or bf16: the critic's gradients are not scaled.")


def check_compiler():
    """Refuse --compile where there is no C++ compiler, which torch builds its kernels with."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl") if name]
    if not any(map(shutil.which, names)):
        raise ValueError(f"--compile needs a C++ compiler, and none of {', '.join(names)} is found. Install one (apt install g++), "
                         "or leave --compile out.")


def complete_steps(settings):
    """Return (few_steps, segment_steps): the numbers of steps in rising order, and how many steps of training are for them.

    Raises ValueError where the parts do not fit into --max_train_steps, or a number of steps is none that can be trained.
    """
    few_steps = sorted(set(settings.few_steps))
    segment_steps = settings.segment_steps
    if segment_steps is None:
        segment_steps = round(SEGMENT_SHARE * max(0, settings.max_train_steps - settings.matching_steps))
    rest = settings.max_train_steps - segment_steps - settings.matching_steps
    if rest < 0:
        raise ValueError(f"--segment_steps {segment_steps} and --matching_steps {settings.matching_steps} are more than "
                         f"--max_train_steps {settings.max_train_steps}, which counts them in. Raise that, or lower these.")
    if settings.matching_steps and not segment_steps and settings.student is None:
        raise ValueError("--matching_steps without --segment_steps: distribution matching goes on from a student that draws in "
                         "few steps. Raise --segment_steps, or name such a student with --student DIR.")
    if rest == 0 and settings.student is None:
        raise ValueError(f"--segment_steps {segment_steps} leaves no step of stage 1, and few-step training starts from a student "
                         "of stage 1. Lower it, or name such a student with --student DIR.")
    if segment_steps or settings.matching_steps:
        for count in few_steps:
            if count < 1 or settings.teacher_steps % count:
                raise ValueError(f"--few_steps {count} does not divide --teacher_steps {settings.teacher_steps}: students stop "
                                 "only where the teacher does. Choose divisors, as 1 2 4.")
        if settings.num_inference_steps not in few_steps:
            raise ValueError(f"--num_inference_steps {settings.num_inference_steps} is none of --few_steps "
                             f"{' '.join(map(str, few_steps))}, for which the student is trained. Choose one of them.")
    return few_steps, segment_steps


def parts_of(settings):
    """Return the parts of a run in order, as (name, first step, last step); those of no step are left out."""
    ends = [settings.max_train_steps - settings.segment_steps - settings.matching_steps]
    ends += [ends[0] + settings.segment_steps * number // OWN_PATH_ROUNDS for number in range(1, OWN_PATH_ROUNDS + 1)]
    ends += [settings.max_train_steps]
    names = (PARTS[0], *[PARTS[1]] * OWN_PATH_ROUNDS, PARTS[2])
    return [(name, first, last) for name, first, last in zip(names, [0, *ends], ends) if first < last]


def count_trajectories(settings, num_prompts):
    """Return how many trajectories a run learns from: one a prompt or, of few prompts, several from different noise."""
    return settings.num_trajectories or max(num_prompts, FEWEST)


def bound_pictures(settings, is_large, num_trajectories, num_buckets=1):
    """Return what --validation_walks and --own_path_pictures are where they are left open: at most the trajectories and, if the
    teacher is large, a share of them; at least one state of the own path for each bucket."""
    walks, own = num_trajectories // LOOKED_AT if is_large else MOST_LOOKED_AT, num_trajectories // (OWN_SHARE if is_large else 1)
    return {"validation_walks": min(MOST_LOOKED_AT, max(LEAST_LOOKED_AT, settings.validation_walks or walks)),
            "own_path_pictures": min(MOST_OWN, max(own, num_buckets)) if settings.own_path_pictures is None else
            settings.own_path_pictures}


def choose_validated(training, held_out):
    """Return the prompts of validations: those held out and, where these are few, training prompts after them. Noise is never
    that of training, and one prompt alone would measure what nobody wants: how the teacher's pictures of it differ."""
    return list(dict.fromkeys([*held_out, *training]))[:max(len(held_out), LEAST_VALIDATED)]


def count_looks(walks, num_validated):
    """Return (walks of validated prompts, n): a validation is held against these, and against n prompts from n seeds each."""
    return max(min(num_validated, walks), min(LEAST_VALIDATED, walks)), min(SHOWN, math.isqrt(walks))


def count_passes(settings, num_trajectories, num_validated, parts):
    """Return how many times a picture goes through the teacher in a run; guidance takes two of these a step."""
    looks, several = count_looks(settings.validation_walks, num_validated)
    walks = num_trajectories + settings.validation_walks + looks + min(several, num_validated) * several
    steps = {part: sum(last - first for name, first, last in parts if name == part) for part in PARTS}
    shown = len(settings.validation_prompts or range(min(several, num_validated)))
    own = OWN_PATH_ROUNDS * settings.own_path_pictures * settings.teacher_steps // 2 * (steps["segments"] > 0)
    matched = steps["matching"] * settings.train_batch_size * settings.gradient_accumulation_steps      # a quarter, four times
    return 2 * (walks * settings.teacher_steps + shown * settings.reference_steps + own) + matched


def count_states(settings, num_trajectories, parts, num_buckets=1):
    """Return {part: states that it learns from}, in the bucket that has fewest: a batch is of one bucket."""
    walks, own = num_trajectories // num_buckets, settings.own_path_pictures // num_buckets
    later = 2 * walks + own if max(settings.few_steps) > 1 else walks
    return {part: walks * settings.teacher_steps if part == "velocity" else later for part, *_ in parts}


def check_batch(settings, states, ranks):
    """Refuse, before the teacher is asked, a batch larger than the states of a part, as count_states() has them."""
    rows = settings.train_batch_size * ranks
    for part, count in states.items():
        if count < rows:
            lower = f"lower --train_batch_size to {count // ranks}, or " if count >= ranks else ""
            ratios = ", or name fewer --aspect_ratios" if settings.aspect_ratios else ""
            raise ValueError(f"the part {part} learns from {count} states, fewer than one batch of {rows}: {lower}raise "
                             f"--num_trajectories or --own_path_pictures{ratios}.")


def check_student(run, settings, folder):
    """Refuse to go on from a saved student whose run does not fit this one. `run` is its run.json, `folder` where it lies."""
    def refuse(what):
        raise ValueError(f"--student {folder}: {what}")

    if run.get("projected_only"):
        refuse("holds a projected start, and nothing was trained of it. Leave --student out: a run with this --cache_dir or "
               "--output_dir starts there.")
    if not run.get("finished"):
        refuse("holds no finished run. Let it finish with the command that began it.")
    if "schedule" not in run:
        refuse("was saved by an older version, which did not record the schedule it was trained for. Train it again, or leave "
               "--student out to start from the teacher's weights.")
    kinds = {"teacher": str, "student": dict, "settings": dict, "schedule": dict}
    if odd := [name for name, kind in kinds.items() if not run.get(name) or not isinstance(run[name], kind)]:
        refuse(f"its run.json does not say a run's {', '.join(odd)}. Copy the folder again.")
    parts = run["schedule"].get("parts")
    if not isinstance(parts, dict):
        refuse("its run.json does not say the parts of its schedule. Copy the folder again.")
    is_velocity_left = settings.max_train_steps > settings.segment_steps + settings.matching_steps
    if not is_velocity_left and not parts.get("velocity"):
        refuse(f"has not been through stage 1 (its parts are {parts}). Lower --segment_steps, so that steps of stage 1 are left, "
               "or name another student.")
    if not is_velocity_left and not settings.segment_steps and not parts.get("segments"):
        refuse(f"does not draw in few steps yet (its parts are {parts}), and distribution matching goes on from a student that "
               "does. Raise --segment_steps, or name another student.")
    then, shape, now = run["settings"], run["student"], vars(settings)
    for name in ("guidance_scale", "guidance_scale_2", "negative_prompt", "flow_shift", "resolution"):
        if then.get(name) != now[name]:
            refuse(f"was trained with {name} {then.get(name)!r}, this run has {now[name]!r}. Use the same, or leave --student out.")
    for name in ("hidden_size", "depth", "num_heads", "ffn_dim"):
        if now[name] is not None and now[name] != shape.get(name):
            refuse(f"has {name} {shape.get(name)}, and --{name} says {now[name]}. Leave the flag out.")
