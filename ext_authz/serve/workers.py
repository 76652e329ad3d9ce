"""The owner's side of `srp serve --workers`: processes that decide with the same epochs, each on its own socket.

A worker listens only after it has installed the newest epoch. It must install every later epoch within INSTALL_TIMEOUT
seconds or it is killed, so once `settled` returns, no process uses an older one. A worker that ends is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ext_authz.core import jwk
from ext_authz.observe.counts import Counts, add_up, ended
from ext_authz.serve import frames, worker_process
from ext_authz.serve.epoch import Epoch
from ext_authz.serve.frames import BadFrame
from ext_authz.serve.server import unix_path
from ext_authz.serve.worker_process import Slot, WorkerProcess, slot_report
from ext_authz.settings import Settings

COMPILE_TIMEOUT = 30.0  # seconds to compile a policy, which the owner has already compiled
REPORT_WAIT = 1.0  # seconds that a report waits for the newest counts
COUNTS_INTERVAL = 1.0  # seconds between polls for counts
WATCH_INTERVAL = 0.1  # seconds between checks for workers that exceed a timeout
STALL = 1.0  # seconds; a longer gap between those checks means that the owner itself was delayed
BACKOFF, MAX_BACKOFF = 0.1, 5.0  # seconds before a worker is replaced
STEADY_LIFE = 10.0  # seconds; if a worker lived longer, its end is not a repeated failure
STOP_MARGIN = 2.0  # seconds beyond the drain that a worker has to end

log = logging.getLogger("srp.workers")


class Workers:
    """The workers of one server. `refresh` gets newer keys of an issuer. Without workers, it does nothing."""

    def __init__(self, settings: Settings, refresh: Callable[[str], Awaitable[object]]) -> None:
        self._settings = settings
        self._refresh = refresh
        self._slots = [Slot(n, path) for n, path in enumerate(sockets(settings)[1:], 1)]
        self._alive: set[WorkerProcess] = set()
        self._running: asyncio.Task[None] | None = None
        self._refreshing: set[asyncio.Task[None]] = set()
        self._policies: dict[str, bytes] = {}  # framed, by digest: the newest epoch's and the next one's
        self._newest = ""
        self._epoch: frames.Install | None = None
        self._order = 0
        self._polls = 0
        self._progress = asyncio.Event()
        self._stopping = False

    def start(self) -> None:
        """Keep a worker running in each slot until `stop`."""
        if self._slots:
            self._running = asyncio.create_task(self._run())

    async def ended(self) -> None:
        """Return when the workers are no longer supervised. If that is due to an error, raise it."""
        if self._running is None:
            await asyncio.Event().wait()
        else:
            await asyncio.shield(self._running)

    async def prepare(self, digest: str, text: bytes, path: Path) -> None:
        """Make the workers compile a policy, so that they can install its epoch at once. The wait is bounded."""
        if not self._slots:
            return
        self._newest = digest
        self._policies[digest] = _policy_frame(digest, text, path)
        self._drop_policies()
        for worker in self._alive:
            worker.compiled.discard(digest)
            worker.send(self._policies[digest])
        if not await self._until(lambda: all(digest in w.compiled for w in self._deciding()), COMPILE_TIMEOUT):
            for worker in [w for w in self._deciding() if digest not in w.compiled]:
                self._kill(worker, f"did not compile policy {digest} in {COMPILE_TIMEOUT:g} s")

    def install(self, epoch: Epoch) -> None:
        """Send `epoch` to every worker."""
        if not self._slots:
            return
        self._order += 1
        snapshot = epoch.snapshot
        keys = {issuer: tuple(map(jwk.key_text, found)) for issuer, found in snapshot.keys.items()}
        self._epoch = frames.Install(
            self._order, snapshot.epoch, snapshot.policy.digest, keys, epoch.lease_epoch, epoch.grants
        )
        self._drop_policies()
        data, now = frames.frame(self._epoch), time.monotonic()
        for worker in self._alive:
            worker.send(data)
            worker.pending[self._order] = now

    async def settled(self) -> None:
        """Return when no worker uses an epoch older than the newest."""
        await self._until(self._is_settled)

    async def refresh(self) -> None:
        """Wait for up-to-date counts, and until all workers use the newest epoch; at most REPORT_WAIT seconds."""
        polled = self._deciding()
        order = self._poll()
        await self._until(
            lambda: self._is_settled() and all(w.answered >= order or w not in self._alive for w in polled),
            REPORT_WAIT,
        )

    async def stop(self, drain: float) -> None:
        """Stop the workers. They may finish their checks for `drain` seconds; those that do not end are killed."""
        self._stopping = True
        for worker in list(self._alive):
            if worker.listens:
                worker.send(frames.frame(frames.Stop(drain)))
            else:
                worker.process.kill()
        await self._until(lambda: not self._alive, drain + STOP_MARGIN)
        tasks = list(filter(None, (self._running, *self._refreshing)))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def counts(self) -> Counts:
        """The total over all workers, current and past, as of their last reports."""
        return add_up([*(s.past for s in self._slots), *(w.counts for w in self._alive)])

    @property
    def restarts(self) -> int:
        return sum(s.restarts for s in self._slots)

    @property
    def serving(self) -> int:
        """How many workers accept checks."""
        return sum(w.serving for w in self._alive)

    def report(self) -> list[dict[str, Any]]:
        """Each worker's entry for `/status`; `checks` includes its predecessors' checks."""
        alive = {w.slot: w for w in self._alive}
        return [slot_report(slot, alive.get(slot)) for slot in self._slots]

    # ---- one worker ----

    async def _keep(self, slot: Slot) -> None:
        """Run a worker in `slot`, and replace it when it ends."""
        backoff = BACKOFF
        while not self._stopping:
            began = time.monotonic()
            why = await self._run_worker(slot)
            if self._stopping:
                return
            lived = time.monotonic() - began
            backoff = BACKOFF if lived >= STEADY_LIFE else backoff
            slot.restarts += 1
            log.warning("worker %d ended after %.1f s (%s); restarting in %g s", slot.number, lived, why, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF)

    async def _run_worker(self, slot: Slot) -> str:
        """Run one worker from start to end; return why it ended."""
        try:
            process, link = await asyncio.to_thread(worker_process.spawn, slot.path)
        except OSError as e:
            return f"cannot start it: {e}"
        try:
            reader, writer = await asyncio.open_unix_connection(sock=link)
        except OSError as e:
            process.kill()
            await asyncio.to_thread(process.wait)
            return f"cannot connect to it: {e}"
        worker = WorkerProcess(slot, process, writer, time.monotonic())
        self._alive.add(worker)
        why = "it exited"
        try:
            if self._stopping:
                process.kill()
            self._send_state(worker)
            while (message := await frames.read_to_owner(reader)) is not None:
                self._receive(worker, message)
        except BadFrame as e:
            why = str(e)
        except Exception as e:  # noqa: BLE001 - after any error the worker is replaced
            why = type(e).__name__
        finally:
            process.kill()
            code = await asyncio.shield(asyncio.to_thread(process.wait))
            self._alive.discard(worker)
            slot.past = add_up([slot.past, ended(worker.counts)])
            if worker.serving:
                slot.path.unlink(missing_ok=True)
            writer.close()
            self._progress.set()
        return f"{why}, status {code}"

    def _send_state(self, worker: WorkerProcess) -> None:
        settings = self._settings
        start = frames.Start(
            worker.slot.number, f"unix:{worker.slot.path}", settings.max_concurrent, settings.cached_tokens,
            settings.cached_decisions, settings.log_level,
        )  # fmt: skip
        worker.send(frames.frame(start))
        # What is in force first, then what may come: a worker forgets a policy that neither of the two needs.
        if self._epoch is not None:
            worker.send(self._policies[self._epoch.policy])
            worker.send(frames.frame(self._epoch))
        for digest, policy in self._policies.items():
            if self._epoch is None or digest != self._epoch.policy:
                worker.send(policy)

    def _receive(self, worker: WorkerProcess, message: frames.ToOwner) -> None:
        match message:
            case frames.Compiled():
                worker.compiled.add(message.digest)
            case frames.Installed():
                self._installed(worker, message)
            case frames.Listening():
                worker.serving = True
                log.info("worker %d (pid %d) listens", worker.slot.number, worker.process.pid)
            case frames.Counted():
                worker.polled_at, worker.answered = None, max(worker.answered, message.order)
                worker.counts = message.counts or worker.counts
            case frames.Refresh():
                task = asyncio.create_task(self._refresh_for(worker, message.issuer))
                self._refreshing.add(task)
                task.add_done_callback(self._refreshing.discard)
        self._progress.set()

    def _installed(self, worker: WorkerProcess, message: frames.Installed) -> None:
        worker.record_installed(message.order, message.epoch)
        if message.order == self._order and not worker.listens and not self._stopping:
            worker.listens = True
            worker.send(frames.frame(frames.Listen()))

    async def _refresh_for(self, worker: WorkerProcess, issuer: str) -> None:
        try:
            await self._refresh(issuer)
        finally:
            worker.send(frames.frame(frames.Refreshed(issuer)))

    # ---- all of them ----

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._keep(slot))
            group.create_task(self._watch())

    async def _watch(self) -> None:
        """Poll for counts and kill workers that exceed a timeout, until `stop`."""
        polled, checked = 0.0, time.monotonic()
        while not self._stopping:
            await asyncio.sleep(WATCH_INTERVAL)
            now = time.monotonic()
            if now - polled >= COUNTS_INTERVAL:
                polled = now
                self._poll()
            for worker in list(self._alive):
                if now - checked > STALL:
                    worker.reset_deadlines(now)
                if why := worker.overdue(now):
                    self._kill(worker, why)
            checked = now

    def _poll(self) -> int:
        self._polls += 1
        data, now = frames.frame(frames.Poll(self._polls)), time.monotonic()
        for worker in self._deciding():
            worker.send(data)
            if worker.polled_at is None:
                worker.polled_at = now
        return self._polls

    def _kill(self, worker: WorkerProcess, why: str) -> None:
        if worker.process.poll() is None:
            log.error("worker %d (pid %d) %s: killed", worker.slot.number, worker.process.pid, why)
            worker.process.kill()

    def _deciding(self) -> list[WorkerProcess]:
        return [w for w in self._alive if w.listens]

    def _is_settled(self) -> bool:
        return all(w.installed == self._order for w in self._deciding())

    def _drop_policies(self) -> None:
        """Drop all policies but the newest epoch's and the one prepared last."""
        kept = {self._newest, self._epoch.policy if self._epoch else ""}
        self._policies = {digest: data for digest, data in self._policies.items() if digest in kept}

    async def _until(self, done: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until `done()` is true. It is evaluated after each message and each worker's end. Returns its result."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not done():
                    self._progress.clear()
                    await self._progress.wait()
        return done()


def sockets(settings: Settings) -> Sequence[Path]:
    """The sockets of the owner and its workers, the owner's first; empty if there are no workers."""
    path = unix_path(settings.listen)
    if path is None or settings.workers == 1:
        return ()
    return [path, *(Path(f"{path}.{n}") for n in range(1, settings.workers))]


def _policy_frame(digest: str, text: bytes, path: Path) -> bytes:
    return frames.frame(frames.PolicyText(digest, text.decode(), str(path.absolute())))
