"""Settings of a run, checked before torch is imported: what cannot work is refused at once, with what to do."""

import os
import shutil
from pathlib import Path

from ..phases import FEW_STEP_SHARE


def check_all(checks, together=False):
    """Run checks one after the other; the first that fails raises, or where `together` all that do in one, a
    line each.
    """
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


def check_together(settings):
    """Refuse settings that contradict each other, prompts that say nothing, and places that nothing can be
    written to.
    """
    if settings.num_images is not None and settings.images is None:
        raise ValueError(f"--num_images is {settings.num_images}, expected --images beside it.")
    if 0 < (settings.rollout_states or 0) < len(settings.aspect_ratios or ()):
        raise ValueError(
            f"--rollout_states is {settings.rollout_states}, expected 0, or at least one for each of "
            f"the "
            f"{len(settings.aspect_ratios)} --aspect_ratios."
        )
    if any(not prompt.strip() for prompt in settings.validation_prompts or ()):
        raise ValueError(
            "--validation_prompts has one that says nothing, expected words in each. Leave it out."
        )
    if (
        settings.cache_dir is not None
        and Path(settings.cache_dir).exists()
        and not Path(settings.cache_dir).is_dir()
    ):
        raise ValueError(f"--cache_dir {settings.cache_dir}: is a file, expected a folder. Name another.")
    output = Path(settings.output_dir).absolute()
    if not Path(os.path.normpath(output / settings.logging_dir)).is_relative_to(output):
        raise ValueError(
            f"--logging_dir {settings.logging_dir}: is not inside --output_dir, expected a folder's name, as "
            f"logs."
        )
    if settings.project_only and (settings.student is not None or settings.projection == "none"):
        raise ValueError(
            "--project_only saves what is projected, and --student or --projection none projects nothing. "
            "Leave one "
            "of them out."
        )
    if settings.expert == "best_per_block" and settings.projection == "calibrated":
        raise ValueError(
            "--expert best_per_block goes with --projection weights: a student is calibrated against one expert. Add "
            "--projection weights, or choose --expert low or high."
        )
    if settings.matching_steps and settings.mixed_precision == "fp16":
        raise ValueError(
            "--matching_steps goes with --mixed_precision no or bf16: the critic's gradients are not scaled."
        )


def check_compiler():
    """Refuse --compile where there is no C++ compiler, which torch builds its kernels with."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl") if name]
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"--compile needs a C++ compiler, and none of {', '.join(names)} is found. Install one (apt "
            f"install g++), "
            "or leave --compile out."
        )


def complete_steps(settings):
    """Return (few_steps, few_step_train_steps): the numbers of steps in rising order, and how many steps of training
    are for them.

    Raises ValueError where the phases do not fit into --max_train_steps, or a number of steps is none that can
    be trained.
    """
    few_steps = sorted(set(settings.few_steps))
    few_step_train_steps = settings.few_step_train_steps
    if few_step_train_steps is None:
        few_step_train_steps = round(
            FEW_STEP_SHARE * max(0, settings.max_train_steps - settings.matching_steps)
        )
    rest = settings.max_train_steps - few_step_train_steps - settings.matching_steps
    if rest < 0:
        raise ValueError(
            f"--few_step_train_steps {few_step_train_steps} and --matching_steps {settings.matching_steps} are more than "
            f"--max_train_steps {settings.max_train_steps}, which counts them in. Raise that, or lower these."
        )
    if settings.matching_steps and not few_step_train_steps and settings.student is None:
        raise ValueError(
            "--matching_steps without --few_step_train_steps: distribution matching goes on from a student that "
            "draws in "
            "few steps. Raise --few_step_train_steps, or name such a student with --student DIR."
        )
    if rest == 0 and settings.student is None:
        raise ValueError(
            f"--few_step_train_steps {few_step_train_steps} leaves no step of stage 1, and few-step training starts from a "
            f"student "
            "of stage 1. Lower it, or name such a student with --student DIR."
        )
    if few_step_train_steps or settings.matching_steps:
        for count in few_steps:
            if count < 1 or settings.teacher_steps % count:
                raise ValueError(
                    f"--few_steps {count} does not divide --teacher_steps {settings.teacher_steps}: students "
                    f"stop "
                    "only where the teacher does. Choose divisors, as 1 2 4."
                )
        if settings.num_inference_steps not in few_steps:
            raise ValueError(
                f"--num_inference_steps {settings.num_inference_steps} is none of --few_steps "
                f"{' '.join(map(str, few_steps))}, for which the student is trained. Choose one of them."
            )
    return few_steps, few_step_train_steps


def check_batch(settings, states, ranks):
    """Refuse, before the teacher is asked, a batch larger than the states of a phase, as count_states() has
    them.
    """
    rows = settings.train_batch_size * ranks
    for phase, count in states.items():
        if count < rows:
            lower = f"lower --train_batch_size to {count // ranks}, or " if count >= ranks else ""
            ratios = ", or name fewer --aspect_ratios" if settings.aspect_ratios else ""
            raise ValueError(
                f"the phase {phase} learns from {count} states, fewer than one batch of {rows}: {lower}raise "
                f"--num_trajectories or --rollout_states{ratios}."
            )


def check_student(run, settings, folder):
    """Refuse to go on from a saved student whose run does not fit this one.

    `run` is its run.json, `folder` where it lies.
    """

    def refuse(what):
        raise ValueError(f"--student {folder}: {what}")

    if run.get("projected_only"):
        refuse(
            "holds a projected start, and nothing was trained of it. Leave --student out: a run with this "
            "--cache_dir or "
            "--output_dir starts there."
        )
    if not run.get("finished"):
        refuse("holds no finished run. Let it finish with the command that began it.")
    if "schedule" not in run:
        refuse(
            "was saved by an older version, which did not record the schedule it was trained for. Train it "
            "again, or leave "
            "--student out to start from the teacher's weights."
        )
    kinds = {"teacher": str, "student": dict, "settings": dict, "schedule": dict}
    if odd := [name for name, kind in kinds.items() if not run.get(name) or not isinstance(run[name], kind)]:
        refuse(f"its run.json does not say a run's {', '.join(odd)}. Copy the folder again.")
    phases = run["schedule"].get("phases")
    if not isinstance(phases, dict):
        refuse("its run.json does not say the phases of its schedule. Copy the folder again.")
    is_velocity_left = settings.max_train_steps > settings.few_step_train_steps + settings.matching_steps
    if not is_velocity_left and not phases.get("velocity"):
        refuse(
            f"has not been through stage 1 (its phases are {phases}). Lower --few_step_train_steps, so that steps of "
            f"stage 1 are left, "
            "or name another student."
        )
    if not is_velocity_left and not settings.few_step_train_steps and not phases.get("few_step"):
        refuse(
            f"does not draw in few steps yet (its phases are {phases}), and distribution matching goes on from "
            f"a student that "
            "does. Raise --few_step_train_steps, or name another student."
        )
    then, shape, now = run["settings"], run["student"], vars(settings)
    for name in ("guidance_scale", "guidance_scale_2", "negative_prompt", "flow_shift", "resolution"):
        if then.get(name) != now[name]:
            refuse(
                f"was trained with {name} {then.get(name)!r}, this run has {now[name]!r}. Use the same, or "
                f"leave --student out."
            )
    for name in ("hidden_size", "depth", "num_heads", "ffn_dim"):
        if now[name] is not None and now[name] != shape.get(name):
            refuse(f"has {name} {shape.get(name)}, and --{name} says {now[name]}. Leave the flag out.")
