"""A bounded memory: when it is full, what was not asked for lately is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Uses:
    """How memories of one kind were used, through all epochs."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Recent(Generic[K, V]):
    """At most `size` values by their keys, fewer if some are large. Never None.

    They live in two generations, and what is used comes into the young one. When that is half of `size`, it becomes the
    old one, and the old one is forgotten. So the latest half always stays, and to find what is in use changes nothing:
    an order of use would cost more than all else here.
    """

    __slots__ = ("_filled", "_half", "_old", "_young", "uses")

    def __init__(self, size: int, uses: Uses | None = None) -> None:
        self._young: dict[K, tuple[V, int]] = {}
        self._old: dict[K, tuple[V, int]] = {}
        self._filled = 0  # of the young one
        self._half = max(1, size // 2)
        self.uses = uses or Uses()

    def get(self, key: K) -> V | None:
        """What is remembered under `key`, if anything is."""
        item = self._young.get(key)
        if item is None:
            item = self._old.get(key)
            if item is None:
                self.uses.misses += 1
                return None
            self.keep(key, *item)
        self.uses.hits += 1
        return item[0]

    def __setitem__(self, key: K, value: V) -> None:
        self.keep(key, value)

    def keep(self, key: K, value: V, places: int = 1) -> None:
        """Remember `value`; it takes as much room as that many ordinary ones."""
        if key in self._young:
            self._filled -= self._young.pop(key)[1]
        else:
            self._old.pop(key, None)
        if self._young and self._filled + places > self._half:
            self.uses.evictions += len(self._old)
            self._old, self._young, self._filled = self._young, {}, 0
        self._young[key] = value, places
        self._filled += places

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
