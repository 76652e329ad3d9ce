"""Which callers reached this expert: bounded counts of the identity headers of the latest requests."""

from __future__ import annotations

from collections import Counter, deque

OTHER = "other"
"""The key for identities that arrive while the table is full."""


class Seen:
    """Counts the last `requests` requests by `tier|subject`, under at most `keys` different keys and `OTHER`."""

    def __init__(self, requests: int = 100_000, keys: int = 1_000) -> None:
        self._requests = requests
        self._keys = keys
        self._latest: deque[str] = deque()
        self._counts: Counter[str] = Counter()
        # One string object per key, so that each recorded request costs only a pointer.
        self._names: dict[str, str] = {}

    def record(self, tier: str, subject: str) -> None:
        """Count one request. Drops the oldest if there are more than `requests`."""
        key = f"{tier}|{subject}"
        if key not in self._names and len(self._names) >= self._keys:
            key = OTHER
        key = self._names.setdefault(key, key)
        self._latest.append(key)
        self._counts[key] += 1
        if len(self._latest) > self._requests:
            self._drop(self._latest.popleft())

    def counts(self) -> dict[str, int]:
        """A copy of the counts by `tier|subject`."""
        return dict(self._counts)

    def _drop(self, key: str) -> None:
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key], self._names[key]
