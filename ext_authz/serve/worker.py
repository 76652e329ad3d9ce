"""One worker of `srp serve --workers`: answers Check by the epochs that its owner sends, and ends with its owner.

Started by ext_authz.serve.workers, never by hand: standard input is the socket that leads to the owner.
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
from ext_authz.serve.scheduling import take_turns
from ext_authz.serve.server import Server, unix_path
from ext_authz.settings import DRAIN

log = logging.getLogger("srp.worker")


def main() -> None:
    """Serve the owner at the other end of standard input until it says stop, or is gone."""
    try:
        link = socket.socket(fileno=os.dup(0))
    except OSError:
        sys.exit("a worker is started by `srp serve --workers`, not by hand")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the owner gets it too, and says when to stop
    take_turns()
    uvloop.run(_serve(link))


async def _serve(link: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=link)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    worker: Worker | None = None

    async def converse() -> float:
        """Until the owner says stop: how long it grants."""
        nonlocal worker
        while True:
            message = await frames.read_to_worker(reader)
            if message is None:
                _end(worker, 0)  # at once: nobody tells this process of a revocation any more
            if isinstance(message, frames.Start):
                log_lines.start(message.log_level, message.number)
                worker = Worker(message, lambda answer: writer.write(frames.frame(answer)))
            elif isinstance(message, frames.Stop):
                return message.drain
            elif worker is None:
                raise BadFrame("expected to be told who it is")
            elif isinstance(message, frames.Listen):
                await worker.listen()
            else:
                worker.hear(message)

    talking = asyncio.create_task(converse())
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({talking, stopped}, return_when=asyncio.FIRST_COMPLETED)
    drain = DRAIN
    if talking.done():
        try:
            drain = talking.result()
        except Exception as e:  # noqa: BLE001 - whatever it is, this process must not go on deciding
            log.error("ending: %s: %s", type(e).__name__, e)
            _end(worker, 1)
    if worker is not None:
        await worker.stop(drain)
    with contextlib.suppress(OSError):
        await writer.drain()
    _end(None, 0)


def _end(worker: Worker | None, code: int) -> NoReturn:
    """End this process now, whatever its threads are at. Its socket goes with it."""
    if worker is not None:
        worker.leave()
    os._exit(code)


class Worker:
    """What the owner's messages, taken in order, make of this process. `send` carries its answers."""

    def __init__(self, start: frames.Start, send: Callable[[frames.ToOwner], object]) -> None:
        self._start = start
        self._send = send
        self._caches = CacheSizes(start.cached_tokens, start.cached_decisions)
        self._tally = Tally()
        self._keys = _OwnersKeys(send)
        self._authorization = Authorization(NO_POLICY, self._keys, self._tally)
        self._policies: dict[str, Policy] = {}  # those that the next epoch may be of
        self._newest = ""
        self._compiling: set[asyncio.Task[None]] = set()
        self._epoch: frames.EpochOf | None = None
        self._server: Server | None = None
        self._told: Counts | None = None

    def hear(self, message: frames.PolicyText | frames.EpochOf | frames.Ask | frames.Refreshed) -> None:
        """Do as the owner says."""
        match message:
            case frames.PolicyText():
                self._newest = message.digest
                self._forget()
                task = asyncio.create_task(self._compile(message))
                self._compiling.add(task)
                task.add_done_callback(self._compiled)
            case frames.EpochOf():
                self._epoch = message
                self._take_over()
            case frames.Ask():
                self.tell(message.order)
            case frames.Refreshed():
                self._keys.refreshed(message.issuer)

    async def listen(self) -> None:
        """Take checks; OSError if the address cannot be had."""
        handlers = self._authorization.handlers()
        server = Server(self._start.listen, handlers, max_concurrent=self._start.max_concurrent)
        gc.collect()
        gc.freeze()  # as the owner does
        await server.start()
        self._server = server
        self._send(frames.Listening())

    async def stop(self, drain: float) -> None:
        """Take no more checks, finish those that run, tell the last counts."""
        if self._server is not None:
            await self._server.stop(drain)
        self.tell(0)

    def leave(self) -> None:
        """Remove the socket: the process ends without closing it."""
        path = unix_path(self._start.listen)
        if path is not None and self._server is not None:
            path.unlink(missing_ok=True)

    def tell(self, order: int) -> None:
        """Tell the counts, if they are others than those told last."""
        counts = counted(self._tally, self._caches, self._authorization.epoch.snapshot)
        self._send(frames.Told(order, None if counts == self._told else counts))
        self._told = counts

    async def _compile(self, message: frames.PolicyText) -> None:
        if message.digest not in self._policies:
            path = Path(message.path)
            # The owner has read the files with keys, and sends the keys.
            made = await asyncio.to_thread(parse_policy, message.text, path.name, path.parent, key_files=False)
            self._policies[message.digest] = made
            self._forget()
        self._send(frames.Compiled(message.digest))
        self._take_over()

    def _compiled(self, task: asyncio.Task[None]) -> None:
        self._compiling.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("the owner's policy cannot be compiled here: %s", task.exception())
            _end(self, 1)

    def _forget(self) -> None:
        """Keep the policy of the newest epoch, and the one that was sent last."""
        kept = {self._newest, self._epoch.policy if self._epoch else ""}
        self._policies = {digest: policy for digest, policy in self._policies.items() if digest in kept}

    def _take_over(self) -> None:
        """Decide by the newest epoch, once its policy is compiled."""
        epoch = self._epoch
        policy = self._policies.get(epoch.policy) if epoch else None
        if epoch is None or policy is None:
            return
        active = self._authorization.epoch
        if active.snapshot.epoch != epoch.epoch or active.lease_epoch != epoch.lease_epoch:
            keys = {issuer: tuple(map(jwk.key_of_text, texts)) for issuer, texts in epoch.keys.items()}
            active = Epoch.of(self._caches.snapshot(policy, keys, epoch.epoch), epoch.lease_epoch)
        self._authorization.epoch = dataclasses.replace(active, grants=epoch.grants)
        self._forget()
        self._send(frames.Installed(epoch.order, epoch.epoch))


class _OwnersKeys:
    """The owner's key store, as far as a check needs it: fresh keys of an issuer, on request."""

    def __init__(self, send: Callable[[frames.ToOwner], object]) -> None:
        self._send = send
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def refresh(self, issuer: str) -> bool:
        """Ask the owner for newer keys and wait for its answer; the caller bounds that. One question at a time."""
        waiting = self._waiting.get(issuer)
        if waiting is None:
            waiting = self._waiting[issuer] = asyncio.get_running_loop().create_future()
            self._send(frames.Refresh(issuer))
        await asyncio.shield(waiting)
        return True

    def refreshed(self, issuer: str) -> None:
        """The owner has answered: its newer keys, if any, are in force here."""
        waiting = self._waiting.pop(issuer, None)
        if waiting is not None:
            waiting.set_result(None)


if __name__ == "__main__":
    main()
