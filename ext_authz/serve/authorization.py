"""Check, the RPC that Envoy calls for each request: parse, decide, answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grpc
import grpc.aio

from ext_authz.core import leases
from ext_authz.core.check import check, lookup, refused, store
from ext_authz.core.model import Decision, Outcome, Refusal, Request
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.metrics import Tally
from ext_authz.serve.epoch import Epoch
from ext_authz.wire import check as wire

SERVICE = "envoy.service.auth.v3.Authorization"
KEY_WAIT = 0.3  # seconds a check may wait for fresh keys, under Envoy's ext_authz timeout
MAX_WAITING = 64  # checks that wait for keys; the others use those at hand, so unknown key ids delay nobody else

log = logging.getLogger("srp.server")

# Sees each decision after its answer: the snapshot that made it, the request, the decision, its id and its time.
Witness = Callable[[Snapshot, Request, Decision, str, float], None]

_UNREAD = Request("", "", {})


class FreshKeys(Protocol):
    """The part of the key store that a check needs."""

    async def refresh(self, issuer: str) -> bool: ...


class _Decided(NamedTuple):
    """An outcome, and the epoch, request and time that it was found for."""

    outcome: Outcome
    epoch: Epoch
    request: Request
    now: float


class Authorization:
    """Answers Check. `epoch` is replaced whole when the policy or the keys change."""

    def __init__(self, epoch: Epoch, keys: FreshKeys, tally: Tally, clock: Callable[[], float] = time.time) -> None:
        self.epoch = epoch
        self._keys = keys
        self._tally = tally
        self._clock = clock
        self.witness: Witness | None = None
        self._seen_errors: set[str] = set()
        self._waiting = 0

    async def check(self, data: bytes, context: Any = None) -> bytes:
        """One serialised CheckRequest to one serialised CheckResponse. Never raises, except for cancellation."""
        began = time.perf_counter()
        epoch, request, now = self.epoch, _UNREAD, self._clock()
        decision_id = epoch.writer.new_id()
        try:
            outcome, epoch, request, now = await self._decide(wire.parse(data), epoch, now)
            decision = outcome.decision
            answer = self._answer(outcome, epoch, request, now, decision_id)
        except Exception as e:  # noqa: BLE001 - the one broad except: whatever went wrong, the answer is no
            self._failed(e)
            decision, answer = wire.INTERNAL, epoch.writer.write(wire.INTERNAL, decision_id)
        self._tally.decided(decision, time.perf_counter() - began)
        if decision.errors:
            self._count_errors(decision)
        if self.witness is not None:
            asyncio.get_running_loop().call_soon(self.witness, epoch.snapshot, request, decision, decision_id, now)
        return answer

    async def _decide(self, raw: wire.Raw, epoch: Epoch, now: float) -> _Decided:
        """From the cache, or by `check`; if fresh keys could change a refusal, once more with the newest epoch."""
        cached = lookup(epoch.snapshot, raw, now)
        if cached is not None and self.witness is None:
            # Only requests without repeated headers are cached, so a lease needs no more of this one than its path.
            return _Decided(cached, epoch, Request("", raw.fingerprint[0], {}) if epoch.grants else _UNREAD, now)
        request = raw.request(self._wanted(epoch))
        if cached is not None:
            return _Decided(cached, epoch, request, now)
        outcome = check(epoch.snapshot, request, now)
        if isinstance(outcome, Refusal):
            await self._fresh(outcome.issuer or "")
            epoch, now = self.epoch, self._clock()
            request = raw.request(self._wanted(epoch))
            outcome = check(epoch.snapshot, request, now)
        if isinstance(outcome, Refusal):
            outcome = refused(outcome)
        store(epoch.snapshot, raw.fingerprint, request, outcome)
        return _Decided(outcome, epoch, request, now)

    def _answer(self, outcome: Outcome, epoch: Epoch, request: Request, now: float, decision_id: str) -> bytes:
        """The response's bytes, with a lease if the decision may have one."""
        decision, caller, _ = outcome
        until = leases.grant(epoch.snapshot.policy, outcome, request, now) if epoch.grants else None
        if until is None:
            return epoch.writer.write(decision, decision_id, caller.subject)
        answer = epoch.writer.grant(decision, decision_id, until, caller.subject)
        self._tally.leases += 1
        return answer

    def _wanted(self, epoch: Epoch) -> frozenset[str] | None:
        """The headers to parse; None: all, as a witness may read what the policy in force does not."""
        return epoch.snapshot.reads if self.witness is None else None

    async def _fresh(self, issuer: str) -> None:
        if self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._keys.refresh(issuer), KEY_WAIT)
        finally:
            self._waiting -= 1

    def _count_errors(self, decision: Decision) -> None:
        self._tally.condition_errors.update(decision.errors)
        for where in set(decision.errors) - self._seen_errors:
            self._seen_errors.add(where)
            log.warning("condition %s could not be evaluated for a caller: counted as no match", where)

    def _failed(self, error: Exception) -> None:
        """Log where it failed, not what: an exception's text may hold a part of the request."""
        self._tally.rpc_errors += 1
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        log.error("check failed: %s at %s", type(error).__name__, place)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Check as a handler on bytes: no serialiser runs but ours."""
        method = grpc.unary_unary_rpc_method_handler(self.check)
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": method})
