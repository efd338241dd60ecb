"""A frozen dataclass of settings -> command line flags and help texts; torch is not imported."""

import argparse
import copy
import dataclasses
import math
import operator
import os
import re
import sys
import types
import typing
from contextlib import suppress
from difflib import get_close_matches

from ..runtime.launch import defer_to_rank_zero
from ..runtime.terminal import error_line, one_line

MOST = 10**9  # of any whole number: beyond it, lists of steps and prompts fit no memory
BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def setting(
    default, meaning, aliases=(), choices=None, is_path=False, group=None, was=None, brief=None, **bounds
):
    """Declare one setting: its default and the help text of its flag.

    --help lists the settings with `brief`, which is a shorter text or True for the same; --help_all lists all.
    `group` is the heading in --help_all of this setting and of those below it. `was` is a former name of the
    flag, or that of other trainers: it is refused with the new name as a suggestion. A leading `~` of a path is
    expanded. `bounds` are named as in BOUNDS.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "meaning": meaning,
            "brief": brief,
            "aliases": aliases,
            "choices": choices,
            "is_path": is_path,
            "group": group,
            "was": was,
            "bounds": bounds,
        },
    )


def check_device(name):
    """Raise ValueError for a --device that no machine has."""
    if name is not None and not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError(f"--device {one_line(name, 40)} is unknown, expected cpu, cuda, cuda:N or mps.")


def check_bounds(settings):
    """Raise ValueError for the first number that is not finite or out of the bounds of its setting."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            bounds = _bounds_of(number, field.metadata["bounds"])
            if isinstance(number, (int, float)) and not _is_within(number, bounds):
                limits = [f"{BOUNDS[name][0]} {bound:,}" for name, bound in bounds.items()]
                expected = " and ".join(limits) or "a finite number"
                raise ValueError(f"--{field.name} is {one_line(str(number), 40)}, expected {expected}.")


def _bounds_of(number, bounds):
    """Return the bounds of a number; a whole one without an upper bound of its own is at most MOST."""
    has_upper = bounds.keys() & {"most", "below"} or not isinstance(number, int)
    return bounds if has_upper or number <= MOST else bounds | {"most": MOST}


def _is_within(number, bounds):
    is_finite = -math.inf < number < math.inf  # isfinite() fails for a whole number that no float holds
    return is_finite and all(BOUNDS[name][1](number, bound) for name, bound in bounds.items())


def make_parser(settings_class, description, repeatable=()):
    """Return a parser with a flag for each setting.

    Booleans become --flag and --no-flag. A list takes several values; the flag of a `repeatable` one takes one
    value, and can be repeated.
    """
    parser = OneLineParser(
        description=description, formatter_class=WideHelpFormatter, usage="%(prog)s [options]", add_help=False
    )
    _add_help(parser, settings_class)
    hints = typing.get_type_hints(settings_class)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(settings_class):
        if heading := field.metadata["group"]:
            group = parser.add_argument_group(heading)
        names = [f"--{field.name}", *field.metadata["aliases"]]
        group.add_argument(*names, **_argument(field, hints[field.name], field.name in repeatable))
        if was := field.metadata["was"]:
            parser.renamed[f"--{was}"] = names[0]
        if field.name in repeatable:
            parser.repeatable.append(names[0])
    return parser


def _argument(field, hint, is_repeatable):
    """Return the keyword arguments of add_argument() for a setting."""
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


def _add_help(parser, settings_class):
    """Add --help, which lists the settings with a brief text if there are any, and --help_all."""
    briefs = {
        field.name: _help(field, brief if isinstance(brief, str) else None)
        for field in dataclasses.fields(settings_class)
        if (brief := field.metadata["brief"])
    }
    parser.add_argument("-h", "--help", action=BriefHelp, briefs=briefs, help="print this list")
    parser.add_argument("--help_all", dest=argparse.SUPPRESS, action="help", help="print all settings")


