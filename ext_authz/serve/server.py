"""The gRPC server: Check, health and ADS on one socket. A request: `wire.parse`, `recall` or `check`, `wire.write`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket as sockets
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ext_authz.core.check import Snapshot, check, recall, refused, remember
from ext_authz.core.model import Decision, Refusal, Request
from ext_authz.core.policy import Policy
from ext_authz.observe.metrics import Tally
from ext_authz.wire import check as wire
from ext_authz.wire import lease_filter as leases

SERVICE = "envoy.service.auth.v3.Authorization"
MAX_MESSAGE = 1 << 20  # bytes; Envoy sends at most 64 KiB of body and 60 KiB of headers
MAX_CONCURRENT = 1024  # checks in flight; more are refused at once and Envoy answers 503
DRAIN = 10.0  # seconds
KEY_WAIT = 0.3  # seconds a check may wait for fresh keys, under Envoy's ext_authz timeout
MAX_WAITING = 64  # checks that wait for keys; the rest is decided by those at hand, so that unknown ids hold up nobody
SWITCH = 0.0002  # seconds that a thread keeps the interpreter while another waits for it

log = logging.getLogger("srp.server")


# Sees each decision after its answer: the snapshot that made it, the request, the decision, its id and its time.
Witness = Callable[[Snapshot, Request, Decision, str, float], None]

_UNREAD = Request("", "", {})


class FreshKeys(Protocol):
    """The part of the key store a check needs."""

    async def refresh(self, issuer: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Epoch:
    """A snapshot with the writer of its answers. `lease` is its name to Envoy; `grants`: whether it gives leases."""

    snapshot: Snapshot
    writer: wire.Writer
    lease: str = ""
    grants: bool = False

    @staticmethod
    def of(snapshot: Snapshot, lease: str = "") -> Epoch:
        return Epoch(snapshot, wire.Writer(snapshot.policy, lease), lease)


NOBODY = Epoch.of(Snapshot(Policy(tiers=("none",), experts={})))  # until there is a policy: refuses everyone


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
        """One serialised CheckRequest to one serialised CheckResponse. Never raises but for cancellation."""
        began = time.perf_counter()
        epoch, now, request = self.epoch, self._clock(), _UNREAD
        decision_id = epoch.writer.new_id()
        try:
            raw = wire.parse(data)
            outcome = recall(epoch.snapshot, raw, now)
            if outcome is None or self.witness is not None:
                request = raw.request(self._wanted(epoch))
            elif epoch.grants:
                request = Request("", raw.heading[0], {})  # of one that is remembered no header came twice
            if outcome is None:
                made = check(epoch.snapshot, request, now)
                if isinstance(made, Refusal):
                    await self._fresh(made.issuer or "")
                    epoch, now = self.epoch, self._clock()
                    request = raw.request(self._wanted(epoch))
                    made = check(epoch.snapshot, request, now)
                outcome = refused(made) if isinstance(made, Refusal) else made
                remember(epoch.snapshot, raw.heading, request, outcome)
            decision, caller, _ = outcome
            until = leases.grant(epoch.snapshot.policy, outcome, request, now) if epoch.grants else None
            if until is None:
                answer = epoch.writer.write(decision, decision_id, caller.subject)
            else:
                answer = epoch.writer.grant(decision, decision_id, until, caller.subject)
                self._tally.leases += 1
        except Exception as e:  # noqa: BLE001 - the one broad except: whatever went wrong, the answer is no
            self._failed(e)
            decision, answer = wire.INTERNAL, epoch.writer.write(wire.INTERNAL, decision_id)
        self._tally.decided(decision, time.perf_counter() - began)
        if decision.errors:
            self._count_errors(decision)
        if self.witness is not None:
            asyncio.get_running_loop().call_soon(self.witness, epoch.snapshot, request, decision, decision_id, now)
        return answer

    def _wanted(self, epoch: Epoch) -> frozenset[str] | None:
        """The headers to read; None: all, for a witness may read what the policy in force does not."""
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


class Server:
    """A grpc.aio server on `listen`: `unix:PATH` (mode 0660) or HOST:PORT (port 0 picks one, see `address`)."""

    def __init__(self, listen: str, *handlers: grpc.GenericRpcHandler, max_concurrent: int = MAX_CONCURRENT) -> None:
        self._listen = listen
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", max_concurrent + 16),
            ],
            maximum_concurrent_rpcs=max_concurrent,
        )
        self._grpc.add_generic_rpc_handlers(handlers)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self.address = listen

    async def start(self) -> None:
        """Listen and report SERVING. OSError if the address cannot be had."""
        path = unix_path(self._listen)
        if path is not None:
            await asyncio.to_thread(_clear_stale, path)
            # The socket is born with the umask's mode: nobody but owner and group may ever connect.
            mask = os.umask(0o117)
        try:
            port = self._grpc.add_insecure_port(self._listen)
            await self._grpc.start()
        except RuntimeError as e:
            raise OSError(f"cannot listen on {self._listen}: {e}") from None
        finally:
            if path is not None:
                os.umask(mask)
        if path is None:
            self.address = f"{self._listen.rpartition(':')[0]}:{port}"
        await self._report(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = DRAIN) -> None:
        """Say NOT_SERVING, let what runs finish for `grace` seconds, close. gRPC removes its socket when it begins."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._grpc.stop(grace)

    async def _report(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


def take_turns() -> None:
    """Settle how the threads of this process, those to come too, take turns. Children inherit the second half.

    At the interpreter's default of 5 ms a thread that compiles a policy holds up checks, and a busy loop, which lets go
    of the interpreter for a moment each round, never lets the log's writer have it. And gRPC's threads wake for each
    event, to hand it to the loop: as SCHED_BATCH (sched(7)) they wait until the loop is idle, and hand it several. A
    policy that somebody chose for this process stays.
    """
    sys.setswitchinterval(SWITCH)
    with contextlib.suppress(OSError, AttributeError):  # not allowed here, or not Linux
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def unix_path(listen: str) -> Path | None:
    """The path of a `unix:` address, else None."""
    return Path(listen.removeprefix("unix:")) if listen.startswith("unix:") else None


def _clear_stale(path: Path) -> None:
    """Remove a socket nobody answers on; OSError if somebody does, or if it is no socket."""
    if not path.parent.is_dir():
        raise OSError(f"cannot listen on {path}: its folder does not exist")
    if len(os.fsencode(path)) > 100:
        raise OSError(f"cannot listen on {path}: a socket's path is at most 100 bytes")
    if not path.exists():
        return
    if not path.is_socket():
        raise OSError(f"cannot listen on {path}: it exists and is no socket")
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise OSError(f"cannot listen on {path}: another server is using it")
