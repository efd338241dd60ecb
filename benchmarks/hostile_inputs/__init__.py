"""The hostile inputs of hostile.py: a file for each class."""

from collections.abc import Sequence
from itertools import islice

from benchmarks.hostile_inputs.caches import damaged_caches
from benchmarks.hostile_inputs.changes import changing_files
from benchmarks.hostile_inputs.characters import control_characters
from benchmarks.hostile_inputs.code import foreign_code
from benchmarks.hostile_inputs.links import links_out
from benchmarks.hostile_inputs.paths import private_paths
from benchmarks.hostile_inputs.reads import endless_reads
from benchmarks.hostile_inputs.settings import other_images
from benchmarks.hostile_inputs.sizes import false_sizes
from benchmarks.hostile_inputs.streams import closed_streams
from benchmarks.hostile_inputs.trial import Input
from benchmarks.hostile_inputs.values import other_types


def inputs(seed: int = 0) -> list[Input]:
    """Return all inputs; `seed` chooses the changed values among those of other types."""
    classes = (
        damaged_caches,
        links_out,
        endless_reads,
        changing_files,
        foreign_code,
        false_sizes,
        lambda: other_types(seed),
        other_images,
        control_characters,
        closed_streams,
        private_paths,
    )
    return [each for make in classes for each in make()]


def select(found: Sequence[Input], only: str | None, most: int | None) -> list[Input]:
    """Return the inputs whose class or name contains `only`, at most `most` of each class."""
    matching = [each for each in found if only is None or only in each.kind or only in each.name]
    classes = dict.fromkeys(each.kind for each in matching)
    return [each for kind in classes for each in islice((one for one in matching if one.kind == kind), most)]
