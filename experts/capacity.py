"""The slots of an expert, and the bounded queue in front of them. Knows nothing about HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Capacity:
    """At most `concurrency` holders at a time and `queue` waiters, first come, first served.

    `in_flight` and `queued` are the current number of each.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self.in_flight = 0
        self.queued = 0
        self._queue = queue
        self._slots = asyncio.Semaphore(concurrency)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[bool]:
        """Wait for a slot and hold it for the block. Yields False at once if the queue is full."""
        # `locked()` is also true while a freed slot is being handed to a waiter, so no request overtakes the queue.
        if self._slots.locked() and self.queued >= self._queue:
            yield False
            return
        self.queued += 1
        try:
            await self._slots.acquire()
        finally:
            self.queued -= 1
        self.in_flight += 1
        try:
            yield True
        finally:
            self.in_flight -= 1
            self._slots.release()
