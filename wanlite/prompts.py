"""A file of prompts -> a list of prompts; no torch, so that a wrong path is answered at once."""

from pathlib import Path


def read_prompts(path):
    """Return the prompts of a text file, one a line; empty lines are left out.

    Raises OSError where the file cannot be read and ValueError where it holds no prompt.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(f"{path}: no such file. Expected a text file with one prompt a line.")
    if not path.is_file():
        raise OSError(f"{path}: not a file. Expected a text file with one prompt a line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}). Expected one prompt a line.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt. Write one prompt a line.")
    return prompts
