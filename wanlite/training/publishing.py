"""A saved student -> a model on the hub. No torch."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from ..files.file_names import CACHE, CHECKPOINTS, MODEL_CARD, REPORT, RUN
from ..files.inside import walk
from .run_folder import link_file, read_run

NOT_PUBLISHED = (CACHE, CHECKPOINTS, "logs")  # folders that only training needs
PUBLISHED = ".published"  # the copy that is uploaded, in the folder of the run
WITH_PATHS = (RUN, MODEL_CARD, REPORT)  # files that name paths of this machine
ROOT = Path(__file__).resolve().parents[2]


def create_repository(name: str) -> None:
    """Create the repository of a model on the hub unless it exists.

    Called before training, so that a wrong name or a missing token is found at once. Raises ValueError.
    """
    from huggingface_hub import HfApi  # here: most runs do not need it
    from huggingface_hub.errors import HfHubHTTPError

    fault = "the hub refuses it"
    advice = "Log in with `hf auth login`, use a token that may write, or leave it out."
    try:
        HfApi().create_repo(name, exist_ok=True)
        return
    except (HfHubHTTPError, ValueError) as error:
        reason = _first_line(error)
    except Exception as error:  # of the HTTP client, which changes between versions of the library
        fault, reason = "the hub cannot be reached", _first_line(error)
        advice = "Leave it out; a saved student can be uploaded later, with `hf upload`."
    raise ValueError(f"--push_to_hub {name}: {fault} ({reason}). {advice}")


def publish(folder: str | Path, name: str, log: Callable[[str], object]) -> None:
    """Upload the student, the samples and the record of its run; a failure is a warning with the command."""
    from huggingface_hub import HfApi

    log(f"uploading {folder} to {name}")
    copy = copy_without_paths(Path(folder), name)
    try:
        commit = HfApi().upload_folder(
            repo_id=name, folder_path=copy, commit_message="Upload a WanLiteStudent"
        )
    except Exception as error:  # as in create_repository(): the student is saved, whatever fails
        log(
            f"WARNING   not uploaded ({_first_line(error)}). The student is saved; upload it with\n"
            f"    {upload_command(folder, name)}"
        )
        return
    shutil.rmtree(copy)
    log(f"uploaded to {commit.repo_url}")


def _first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def upload_command(folder: str | Path, name: str) -> str:
    """Return the shell command that uploads the copy of a student's folder."""
    return shlex.join(["hf", "upload", name, str(Path(folder) / PUBLISHED)])


def copy_without_paths(folder: Path, name: str) -> Path:
    """Return a folder of hard links to the files that are published; texts name no path of this machine.

    The folder of the student is called `name` in them, and a file of the user by its last part.
    """
    copy = folder / PUBLISHED
    shutil.rmtree(copy, ignore_errors=True)
    replaced = _private_paths(folder, name)
    for path in sorted(walk(folder)):
        inner = path.relative_to(folder)
        if not path.is_file() or inner.parts[0] in NOT_PUBLISHED or inner.parts[0].startswith("."):
            continue
        target = copy / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name not in WITH_PATHS:
            link_file(path, target)
            continue
        text = path.read_text(encoding="utf-8")
        for private, public in replaced.items():
            text = text.replace(private, public)
        target.write_text(text, encoding="utf-8")
    return copy


def _private_paths(folder, name):
    """Return {path of this machine: its replacement}, the longest first."""
    run = read_run(folder)
    values = (run.get("settings") or {}).values()
    typed = [value for value in values if isinstance(value, str) and Path(value).is_absolute()]
    replaced = {value: Path(value).name for value in typed}
    directory = run.get("report", {}).get("directory", str(Path.cwd()))
    replaced |= {
        f"{ROOT}/": "",
        str(ROOT): ".",
        directory: ".",
        str(Path.home()): "~",
        str(folder.absolute()): name,
        str(folder): name,
    }
    return {private: replaced[private] for private in sorted(replaced, key=len, reverse=True)}
