"""Names of tensors as they are stored -> names without wrappers -> diffusers' names."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from .names import (
    DIFFUSERS_TRANSFORMER,
    FP8_MARKS,
    FP8_SCALES,
    LANDMARKS,
    OTHER_NETWORKS,
    TRANSFORMER_NAMES,
    WRAPPERS,
)

T = TypeVar("T")
_LANDMARKS = [(re.compile(rf"^(|.*\.){re.escape(first)}$"), last) for first, last in LANDMARKS]


def strip_wrappers(names: Iterable[str], source: object) -> dict[str, str]:
    """Return {stored name: name} of a network's tensors, without the prefix of all and the infixes of some.

    A prefix is the text before two tensors that each Wan transformer, autoencoder or UMT5 has. Raises
    ValueError, naming the `source`, for several prefixes: it is ambiguous which network is meant.
    """
    bare = {name: WRAPPERS.sub("", name) for name in names}
    prefixes = _find_prefixes(set(bare.values()))
    if len(prefixes) > 1:
        raise ValueError(
            f"{source}: holds {len(prefixes)} networks, under {', '.join(map(repr, sorted(prefixes)[:3]))}, "
            "expected one. Keep each in a file of its own."
        )
    prefix = next(iter(prefixes), "")
    found: dict[str, str] = {}
    for name, short in bare.items():
        short = short.removeprefix(prefix)
        if (other := found.setdefault(short, name)) != name:
            raise ValueError(f"{source}: holds {short} twice, as {other} and as {name}. Keep one of them.")
    return {name: short for short, name in found.items()}


def _find_prefixes(names: set[str]) -> set[str]:
    """Return the prefixes under which a network lies, by the first pair of landmarks that is present."""
    for first, last in _LANDMARKS:
        if found := {match[1] for name in names if (match := first.match(name)) and match[1] + last in names}:
            return found
    return set()


def names_inside_wrapper(names: Iterable[str]) -> set[str] | None:
    """Return a wrapped network's names inside the wrapper; None if no single wrapper explains them."""
    names = set(names)
    try:
        inside = set(strip_wrappers(names, "weights").values())
    except ValueError:
        return None
    return inside if inside != names else None


def is_weight(name: str) -> bool:
    """Whether a tensor is part of a network, not a scale or a mark of scaled fp8."""
    return name.rpartition(".")[2] not in (*FP8_SCALES, *FP8_MARKS)


def is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in FP8_SCALES


def scaled_weight(name: str) -> str:
    """Return the name of the weight that a scale belongs to."""
    return f"{name.rpartition('.')[0]}.weight"


def diffusers_name(name: str) -> str:
    """Return diffusers' name for a transformer's tensor of either dialect.

    Raises ValueError for a name that does not occur in a text-to-video Wan.
    """
    for pattern, template in TRANSFORMER_NAMES:
        if pattern.match(name):
            return pattern.sub(template, name)
    if DIFFUSERS_TRANSFORMER.match(name):
        return name
    other = next((other for pattern, other in OTHER_NETWORKS if pattern.search(name)), "an unknown network")
    raise ValueError(
        f"tensor {name!r} does not belong to a text-to-video Wan transformer, by the official or by diffusers' "
        f"names (it belongs to {other}). Choose a text-to-video Wan."
    )


def official_name(name: str) -> str:
    """Return Wan's own name for a transformer's tensor of diffusers' name: diffusers_name(), reversed.

    Raises ValueError for a name that does not occur in a text-to-video Wan.
    """
    for pattern, template in _OFFICIAL_NAMES:
        if match := pattern.match(name):
            return match.expand(template)
    raise ValueError(
        f"tensor {name!r} does not belong to a text-to-video Wan transformer, by diffusers' names."
    )


def _reverse(pattern: re.Pattern[str], template: str) -> tuple[re.Pattern[str], str]:
    """Swap the sides of a row of TRANSFORMER_NAMES; its groups keep their numbers."""
    groups = re.findall(r"\([^)]*\)", pattern.pattern)
    official = pattern.pattern.strip("^$").replace(r"\.", ".")
    reversed_pattern = re.escape(template)
    for number, group in enumerate(groups, start=1):
        official = official.replace(group, rf"\{number}", 1)
        reversed_pattern = reversed_pattern.replace(rf"\\{number}", group)
    return re.compile(f"^{reversed_pattern}$"), official


_OFFICIAL_NAMES = [_reverse(pattern, template) for pattern, template in TRANSFORMER_NAMES]


def rename(tensors: Mapping[str, T], table: Iterable[tuple[re.Pattern[str], str]]) -> dict[str, T]:
    """Return tensors under the names that a table of names.py gives them."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    return renamed
