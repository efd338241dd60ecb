"""A saved student -> a model on the hub. No torch."""

import shlex
from collections.abc import Callable
from pathlib import Path

NOT_PUBLISHED = ("cache/*", "checkpoints/*", "logs/*")  # files that only training needs


def create_repository(name: str) -> None:
    """Create the repository of a model on the hub unless it exists.

    Called before training, so that a wrong name or a missing token is found at once. Raises ValueError.
    """
    from huggingface_hub import HfApi  # here: most runs do not need it

    try:
        HfApi().create_repo(name, exist_ok=True)
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors
        raise ValueError(
            f"--push_to_hub {name}: the hub refuses it ({_first_line(error)}). Log in with `hf auth login`, use a "
            "token that may write, or leave it out."
        ) from None


def publish(folder: str | Path, name: str, log: Callable[[str], object]) -> None:
    """Upload the student, the samples and the record of its run; a failure is a warning with the command."""
    from huggingface_hub import HfApi

    log(f"uploading {folder} to {name}")
    try:
        commit = HfApi().upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=[*NOT_PUBLISHED, ".*"],
            commit_message="Upload a WanLiteStudent",
        )
    except (OSError, ValueError) as error:
        log(
            f"WARNING   not uploaded ({_first_line(error)}). The student is saved; upload it with\n"
            f"    {upload_command(folder, name)}"
        )
        return
    log(f"uploaded to {commit.repo_url}")


def _first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def upload_command(folder: str | Path, name: str) -> str:
    """Return the shell command that uploads a student's folder without the files that only training needs."""
    excluded = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in NOT_PUBLISHED)
    return f"hf upload {shlex.quote(name)} {shlex.quote(str(folder))} {excluded}"
