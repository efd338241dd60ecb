"""Settings as a frozen dataclass -> command line flags, help text and run.json; no torch, so that --help takes a blink."""

import argparse
import dataclasses
import types
import typing

from .launch import give_way


def setting(default, meaning, aliases=(), choices=None):
    """Declare one setting: its default and what it means, None included."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "aliases": aliases, "choices": choices})


def make_parser(settings_class, description, repeatable=()):
    """Return a parser with one flag a setting; booleans become --flag and --no-flag, lists take several values or, where
    `repeatable`, one value each time."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        meaning = field.metadata["meaning"] + ("" if default is None else f" (default: {default})")
        options = {"dest": field.name, "default": field.default, "help": meaning.replace("%", "%%")}
        names = [f"--{field.name}", *field.metadata["aliases"]]
        kind, item = _plain_type(hints[field.name])
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        elif kind is list:
            several = {"action": "append"} if field.name in repeatable else {"nargs": "+"}
            parser.add_argument(*names, type=item or str, **options, **several)
        else:
            parser.add_argument(*names, type=kind, choices=field.metadata["choices"], **options)
    return parser


def _plain_type(hint):
    """Return (T, None) for `T | None` and for T, and (list, T) for lists of T."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return typing.get_origin(hint) or hint, next(iter(typing.get_args(hint)), None)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message):
        give_way()
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")
