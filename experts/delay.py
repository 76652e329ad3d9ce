"""How long an expert works on one request. Everything about service times lives here; all figures are seconds."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from random import Random


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any time between `low` and `high` seconds is as likely as any other; equal bounds make a fixed time."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (isfinite(self.high) and 0 <= self.low <= self.high):
            raise ValueError(f"delay must be 0 <= LO <= HI seconds, found `{self.low:g}:{self.high:g}`")

    def draw(self, random: Random) -> float:
        """The seconds that the next request takes."""
        return random.uniform(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Memoryless service of `mean` seconds: many short requests and a few long ones, as queueing theory likes it."""

    mean: float

    def __post_init__(self) -> None:
        if not (isfinite(self.mean) and self.mean > 0):
            raise ValueError(f"mean service time must be above 0 seconds, found `{self.mean:g}`")

    def draw(self, random: Random) -> float:
        """The seconds that the next request takes."""
        return random.expovariate(1 / self.mean)


Delay = Uniform | Exponential


def parse_delay(text: str) -> Uniform:
    """Read `LO:HI` or a single number, in seconds. Raises ValueError that says what was found."""
    low, colon, high = text.partition(":")
    return Uniform(_seconds(low, text), _seconds(high if colon else low, text))


def parse_service(text: str) -> Exponential:
    """Read `exponential:MEAN`, in seconds. Raises ValueError that says what was found."""
    kind, _, mean = text.partition(":")
    if kind != "exponential":
        raise ValueError(f"expected exponential:MEAN, found `{text}`")
    return Exponential(_seconds(mean, text))


def _seconds(number: str, whole: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(f"expected a number of seconds, found `{number}` in `{whole}`") from None