def _help(field, text=None):
    """Return the help text of a setting, or `text`, with its default unless that is None, off or empty."""
    text, default = text or field.metadata["meaning"], field.default
    if not (default is None or default is False or default == ""):
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {'on' if default is True else default})"
    return text.replace("%", "%%")


def _plain_type(hint):
    """Return (T, None) for T and `T | None`, and (list, T) for a list of T."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return typing.get_origin(hint) or hint, next(iter(typing.get_args(hint)), None)


def _path(text):
    """Expand `~` and `~user`, which a shell does not expand after a `=`."""
    path = os.path.expanduser(_utf8(text))
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{text}: no user {text.partition(os.sep)[0][1:] or 'with a home folder'} exists. "
            f"Write the path without ~, or as ./{text} if that is its name."
        )
    return path


def _text(text):
    """Decode text that is not a path as UTF-8; in an ASCII locale, Python escapes its bytes as surrogates."""
    with suppress(UnicodeError):
        return text.encode("utf-8", "surrogateescape").decode()
    return _utf8(text)


def _utf8(text):
    """Return the text; raises an error for bytes that are not UTF-8, since nothing could write them again."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"{ascii(text[:80])} is not UTF-8 text (character {error.start + 1}). Type it again in "
            "a terminal that uses UTF-8."
        ) from None
    return text


METAVARS = {int: "N", float: "X", _path: "PATH", _text: "TEXT"}


class WideHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the description, and put most help texts beside their flags."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)


class BriefHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leave most of a line to the help texts."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26)


class BriefHelp(argparse.Action):
    """Prints the help of the settings in `briefs`, {setting: its help text}, or of all if that is empty."""

    def __init__(self, option_strings, dest, briefs, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.briefs = briefs

    def __call__(self, parser, namespace, values, option_string=None):
        formatter = BriefHelpFormatter(parser.prog)
        formatter.add_usage(parser.usage, (), ())
        formatter.add_text(parser.description)
        for action in parser._actions:
            if not self.briefs or action.dest in self.briefs or action.dest == argparse.SUPPRESS:
                formatter.add_argument(self._shortened(action))
        parser._print_message(formatter.format_help(), sys.stdout)
        parser.exit()

    def _shortened(self, action):
        short = copy.copy(action)
        if action.dest in self.briefs:
            short.help, short.option_strings = self.briefs[action.dest], action.option_strings[:1]
        return short


class OneLineParser(argparse.ArgumentParser):
    """A parser without abbreviated flags; an error is one line, with exit code 2.

    error() is for flags that cannot be parsed, refuse() for their values.

    `renamed` is {former flag: new flag}; flags in `repeatable` take one value, and can be repeated.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.renamed = {}
        self.repeatable = []

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = "" if unknown[0].startswith("-") else self._hint_at_quotes()
            self.error(f"unrecognized arguments: {' '.join(map(self._with_suggestion, unknown))}{hint}")
        return namespace

    def _hint_at_quotes(self):
        """Return advice for a value without a flag, as the second word of a text without quotes."""
        repeat = "".join(f", and {flag} can be repeated" for flag in self.repeatable)
        return f"; a value with spaces needs quotes{repeat}"

    def _with_suggestion(self, argument):
        suggestions = self._suggest(argument.partition("=")[0]) if argument.startswith("-") else []
        return f"{argument} (did you mean {' or '.join(suggestions)}?)" if suggestions else argument

    def _suggest(self, flag):
        """Return the new name of a former flag, or up to three flags that complete it or are similar."""
        if flag in self.renamed:
            return [self.renamed[flag]]
        flags = list(self._option_string_actions)
        completions = [each for each in flags if len(flag) > 2 and each.startswith(flag)]
        return (completions or get_close_matches(flag, flags))[:3]

    def error(self, message):
        self.refuse(f"{message} (--help_all lists every flag)")

    def refuse(self, *messages):
        """Print each of the messages as a line, and end."""
        defer_to_rank_zero()
        lines = [f"{self.prog}: {messages[0]}", *messages[1:]]
        self.exit(2, "".join(f"{error_line(line)}\n" for line in lines))
