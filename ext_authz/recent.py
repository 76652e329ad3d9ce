"""A bounded memory: when it is full, what was not asked for longest is forgotten."""

from __future__ import annotations

from collections import OrderedDict
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
    """At most `size` values by their keys, fewer if some are large; least recently used goes first. Never None."""

    __slots__ = ("_filled", "_items", "size", "uses")

    def __init__(self, size: int, uses: Uses | None = None) -> None:
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._filled = 0
        self.size = size
        self.uses = uses or Uses()

    def get(self, key: K) -> V | None:
        """What is remembered under `key`, if anything is."""
        item = self._items.get(key)
        if item is None:
            self.uses.misses += 1
            return None
        self._items.move_to_end(key)
        self.uses.hits += 1
        return item[0]

    def __setitem__(self, key: K, value: V) -> None:
        self.keep(key, value)

    def keep(self, key: K, value: V, places: int = 1) -> None:
        """Remember `value`; it takes as much room as that many ordinary ones."""
        items = self._items
        if key in items:
            self._filled -= items.pop(key)[1]
        items[key] = value, places
        self._filled += places
        while self._filled > self.size:
            self._filled -= items.popitem(last=False)[1][1]
            self.uses.evictions += 1

    def __len__(self) -> int:
        return len(self._items)
