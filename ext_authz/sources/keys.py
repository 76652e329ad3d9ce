"""The keys of every issuer, refreshed in the background. A request waits for them only if a key it needs is missing.

Good keys survive any failure to get new ones, as long as the policy names their source: to stop trusting an issuer,
remove it from the policy. `KeyStore.keys` is replaced as a whole, never changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import MappingProxyType

import aiohttp

from ext_authz.core.jwk import Key, KeySet, parse_jwks, secret_key
from ext_authz.core.jwks_url import shown
from ext_authz.core.policy import Issuer, JwksSource
from ext_authz.sources.http import session_for
from ext_authz.sources.key_source import SourceError, fetch, read_file
from ext_authz.sources.watched import WatchedFile

log = logging.getLogger("srp.keys")


@dataclass(frozen=True, slots=True)
class Pace:
    """Timeouts and intervals, all in seconds. `first_wait` bounds `follow`, `refresh_wait` bounds `refresh`.

    `refresh_apart` is the minimum time between two fetches that unknown key ids cause, for each issuer.
    """

    fetch_timeout: float = 5.0
    first_wait: float = 3.0
    refresh_wait: float = 3.0
    refresh_apart: float = 10.0
    max_backoff: float = 60.0
    log_apart: float = 60.0


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """One issuer's keys: how many, `age` in seconds since the last successful read (None: never), and the last error.

    `fetches` counts attempts to read them, from URL or file; `failures` those that failed.
    """

    issuer: str
    keys: int
    age: float | None
    last_error: str | None
    fetches: int
    failures: int
    skipped: tuple[str, ...] = ()


class KeyStore:
    """Follows the issuers of the policy. `on_change` is called, on the loop, after each change of `keys`.

    Use from one event loop, and close it there.
    """

    def __init__(
        self,
        on_change: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pace: Pace = Pace(),
    ) -> None:
        self.on_change = on_change
        self._clock = clock
        self._pace = pace
        self._keys: Mapping[str, tuple[Key, ...]] = MappingProxyType({})
        self._version = 0
        self._followed: dict[str, _Followed] = {}
        self._session: aiohttp.ClientSession | None = None
        self._lock = asyncio.Lock()

    @property
    def keys(self) -> Mapping[str, tuple[Key, ...]]:
        """Issuer → its keys. An issuer whose keys were never loaded is absent."""
        return self._keys

    @property
    def version(self) -> int:
        """Grows by one with each change of `keys`."""
        return self._version

    async def follow(self, issuers: Iterable[Issuer]) -> None:
        """Follow `issuers` and no others; wait for the first attempt at each new source, at most `first_wait`.

        An issuer whose file or URL is unchanged keeps its keys. Slow sources are loaded later, in the background.
        """
        async with self._lock:
            followed = {i.issuer: self._follow(i) for i in issuers}
            new = [f for name, f in followed.items() if f is not self._followed.get(name)]
            try:
                for one in new:
                    one.start()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pace.first_wait):
                        for one in new:
                            await one.tried.wait()
            except asyncio.CancelledError:
                await _stop(new)
                raise
            gone = [f for name, f in self._followed.items() if f is not followed.get(name)]
            self._followed = followed
            try:
                self._publish()
            finally:
                await _stop(gone)

    async def refresh(self, issuer: str) -> bool:
        """Look for newer keys of `issuer`, because a `kid` is unknown; whether they changed. The wait is bounded.

        Callers share one fetch. Soon after the last one, it returns at once: unknown ids cost the issuer little.
        """
        followed = self._followed.get(issuer)
        if followed is None:
            return False
        before = self._keys.get(issuer)
        await followed.refresh()
        return self._keys.get(issuer) is not before

    def status(self) -> tuple[KeyStatus, ...]:
        """The status of each followed issuer, in the policy's order."""
        return tuple(f.status for f in self._followed.values())

    async def close(self) -> None:
        """End every task and connection. `keys` does not change: requests in flight still need it."""
        async with self._lock:
            gone, self._followed = list(self._followed.values()), {}
            await _stop(gone)
            if self._session is not None:
                await self._session.close()
                self._session = None

    def _follow(self, issuer: Issuer) -> _Followed:
        old = self._followed.get(issuer.issuer)
        if old is not None and old.serves(issuer):
            return old
        if self._session is None:
            self._session = session_for(self._pace.fetch_timeout)
        return _Followed(issuer, self._session, self._publish, self._clock, self._pace, old)

    def _publish(self) -> None:
        keys = {name: f.keys for name, f in self._followed.items() if f.keys is not None}
        if keys != self._keys:
            self._keys = MappingProxyType(keys)
            self._version += 1
            self.on_change()


@dataclass(slots=True)
class _Record:
    """What is known about one place that keys come from. Survives a change in how the place is read."""

    keys: KeySet | None = None
    digest: bytes = b""
    loaded_at: float | None = None
    next_refresh: float = -inf
    fetches: int = 0
    failures: int = 0
    failed_in_row: int = 0
    error: str | None = None
    logged_at: float = -inf


