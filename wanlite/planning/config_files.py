"""A file of settings -> arguments that come before those of the command line, so that flags win. No torch."""

import re
import tomllib
from pathlib import Path
from typing import Any

from ..files.file_names import RUN
from ..files.json_files import MAX_DIGITS, Limits, open_regular, parse_json, shorten, shown

HELP = ("help", "help_all")  # flags that are not settings
FLAG = re.compile(r"-(?![\d.\s])\S*$")  # as argparse recognises it
MAX_DOTS = 1000  # of a line, or fewer of many: the time that tomllib takes for a key grows with their square
CONFIG_FILE = Limits(2**20, 2**10, "Correct it.", "a file of settings")


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the settings in a .toml or .json file, or those of the run that a run.json describes.

    Tables of a .toml file group settings and have no other meaning. Raises OSError or ValueError for other files.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"{path}: expected a .toml or .json file, or the {RUN} of a run.")
    with open_regular(path) as file:
        content = file.read(CONFIG_FILE.max_bytes + 1)
    is_toml = path.suffix == ".toml"
    found = _parse_toml(content, path) if is_toml else parse_json(content, path, CONFIG_FILE)
    is_run = not is_toml and isinstance(found.get("settings"), dict)
    settings = found["settings"] if is_run else _without_tables(found, path)
    _check_settings(settings, path)
    return settings


def _parse_toml(content, path):
    if len(content) > CONFIG_FILE.max_bytes:
        raise ValueError(
            f"{path}: more than {CONFIG_FILE.max_bytes:,} bytes, too large for a file of settings."
        )
    try:
        if sum(line.count(b".") ** 2 for line in content.splitlines()) > MAX_DOTS**2:
            raise ValueError(f"a line with more than {MAX_DOTS:,} dots, or many lines of hundreds")
        return tomllib.loads(content.decode())
    except RecursionError:
        raise ValueError(f"{path}: not TOML (nested too deeply). Correct it.") from None
    except ValueError as error:
        raise ValueError(f"{path}: not TOML ({error}). Correct it.") from None


def _without_tables(found, path):
    settings: dict[str, Any] = {}
    for name, value in found.items():
        own = value if isinstance(value, dict) else {name: value}
        if twice := settings.keys() & own.keys():
            raise ValueError(f"{path}: has {min(twice)} twice, expected each setting once. Correct it.")
        settings |= own
    return settings


def _check_settings(settings, path):
    """Raise ValueError for names and items of lists that a command line would read as other flags."""
    for name, value in settings.items():
        if not re.fullmatch(r"\w+", name) or name in HELP:
            raise ValueError(f"{path}: {shown(name)} is not a setting. Remove it.")
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:  # too long to be written as text
            raise ValueError(
                f"{path}: {name} has more than {MAX_DIGITS} digits, expected a smaller number. Correct it."
            )
        flags = [each for each in value if FLAG.match(str(each))] if isinstance(value, list) else []
        if flags:
            raise ValueError(
                f"{path}: {name} has {shorten(flags[0])}, which a command line reads as a flag. Write it differently."
            )


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """Return the command line of settings; None leaves a setting out."""
    arguments: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def parse_with_config(parser: Any, arguments: list[str] | None = None) -> Any:
    """Return the parsed command line, after the settings in the file that its --config names."""
    parsed = parser.parse_args(arguments)
    if parsed.config is None:
        return parsed
    program = parser.prog
    try:
        configured = as_arguments(read_config(parsed.config))
    except (OSError, ValueError) as error:
        parser.refuse(f"--config {error}")
    parser.prog = f"{program}: --config {parsed.config}"  # the beginning of an error
    found = parser.parse_args(configured)
    parser.prog = program
    return parser.parse_args(arguments, found)
