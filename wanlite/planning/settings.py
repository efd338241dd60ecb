"""Settings as a frozen dataclass -> command line flags, help text and run.json; no torch, so that --help
takes a blink.
"""

import argparse
import dataclasses
import math
import operator
import os
import types
import typing
from contextlib import suppress

from ..runtime.launch import defer_to_rank_zero

BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(default, meaning, aliases=(), choices=None, is_path=False, **bounds):
    """Declare one setting: its default, what it means, None included, and as `bounds`, called as in BOUNDS,
    what it may be.

    A `~` at the beginning of a path is expanded.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "meaning": meaning,
            "aliases": aliases,
            "choices": choices,
            "bounds": bounds,
            "is_path": is_path,
        },
    )


def check_bounds(settings):
    """Raise ValueError for the first number that is out of the bounds of its setting, or not finite."""
    for field in dataclasses.fields(settings):
        found, bounds = getattr(settings, field.name), field.metadata["bounds"]
        for number in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(number, (int, float)) and not (
                math.isfinite(number)
                and all(BOUNDS[name][1](number, bound) for name, bound in bounds.items())
            ):
                told = (
                    " and ".join(f"{BOUNDS[name][0]} {bound:,}" for name, bound in bounds.items())
                    or "a finite number"
                )
                raise ValueError(f"--{field.name} is {number}, expected {told}.")


def make_parser(settings_class, description, repeatable=()):
    """Return a parser with one flag a setting; booleans become --flag and --no-flag, lists take several
    values or, where `repeatable`, one value each time."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        meaning = field.metadata["meaning"] + ("" if default is None else f" (default: {default})")
        options = {"dest": field.name, "default": field.default, "help": meaning.replace("%", "%%")}
        names = [f"--{field.name}", *field.metadata["aliases"]]
        kind, item = _plain_type(hints[field.name])
        text = _path if field.metadata["is_path"] else _text
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        elif kind is list:
            several = {"action": "append"} if field.name in repeatable else {"nargs": "+"}
            parser.add_argument(*names, type=item if item in (int, float) else text, **options, **several)
        else:
            parser.add_argument(
                *names, type=text if kind is str else kind, choices=field.metadata["choices"], **options
            )
    return parser


def _plain_type(hint):
    """Return (T, None) for `T | None` and for T, and (list, T) for lists of T."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return typing.get_origin(hint) or hint, next(iter(typing.get_args(hint)), None)


def _path(typed):
    """Expand `~` and `~user`: a shell does not where the path follows a `=`."""
    path = os.path.expanduser(_utf8(typed))
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{typed}: there is no user {typed.partition(os.sep)[0][1:] or 'with a home folder'}. "
            f"Write the path without ~, or as ./{typed} where that is its name."
        )
    return path


def _text(typed):
    """Read the bytes of text that is no path as UTF-8, also where the locale is ASCII and Python has kept
    them apart.
    """
    with suppress(UnicodeError):
        return typed.encode("utf-8", "surrogateescape").decode()
    return _utf8(typed)


def _utf8(typed):
    """Refuse bytes that are not UTF-8, which Python turns into characters that cannot be written or encoded
    again.
    """
    try:
        typed.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"{ascii(typed[:80])} is not UTF-8 text (character {error.start + 1}). Type it again in "
            "a terminal that uses UTF-8."
        ) from None
    return typed


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message):
        defer_to_rank_zero()
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")