class _Followed:
    """One issuer: its keys and the task that keeps them fresh. At most one attempt to read them runs at a time."""

    def __init__(
        self,
        issuer: Issuer,
        session: aiohttp.ClientSession,
        changed: Callable[[], None],
        clock: Callable[[], float],
        pace: Pace,
        old: _Followed | None,
    ) -> None:
        self._session, self._changed, self._clock, self._pace = session, changed, clock, pace
        self._name, self._secret_file, self._jwks = issuer.issuer, issuer.secret_file, issuer.jwks or JwksSource()
        self._file = Path(file) if (file := self._secret_file or self._jwks.file) is not None else None
        self._place = self._secret_file or self._jwks.file or shown(self._jwks.url or "")
        self._record: _Record = old._record if old is not None and old._origin == self._origin else _Record()
        self._background: asyncio.Task[None] | None = None
        self._attempt: asyncio.Task[None] | None = None
        self.tried = asyncio.Event()

    @property
    def keys(self) -> tuple[Key, ...] | None:
        """The issuer's keys, perhaps none; None if none were ever loaded."""
        return None if self._record.keys is None else self._record.keys.keys

    @property
    def status(self) -> KeyStatus:
        record = self._record
        age = None if record.loaded_at is None else self._clock() - record.loaded_at
        found = record.keys or KeySet(())
        return KeyStatus(
            self._name, len(found.keys), age, record.error, record.fetches, record.failures, found.skipped
        )  # fmt: skip

    @property
    def _origin(self) -> tuple[str | None, ...]:
        return self._secret_file, self._jwks.file, self._jwks.url

    def serves(self, issuer: Issuer) -> bool:
        """Whether it reads keys from the place, and in the way, that `issuer` says."""
        return (self._secret_file, self._jwks) == (issuer.secret_file, issuer.jwks or JwksSource())

    def start(self) -> None:
        self._background = asyncio.create_task(self._keep_fresh())

    def cancel(self) -> list[asyncio.Task[None]]:
        """Cancel its tasks; the caller awaits them."""
        tasks = [t for t in (self._background, self._attempt) if t is not None]
        for task in tasks:
            task.cancel()
        return tasks

    async def refresh(self) -> None:
        """Join the attempt in flight, or start one if the last one that started here is long enough ago."""
        if self._attempt is None or self._attempt.done():
            if self._clock() < self._record.next_refresh:
                return
            self._record.next_refresh = self._clock() + self._pace.refresh_apart
        await self._load(self._pace.refresh_wait)

    async def _keep_fresh(self) -> None:
        await self._load()
        if self._file is not None:
            async for _ in WatchedFile(self._file).changes():
                await self._load()
        while True:
            await asyncio.sleep(self._delay())
            await self._load()

    def _delay(self) -> float:
        """Seconds until the next attempt: jitter spreads out many replicas; after failures, exponential backoff."""
        jitter = random.uniform(0.8, 1.0)  # noqa: S311 - spreads load, is no secret
        if self._record.failed_in_row:
            backoff = 2.0 ** min(self._record.failed_in_row, 16)
            return min(self._jwks.refresh, self._pace.max_backoff, backoff) * jitter
        return self._jwks.refresh * jitter

    async def _load(self, wait: float | None = None) -> None:
        """One attempt, shared by all concurrent callers. A caller that gives up or is cancelled does not end it."""
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._try())
        await asyncio.wait({self._attempt}, timeout=wait)

    async def _try(self) -> None:
        self._record.fetches += 1
        try:
            data = await self._read()
            digest = hashlib.sha256(data).digest()
            fresh = None if digest == self._record.digest else await asyncio.to_thread(self._parse, data)
        except SourceError as e:
            self._failed(str(e))
        except Exception as e:  # noqa: BLE001 - the next attempt must happen; the text may contain what was read
            self._failed(type(e).__name__)
        else:
            self._succeeded(fresh, digest)
        finally:
            self.tried.set()

    async def _read(self) -> bytes:
        if self._file is None:
            return await fetch(self._session, self._jwks, self._jwks.url or "")
        return await asyncio.to_thread(read_file, str(self._file))

    def _parse(self, data: bytes) -> KeySet:
        try:
            return parse_jwks(data) if self._secret_file is None else KeySet((secret_key(data),))
        except ValueError as e:
            raise SourceError(str(e)) from None

    def _succeeded(self, fresh: KeySet | None, digest: bytes) -> None:
        """`fresh` are the keys of a source that changed; None if it did not."""
        record = self._record
        if record.error is not None:
            log.info("keys of %s: readable again after %d failures", self._name, record.failed_in_row)
        record.loaded_at, record.error, record.failed_in_row = self._clock(), None, 0
        if fresh is not None:
            record.keys, record.digest = fresh, digest
            self._log_keys(fresh)
            self._changed()

    def _log_keys(self, fresh: KeySet) -> None:
        kids = ", ".join(ascii(k.kid[:64]) for k in fresh.keys[:8] if k.kid is not None)
        if fresh.keys:
            log.info("keys of %s: %d from %s (kid %s)", self._name, len(fresh.keys), self._place, kids or "absent")
        else:
            log.error("keys of %s: %s holds no usable key; its tokens are refused", self._name, self._place)
        for line in fresh.skipped:
            log.warning("keys of %s: %s: skipped %s", self._name, self._place, line)

    def _failed(self, error: str) -> None:
        record = self._record
        record.failures += 1
        record.failed_in_row += 1
        record.error = f"{self._place}: {error}"
        if record.failed_in_row == 1 or self._clock() - record.logged_at >= self._pace.log_apart:
            record.logged_at = self._clock()
            state = f"the good keys ({len(record.keys.keys)}) stay" if record.keys else "its tokens are refused"
            log.warning("keys of %s: %s; %s", self._name, record.error, state)


async def _stop(followed: Iterable[_Followed]) -> None:
    await asyncio.gather(*(task for f in followed for task in f.cancel()), return_exceptions=True)
