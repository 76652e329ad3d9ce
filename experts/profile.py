"""The properties of a sample expert: its name, its speed, and how many requests it accepts at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from experts.delay import Delay, Uniform

_TOKEN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TYPICAL_DELAY = Uniform(0.1, 0.5)


@dataclass(frozen=True, slots=True)
class Profile:
    """One expert. It serves `concurrency` requests at once, `queue` more may wait, and the rest are refused.

    `fail_rate` is the probability (0 to 1) that a request which got a slot is answered with 503.
    `security_level` is only shown at `/load`: the proxy enforces it, not the expert.
    Raises ValueError for values that no expert can have.
    """

    name: str
    security_level: str = "low"
    delay: Delay = _TYPICAL_DELAY
    concurrency: int = 8
    queue: int = 64
    fail_rate: float = 0.0

    def __post_init__(self) -> None:
        # The name becomes a header value, so it must not contain anything that could end the header.
        for what, text in (("name", self.name), ("security level", self.security_level)):
            if not _TOKEN.fullmatch(text):
                raise ValueError(f"{what} must be 1 to 64 of A-Z a-z 0-9 . _ -, found `{text}`")
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, found `{self.concurrency}`")
        if self.queue < 0:
            raise ValueError(f"queue must be at least 0, found `{self.queue}`")
        if not 0 <= self.fail_rate <= 1:
            raise ValueError(f"fail rate must be between 0 and 1, found `{self.fail_rate}`")
