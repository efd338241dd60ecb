"""A frozen dataclass of settings -> command line flags and help texts, without torch, so that --help is quick."""

import argparse
import dataclasses
import math
import operator
import os
import types
import typing
from contextlib import suppress
from difflib import get_close_matches

from ..runtime.launch import defer_to_rank_zero

BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(default, meaning, aliases=(), choices=None, is_path=False, group=None, was=None, **bounds):
    """Declare one setting: its default and the help text of its flag.

    `group` is the heading in --help of this setting and of those below it. `was` is a former name of the
    flag, which is not accepted but leads to a suggestion. In a path, a `~` at the beginning is expanded.
    `bounds` are named as in BOUNDS.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "meaning": meaning,
            "aliases": aliases,
            "choices": choices,
            "is_path": is_path,
            "group": group,
            "was": was,
            "bounds": bounds,
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
    """Return a parser with a flag for each setting.

    Booleans become --flag and --no-flag. Lists take several values or, if `repeatable`, one value each time.
    """
    parser = OneLineParser(
        description=description, formatter_class=WideHelpFormatter, usage="%(prog)s [options]"
    )
    hints = typing.get_type_hints(settings_class)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(settings_class):
        if heading := field.metadata["group"]:
            group = parser.add_argument_group(heading)
        names = [f"--{field.name}", *field.metadata["aliases"]]
        group.add_argument(*names, **_argument(field, hints[field.name], field.name in repeatable))
        if was := field.metadata["was"]:
            parser.renamed[f"--{was}"] = names[0]
    return parser


def _argument(field, hint, is_repeatable):
    """Return the keywords of add_argument() for a setting."""
    options = {"dest": field.name, "default": field.default, "help": _help(field)}
    kind, item = _plain_type(hint)
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if kind is list:
        options |= {"action": "append"} if is_repeatable else {"nargs": "+"}
        kind = item
    if kind not in (int, float):
        kind = _path if field.metadata["is_path"] else _text
    choices = field.metadata["choices"]
    return options | {"type": kind, "choices": choices, "metavar": None if choices else METAVARS[kind]}


def _help(field):
    """Return the help text of a setting, with its default unless that is off, empty or explained by the text."""
    text, default = field.metadata["meaning"], field.default
    if not (default is None or default is False or default == ""):
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {'on' if default is True else default})"
    return text.replace("%", "%%")


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


METAVARS = {int: "N", float: "X", _path: "PATH", _text: "TEXT"}


class WideHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the description, and put most help texts beside their flags."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)


class OneLineParser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line and exit code 2.

    `renamed` maps former flags to their names of today.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.renamed = {}

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(map(self._with_suggestion, unknown))}")
        return namespace

    def _with_suggestion(self, word):
        suggestions = self._suggest(word.partition("=")[0]) if word.startswith("-") else []
        return f"{word} (did you mean {' or '.join(suggestions)}?)" if suggestions else word

    def _suggest(self, flag):
        """Return up to three flags: today's name of a former flag, else completions, else similar ones."""
        if flag in self.renamed:
            return [self.renamed[flag]]
        flags = list(self._option_string_actions)
        completions = [each for each in flags if len(flag) > 2 and each.startswith(flag)]
        return (completions or get_close_matches(flag, flags))[:3]

    def error(self, message):
        defer_to_rank_zero()
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")
