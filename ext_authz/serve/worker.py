"""One worker of `srp serve --workers`: serves Check with the epochs from its owner, and exits with its owner.

Started by ext_authz.serve.workers, never by hand: standard input is the socket to the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import uvloop

from ext_authz.core import jwk
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import CacheSizes
from ext_authz.observe import log_lines
from ext_authz.observe.counts import Counts, counted
from ext_authz.observe.metrics import Tally
from ext_authz.policyfile.parse import parse_policy
from ext_authz.serve import frames
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.epoch import NO_POLICY, Epoch
from ext_authz.serve.frames import BadFrame
from ext_authz.serve.scheduling import set_scheduling
from ext_authz.serve.server import Server, unix_path
from ext_authz.settings import DRAIN

log = logging.getLogger("srp.worker")


def main() -> None:
    """Serve until the owner at the other end of standard input sends Stop or is gone."""
    try:
        link = socket.socket(fileno=os.dup(0))
    except OSError:
        sys.exit("a worker is started by `srp serve --workers`, not by hand")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the owner too, which then sends Stop
    set_scheduling()
    uvloop.run(_serve(link))


async def _serve(link: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=link)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    worker: Worker | None = None

    async def receive() -> float:
        """Handle the owner's messages until Stop, and return its `drain`."""
        nonlocal worker
        while True:
            message = await frames.read_to_worker(reader)
            if message is None:
                _end(worker, 0)  # at once: without its owner, this process would miss revocations
            if isinstance(message, frames.Start):
                log_lines.start(message.log_level, message.number)
                worker = Worker(message, lambda answer: writer.write(frames.frame(answer)))
            elif isinstance(message, frames.Stop):
                return message.drain
            elif worker is None:
                raise BadFrame("expected `start` as the first message")
            elif isinstance(message, frames.Listen):
                await worker.listen()
            else:
                worker.receive(message)

    receiving = asyncio.create_task(receive())
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({receiving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    drain = DRAIN
    if receiving.done():
        try:
            drain = receiving.result()
        except Exception as e:  # noqa: BLE001 - after any error this process must stop deciding
            log.error("ending: %s: %s", type(e).__name__, e)
            _end(worker, 1)
    if worker is not None:
        await worker.stop(drain)
    with contextlib.suppress(OSError):
        await writer.drain()
    _end(None, 0)


def _end(worker: Worker | None, code: int) -> NoReturn:
    """Exit now, without waiting for any thread. Removes the worker's socket."""
    if worker is not None:
        worker.remove_socket()
    os._exit(code)


class Worker:
    """The state of this process, which the owner's messages change in order. `send` sends the answers."""

    def __init__(self, start: frames.Start, send: Callable[[frames.ToOwner], object]) -> None:
        self._start = start
        self._send = send
        self._caches = CacheSizes(start.cached_tokens, start.cached_decisions)
        self._tally = Tally()
        self._keys = _OwnerKeys(send)
        self._authorization = Authorization(NO_POLICY, self._keys, self._tally)
        self._policies: dict[str, Policy] = {}  # compiled, by digest: those that the next epoch may use
        self._newest = ""
        self._compiling: set[asyncio.Task[None]] = set()
        self._epoch: frames.Install | None = None
        self._server: Server | None = None
        self._reported: Counts | None = None

    def receive(self, message: frames.PolicyText | frames.Install | frames.Poll | frames.Refreshed) -> None:
        """Handle one message."""
        match message:
            case frames.PolicyText():
                self._newest = message.digest
                self._drop_policies()
                task = asyncio.create_task(self._compile(message))
                self._compiling.add(task)
                task.add_done_callback(self._compiled)
            case frames.Install():
                self._epoch = message
                self._install()
            case frames.Poll():
                self.report_counts(message.order)
            case frames.Refreshed():
                self._keys.refreshed(message.issuer)

    async def listen(self) -> None:
        """Accept checks. OSError if it cannot listen on the address."""
        handlers = self._authorization.handlers()
        server = Server(self._start.listen, handlers, max_concurrent=self._start.max_concurrent)
        gc.collect()
        gc.freeze()  # what exists now is long-lived: later collections need not traverse it
        await server.start()
        self._server = server
        self._send(frames.Listening())

    async def stop(self, drain: float) -> None:
        """Refuse new checks, finish running ones within `drain` seconds, and report the final counts."""
        if self._server is not None:
            await self._server.stop(drain)
        self.report_counts(0)

    def remove_socket(self) -> None:
        """Remove the socket's file, which an exit without `stop` would leave behind."""
        path = unix_path(self._start.listen)
        if path is not None and self._server is not None:
            path.unlink(missing_ok=True)

    def report_counts(self, order: int) -> None:
        """Answer poll `order` with the counts, or with None if they are unchanged since the last report."""
        counts = counted(self._tally, self._caches, self._authorization.epoch.snapshot)
        self._send(frames.Counted(order, None if counts == self._reported else counts))
        self._reported = counts

    async def _compile(self, message: frames.PolicyText) -> None:
        if message.digest not in self._policies:
            path = Path(message.path)
            # The owner reads the key files, and sends the keys.
            policy = await asyncio.to_thread(parse_policy, message.text, path.name, path.parent, key_files=False)
            self._policies[message.digest] = policy
            self._drop_policies()
        self._send(frames.Compiled(message.digest))
        self._install()

    def _compiled(self, task: asyncio.Task[None]) -> None:
        self._compiling.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("the owner's policy cannot be compiled here: %s", task.exception())
            _end(self, 1)

    def _drop_policies(self) -> None:
        """Drop all policies but the newest epoch's and the one received last."""
        kept = {self._newest, self._epoch.policy if self._epoch else ""}
        self._policies = {digest: policy for digest, policy in self._policies.items() if digest in kept}

    def _install(self) -> None:
        """Switch to the newest epoch if its policy is compiled."""
        epoch = self._epoch
        policy = self._policies.get(epoch.policy) if epoch else None
        if epoch is None or policy is None:
            return
        active = self._authorization.epoch
        if active.snapshot.epoch != epoch.epoch or active.lease_epoch != epoch.lease_epoch:
            keys = {issuer: tuple(map(jwk.key_of_text, texts)) for issuer, texts in epoch.keys.items()}
            active = Epoch.of(self._caches.snapshot(policy, keys, epoch.epoch), epoch.lease_epoch)
        self._authorization.epoch = dataclasses.replace(active, grants=epoch.grants)
        self._drop_policies()
        self._send(frames.Installed(epoch.order, epoch.epoch))


class _OwnerKeys:
    """The part of the owner's key store that a check needs: fresh keys of an issuer, on request."""

    def __init__(self, send: Callable[[frames.ToOwner], object]) -> None:
        self._send = send
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def refresh(self, issuer: str) -> bool:
        """Ask the owner for newer keys and wait for its answer. The caller bounds the wait.

        At most one request per issuer is in flight.
        """
        waiting = self._waiting.get(issuer)
        if waiting is None:
            waiting = self._waiting[issuer] = asyncio.get_running_loop().create_future()
            self._send(frames.Refresh(issuer))
        await asyncio.shield(waiting)
        return True

    def refreshed(self, issuer: str) -> None:
        """Take the owner's answer: newer keys, if any, are already installed here."""
        waiting = self._waiting.pop(issuer, None)
        if waiting is not None:
            waiting.set_result(None)


if __name__ == "__main__":
    main()
