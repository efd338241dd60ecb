"""The environment of `accelerate launch`, compared with the flags before torch is imported."""

import os
import time
from collections.abc import Callable
from typing import Any

from .signals import Stopped

PRECISIONS = ("no", "bf16", "fp16")
SHARDING = {  # that would shard the student
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
SECONDS_TO_END = 5  # within which a launcher ends all processes of a run whose first process has failed


def local_processes() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_on_several_machines() -> bool:
    """Whether the processes of this run are on several machines."""
    return int(os.environ.get("WORLD_SIZE", 1)) > local_processes()


def is_launched() -> bool:
    """Whether a launcher started this process as one of several of a run."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    """Whether this is rank 0, the process that logs for all."""
    return not int(os.environ.get("RANK", 0))


def defer_to_rank_zero() -> None:
    """Let the first process of a machine report an error: the launcher then ends those that have the same one."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        try:
            time.sleep(SECONDS_TO_END)
        except Stopped:
            raise SystemExit(2) from None


def launched_precision(flag: str | None, log: Callable[[str], object] = print) -> str | None:
    """Return --mixed_precision or, if it is None, the precision of accelerate's config; the flag overrides it.

    The config's "no" counts as unset: it is the default of accelerate launch. Raises ValueError for a
    config's precision that is not supported.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if flag is None and configured not in PRECISIONS:
        raise ValueError(
            f"accelerate's config has mixed_precision {configured}, expected {', '.join(PRECISIONS)}: add "
            "--mixed_precision bf16, which overrides it."
        )
    if flag not in (None, configured) and configured != "no" and is_first():
        log(f"--mixed_precision {flag} overrides {configured} of accelerate's config")
    return flag or (None if configured == "no" else configured)


def check_launch(settings: Any) -> None:
    """Raise ValueError for a launch that contradicts the flags, or that would shard the student."""
    if sharding := [
        name for variable, name in SHARDING.items() if os.environ.get(variable, "false").lower() == "true"
    ]:
        raise ValueError(
            f"accelerate's config trains with {sharding[0]}; a student is small and is trained unsharded on every "
            "GPU. Choose configs/accelerate_8_gpus.yaml, and --teacher_residency sharded to shard the teacher."
        )
    steps = settings.gradient_accumulation_steps
    configured = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    if str(configured) != str(steps):
        raise ValueError(
            f"accelerate's config has gradient_accumulation_steps {configured}, --gradient_accumulation_steps is "
            f"{steps}. Take it out of the config, or add the flag."
        )
    if settings.teacher_residency != "sharded":
        return
    if local_processes() < 2:
        raise ValueError(
            "--teacher_residency sharded shards the teacher over the processes of a machine, and there is one. "
            "Start the run with accelerate launch --num_processes N, or choose another."
        )
    if settings.teacher_fp8:
        raise ValueError(
            "--teacher_residency sharded keeps the experts in the precision they compute in: leave "
            "--teacher_fp8 out."
        )
