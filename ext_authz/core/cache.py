"""A bounded cache of two generations. Eviction is approximately least recently used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class CacheCounts:
    """Usage counts of one kind of cache, across all epochs."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Cache(Generic[K, V]):
    """Holds entries with a total weight of at most `size`. Values are never None.

    A hit moves its entry to the young generation. When the young generation reaches half of `size`, it replaces the
    old one, which is evicted as a whole. So the most recently used half always stays. A hit in the young generation
    changes nothing: strict LRU order would cost more than everything else here.
    """

    __slots__ = ("_half", "_old", "_weight", "_young", "counts")

    def __init__(self, size: int, counts: CacheCounts | None = None) -> None:
        self._young: dict[K, tuple[V, int]] = {}
        self._old: dict[K, tuple[V, int]] = {}
        self._weight = 0  # of the young generation
        self._half = max(1, size // 2)
        self.counts = counts or CacheCounts()

    def get(self, key: K) -> V | None:
        """The value for `key`; None if it is not cached."""
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.get(key)
            if entry is None:
                self.counts.misses += 1
                return None
            self.put(key, *entry)
        self.counts.hits += 1
        return entry[0]

    def put(self, key: K, value: V, weight: int = 1) -> None:
        """Cache `value`. An ordinary entry has a `weight` of 1."""
        if key in self._young:
            self._weight -= self._young.pop(key)[1]
        else:
            self._old.pop(key, None)
        if self._young and self._weight + weight > self._half:
            self.counts.evictions += len(self._old)
            self._old, self._young, self._weight = self._young, {}, 0
        self._young[key] = value, weight
        self._weight += weight

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
