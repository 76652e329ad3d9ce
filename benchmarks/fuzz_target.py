"""The form of what is fuzzed."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from random import Random
from typing import Protocol

_VARIABLE = re.compile(r"`[^`]*`|'[^']*'|\"[^\"]*\"|[0-9a-f]{6,}|\d+|\([^)]*\)")


class WrongAnswerError(Exception):
    """An answer that must not be given; the text says why."""


class Target(Protocol):
    """A reader of bytes. `spent` is the processor time of its longest answer to the last case, in seconds."""

    seeds: Sequence[bytes]
    spent: float

    def mutate(self, random: Random, case: bytes, other: bytes) -> bytes:
        """A new case, from one and pieces of another."""

    async def run(self, case: bytes) -> str:
        """What came of a case, in a few words. Raises for what must never come of one."""

    def forget(self) -> None:
        """Empty the caches, so that the next case costs what it costs at first."""


class Timed:
    """Takes the time of each answer: that of the thread, as others may be busy on the machine."""

    seeds: Sequence[bytes] = ()

    def __init__(self) -> None:
        self.spent = 0.0

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self.spent = max(self.spent, time.thread_time() - self._began)

    def forget(self) -> None:
        """Nothing is kept."""


def in_short(message: str) -> str:
    """A message without what differs from case to case."""
    return _VARIABLE.sub("_", message)
