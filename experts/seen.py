"""Who reached this expert: a bounded memory of the identity headers of the latest requests."""

from __future__ import annotations

from collections import Counter, deque

OTHER = "other"
"""The key that counts the identities which found the table full."""


class Seen:
    """Counts, by `tier|subject`, the last `requests` requests under at most `keys` different keys and `OTHER`."""

    def __init__(self, requests: int = 100_000, keys: int = 1_000) -> None:
        self._requests = requests
        self._keys = keys
        self._latest: deque[str] = deque()
        self._counts: Counter[str] = Counter()
        # One string object a key, however often it comes: a record costs a pointer.
        self._names: dict[str, str] = {}

    def record(self, tier: str, subject: str) -> None:
        """Count one request; the oldest is forgotten once there are more than `requests`."""
        key = f"{tier}|{subject}"
        if key not in self._names and len(self._names) >= self._keys:
            key = OTHER
        key = self._names.setdefault(key, key)
        self._latest.append(key)
        self._counts[key] += 1
        if len(self._latest) > self._requests:
            self._forget(self._latest.popleft())

    def counts(self) -> dict[str, int]:
        """Requests by `tier|subject`, a copy."""
        return dict(self._counts)

    def _forget(self, key: str) -> None:
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key], self._names[key]
