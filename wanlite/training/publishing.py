"""A saved student -> a model on the hub. No torch."""

from collections.abc import Callable
from pathlib import Path

from .model_card import NOT_PUBLISHED, upload_command


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
    """Upload what inference needs, the samples and the record of a run; a failure is a warning with the command."""
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
