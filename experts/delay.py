"""How long an expert works on one request. Everything about service times is in this file; all values are seconds."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from random import Random


@dataclass(frozen=True, slots=True)
class Uniform:
    """A uniform distribution between `low` and `high` seconds. Equal bounds make it a fixed time."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (isfinite(self.high) and 0 <= self.low <= self.high):
            raise ValueError(f"delay must be 0 <= LO <= HI seconds, found `{self.low:g}:{self.high:g}`")

    def draw(self, random: Random) -> float:
        """The service time of the next request, in seconds."""
        return random.uniform(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Exponential:
    """An exponential distribution with a mean of `mean` seconds: many short requests and a few long ones."""

    mean: float

    def __post_init__(self) -> None:
        if not (isfinite(self.mean) and self.mean > 0):
            raise ValueError(f"mean service time must be above 0 seconds, found `{self.mean:g}`")

    def draw(self, random: Random) -> float:
        """The service time of the next request, in seconds."""
        return random.expovariate(1 / self.mean)


Delay = Uniform | Exponential


def parse_delay(text: str) -> Uniform:
    """Read `LO:HI` or a single number, in seconds. Raises a ValueError that says what was found."""
    low, colon, high = text.partition(":")
    return Uniform(_seconds(low, text), _seconds(high if colon else low, text))


def parse_service(text: str) -> Exponential:
    """Read `exponential:MEAN`, in seconds. Raises a ValueError that says what was found."""
    kind, _, mean = text.partition(":")
    if kind != "exponential":
        raise ValueError(f"expected exponential:MEAN, found `{text}`")
    return Exponential(_seconds(mean, text))


def _seconds(number: str, whole: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(f"expected a number of seconds, found `{number}` in `{whole}`") from None
