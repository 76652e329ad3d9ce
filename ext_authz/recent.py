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
    """At most `size` values by their keys, least recently used last to stay. A value is never None."""

    __slots__ = ("_items", "size", "uses")

    def __init__(self, size: int, uses: Uses | None = None) -> None:
        self._items: OrderedDict[K, V] = OrderedDict()
        self.size = size
        self.uses = uses or Uses()

    def get(self, key: K) -> V | None:
        """What is remembered under `key`, if anything is."""
        value = self._items.get(key)
        if value is None:
            self.uses.misses += 1
            return None
        self._items.move_to_end(key)
        self.uses.hits += 1
        return value

    def __setitem__(self, key: K, value: V) -> None:
        items = self._items
        items[key] = value
        items.move_to_end(key)
        if len(items) > self.size:
            items.popitem(last=False)
            self.uses.evictions += 1

    def __len__(self) -> int:
        return len(self._items)
