"""Check, the RPC that Envoy calls for each request: parse, decide, respond."""

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
KEY_WAIT = 0.3  # seconds that a check may wait for fresh keys; less than Envoy's ext_authz timeout
MAX_WAITING = 64  # checks that may wait for keys at once, so that a flood of unknown key ids cannot hold all checks

log = logging.getLogger("srp.server")

# Called with each decision after its response: the snapshot that made it, the request, the decision, its id and time.
Witness = Callable[[Snapshot, Request, Decision, str, float], None]

_UNREAD = Request("", "", {})


class FreshKeys(Protocol):
    """The part of the key store that a check needs."""

    async def refresh(self, issuer: str) -> bool: ...


class _Decided(NamedTuple):
    """An outcome, with the epoch, request and time that it belongs to."""

    outcome: Outcome
    epoch: Epoch
    request: Request
    now: float


class Authorization:
    """Serves Check. `epoch` is replaced as a whole when the policy or the keys change."""

    def __init__(self, epoch: Epoch, keys: FreshKeys, tally: Tally, clock: Callable[[], float] = time.time) -> None:
        self.epoch = epoch
        self._keys = keys
        self._tally = tally
        self._clock = clock
        self.witness: Witness | None = None
        self._seen_errors: set[str] = set()
        self._waiting = 0

    async def check(self, data: bytes, context: Any = None) -> bytes:
        """The serialised CheckResponse to a serialised CheckRequest. Raises nothing but cancellation."""
        began = time.perf_counter()
        epoch, request, now = self.epoch, _UNREAD, self._clock()
        decision_id = epoch.writer.new_id()
        try:
            outcome, epoch, request, now = await self._decide(wire.parse(data), epoch, now)
            decision = outcome.decision
            answer = self._answer(outcome, epoch, request, now, decision_id)
        except Exception as e:  # noqa: BLE001 - the RPC boundary: any unexpected error is a denial
            self._failed(e)
            decision, answer = wire.INTERNAL, epoch.writer.write(wire.INTERNAL, decision_id)
        self._tally.decided(decision, time.perf_counter() - began)
        if decision.errors:
            self._count_errors(decision)
        if self.witness is not None:
            asyncio.get_running_loop().call_soon(self.witness, epoch.snapshot, request, decision, decision_id, now)
        return answer

    async def _decide(self, raw: wire.Raw, epoch: Epoch, now: float) -> _Decided:
        """From the cache or from `check`. If fresh keys could change a refusal, check again with the newest epoch."""
        cached = lookup(epoch.snapshot, raw, now)
        if cached is not None and self.witness is None:
            # Only requests without repeated headers are cached, so a lease needs nothing but the path of this one.
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
        """The serialised response, with a lease if the decision may have one."""
        decision, caller, _ = outcome
        until = leases.grant(epoch.snapshot.policy, outcome, request, now) if epoch.grants else None
        if until is None:
            return epoch.writer.write(decision, decision_id, caller.subject, caller.issuer or "")
        answer = epoch.writer.grant(decision, decision_id, until, caller.subject, caller.issuer or "")
        self._tally.leases += 1
        return answer

    def _wanted(self, epoch: Epoch) -> frozenset[str] | None:
        """The headers to parse. None: all, as a witness may read headers that the policy in force does not."""
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
        """Log the exception's type and place, but not its text, which may contain part of the request."""
        self._tally.rpc_errors += 1
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        log.error("check failed: %s at %s", type(error).__name__, place)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Check as a handler on bytes: gRPC serialises nothing."""
        method = grpc.unary_unary_rpc_method_handler(self.check)
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": method})
