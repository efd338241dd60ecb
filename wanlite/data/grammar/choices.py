"""A key of numbers -> a stream of choices, the same on every platform and in every version of Python."""

import struct
from collections.abc import Iterator, Sequence
from hashlib import shake_128
from typing import TypeVar

BLOCK = struct.Struct("<64I")  # numbers of 32 bits that are hashed at once

Value = TypeVar("Value")


class Choices:
    """Choices that the key alone decides; a hash takes a twentieth of the time of numpy's SeedSequence."""

    def __init__(self, *key: int):
        self._key, self._block = key, 0
        self._numbers: Iterator[int] = iter(())

    def below(self, count: int) -> int:
        """Return a number of 0 .. count - 1."""
        number = next(self._numbers, None)
        if number is None:
            key = ",".join(map(str, (*self._key, self._block)))
            self._numbers = iter(BLOCK.unpack(shake_128(key.encode()).digest(BLOCK.size)))
            self._block += 1
            number = next(self._numbers)
        return number * count >> 32

    def pick(self, values: Sequence[Value]) -> Value:
        """Return one of the values, each with the same probability."""
        return values[self.below(len(values))]

    def happens(self, percent: int) -> bool:
        """Return True with this probability."""
        return self.below(100) < percent
