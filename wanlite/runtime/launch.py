"""What `accelerate launch` says through the environment, held against the flags before torch is imported."""

import os
import time

from .signals import Stopped

PRECISIONS = ("no", "bf16", "fp16")
CUTTERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}  # what would cut the student into pieces
SECONDS_TO_END = 5  # in which a launcher has ended every process of a run whose first has failed


def local_processes():
    """Return how many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_launched():
    """Whether a launcher started this process as one of a run's several."""
    return "LOCAL_RANK" in os.environ


def is_first():
    """Whether this is the process of a run that speaks for all of them."""
    return not int(os.environ.get("RANK", 0))


def defer_to_rank_zero():
    """Let the first process of a machine say what went wrong: the launcher then ends those that would say the
    same.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        try:
            time.sleep(SECONDS_TO_END)
        except Stopped:
            raise SystemExit(2) from None


def launched_precision(asked, say=print):
    """Return --mixed_precision, or where it is None what accelerate's config says; of two that differ the
    flag counts.

    Its "no" is no word of the user's: accelerate launch says it where nothing else was.

    Raises ValueError for a config's precision that is none of ours.
    """
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked is None and said not in PRECISIONS:
        raise ValueError(
            f"accelerate's config has mixed_precision {said}, expected {', '.join(PRECISIONS)}: add "
            f"--mixed_precision "
            "bf16, which then counts."
        )
    if asked not in (None, said) and said != "no" and is_first():
        say(f"--mixed_precision {asked} counts, and not {said} of accelerate's config")
    return asked or (None if said == "no" else said)


def check_launch(settings):
    """Refuse a launch that contradicts the flags, or that would cut the student into pieces."""
    if cut := [
        name for variable, name in CUTTERS.items() if os.environ.get(variable, "false").lower() == "true"
    ]:
        raise ValueError(
            f"accelerate's config trains by {cut[0]}; a student is small and learns whole on every GPU. "
            f"Choose "
            "configs/accelerate_8_gpus.yaml, and --teacher_residency sharded to share the teacher out."
        )
    said = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", settings.gradient_accumulation_steps)
    if str(said) != str(settings.gradient_accumulation_steps):
        raise ValueError(
            f"accelerate's config has gradient_accumulation_steps {said}, --gradient_accumulation_steps is "
            f"{settings.gradient_accumulation_steps}. Take it out of the config, or add the flag."
        )
    if settings.teacher_residency == "sharded" and local_processes() < 2:
        raise ValueError(
            "--teacher_residency sharded shares the teacher out among the processes of a machine, and there "
            "is one. "
            "Start the run with accelerate launch --num_processes N, or choose another."
        )
    if settings.teacher_residency == "sharded" and settings.teacher_fp8:
        raise ValueError(
            "--teacher_residency sharded keeps the experts in the precision they compute in: leave "
            "--teacher_fp8 out."
        )
