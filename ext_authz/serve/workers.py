"""The owner's side of `srp serve --workers`: processes that decide by the same epochs, each on a socket of its own.

A worker listens only when it decides by the newest epoch, and must take over every later one within INSTALL_TIMEOUT
seconds, or it is killed: once `settled` returns, no process decides by an older one. A worker that ends is replaced.
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
from ext_authz.serve.worker_process import Place, WorkerProcess, reported
from ext_authz.settings import Settings

COMPILE_TIMEOUT = 30.0  # seconds to compile a policy that the owner has compiled already
REPORT_WAIT = 1.0  # seconds that a report waits for the newest counts
COUNTS_INTERVAL = 1.0  # seconds between two requests for counts
WATCH_INTERVAL = 0.1  # seconds between two checks for workers that are late
STALL = 1.0  # seconds between two checks which show that the owner itself was delayed
BACKOFF, MAX_BACKOFF = 0.1, 5.0  # seconds before a worker is replaced
STEADY_LIFE = 10.0  # seconds after which the end of a worker no longer counts as a repeated failure
STOP_MARGIN = 2.0  # seconds beyond the drain that a worker has to end

log = logging.getLogger("srp.workers")


class Workers:
    """The workers of one server. `refresh` looks for newer keys of an issuer. Without places it does nothing."""

    def __init__(self, settings: Settings, refresh: Callable[[str], Awaitable[object]]) -> None:
        self._settings = settings
        self._refresh = refresh
        self._places = [Place(n, path) for n, path in enumerate(sockets(settings)[1:], 1)]
        self._living: set[WorkerProcess] = set()
        self._running: asyncio.Task[None] | None = None
        self._refreshing: set[asyncio.Task[None]] = set()
        self._policies: dict[str, bytes] = {}  # framed, by digest: of the newest epoch, and the one to come
        self._newest = ""
        self._epoch: frames.EpochOf | None = None
        self._order = 0
        self._asked = 0
        self._progress = asyncio.Event()
        self._stopping = False

    def start(self) -> None:
        """Have the processes, from now until `stop`."""
        if self._places:
            self._running = asyncio.create_task(self._run())

    async def ended(self) -> None:
        """Until nobody looks after the processes any more. Before `stop` that is a fault, which it raises."""
        if self._running is None:
            await asyncio.Event().wait()
        else:
            await asyncio.shield(self._running)

    async def prepare(self, digest: str, text: bytes, path: Path) -> None:
        """Have a policy compiled, so that an epoch of it can be taken over at once. The wait is bounded."""
        if not self._places:
            return
        self._newest = digest
        self._policies[digest] = _policy_frame(digest, text, path)
        self._forget()
        for worker in self._living:
            worker.compiled.discard(digest)
            worker.send(self._policies[digest])
        if not await self._until(lambda: all(digest in w.compiled for w in self._deciding()), COMPILE_TIMEOUT):
            for worker in [w for w in self._deciding() if digest not in w.compiled]:
                self._kill(worker, f"did not compile policy {digest} in {COMPILE_TIMEOUT:g} s")

    def install(self, epoch: Epoch) -> None:
        """Have every worker decide by `epoch`."""
        if not self._places:
            return
        self._order += 1
        snapshot = epoch.snapshot
        keys = {issuer: tuple(map(jwk.key_text, found)) for issuer, found in snapshot.keys.items()}
        self._epoch = frames.EpochOf(
            self._order, snapshot.epoch, snapshot.policy.digest, keys, epoch.lease_epoch, epoch.grants
        )
        self._forget()
        data, now = frames.frame(self._epoch), time.monotonic()
        for worker in self._living:
            worker.send(data)
            worker.owed[self._order] = now

    async def settled(self) -> None:
        """Until no worker decides by an older epoch than the newest."""
        await self._until(self._is_settled)

    async def refresh(self) -> None:
        """Until the counts are of now, and everybody decides by the newest epoch; for REPORT_WAIT seconds at most."""
        asked = self._deciding()
        order = self._ask()
        await self._until(
            lambda: self._is_settled() and all(w.told >= order or w not in self._living for w in asked), REPORT_WAIT
        )

    async def stop(self, drain: float) -> None:
        """Have the workers finish their checks, for `drain` seconds, and end; those that do not are killed."""
        self._stopping = True
        for worker in list(self._living):
            if worker.listens:
                worker.send(frames.frame(frames.Stop(drain)))
            else:
                worker.process.kill()
        await self._until(lambda: not self._living, drain + STOP_MARGIN)
        tasks = list(filter(None, (self._running, *self._refreshing)))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def counts(self) -> Counts:
        """All that workers have counted, as they last told: the living and those before them."""
        return add_up([*(p.past for p in self._places), *(w.counts for w in self._living)])

    @property
    def restarts(self) -> int:
        return sum(p.restarts for p in self._places)

    @property
    def serving(self) -> int:
        """How many take checks."""
        return sum(w.serving for w in self._living)

    def report(self) -> list[dict[str, Any]]:
        """Each worker, for `/status`; `checks` are those of its predecessors, too."""
        living = {w.place: w for w in self._living}
        return [reported(place, living.get(place)) for place in self._places]

    # ---- one worker ----

    async def _keep(self, place: Place) -> None:
        """Have a worker at `place`, and another when it ends."""
        backoff = BACKOFF
        while not self._stopping:
            began = time.monotonic()
            why = await self._live(place)
            if self._stopping:
                return
            lived = time.monotonic() - began
            backoff = BACKOFF if lived >= STEADY_LIFE else backoff
            place.restarts += 1
            log.warning("worker %d ended after %.1f s (%s); another comes in %g s", place.number, lived, why, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF)

    async def _live(self, place: Place) -> str:
        """The life of one worker; how it ended."""
        try:
            process, link = await asyncio.to_thread(worker_process.spawn, place.path)
        except OSError as e:
            return f"it cannot be started: {e}"
        try:
            reader, writer = await asyncio.open_unix_connection(sock=link)
        except OSError as e:
            process.kill()
            await asyncio.to_thread(process.wait)
            return f"it cannot be spoken to: {e}"
        worker = WorkerProcess(place, process, writer, time.monotonic())
        self._living.add(worker)
        why = "it left"
        try:
            if self._stopping:
                process.kill()
            self._introduce(worker)
            while (message := await frames.read_to_owner(reader)) is not None:
                self._hear(worker, message)
        except BadFrame as e:
            why = str(e)
        except Exception as e:  # noqa: BLE001 - whatever went wrong, it is replaced
            why = type(e).__name__
        finally:
            process.kill()
            code = await asyncio.shield(asyncio.to_thread(process.wait))
            self._living.discard(worker)
            place.past = add_up([place.past, ended(worker.counts)])
            if worker.serving:
                place.path.unlink(missing_ok=True)
            writer.close()
            self._progress.set()
        return f"{why}, status {code}"

    def _introduce(self, worker: WorkerProcess) -> None:
        settings = self._settings
        start = frames.Start(
            worker.place.number, f"unix:{worker.place.path}", settings.max_concurrent, settings.cached_tokens,
            settings.cached_decisions, settings.log_level,
        )  # fmt: skip
        worker.send(frames.frame(start))
        for policy in self._policies.values():
            worker.send(policy)
        if self._epoch is not None:
            worker.send(frames.frame(self._epoch))

    def _hear(self, worker: WorkerProcess, message: frames.ToOwner) -> None:
        match message:
            case frames.Compiled():
                worker.compiled.add(message.digest)
            case frames.Installed():
                self._has_installed(worker, message)
            case frames.Listening():
                worker.serving = True
                log.info("worker %d (pid %d) listens", worker.place.number, worker.process.pid)
            case frames.Told():
                worker.asked, worker.told = None, max(worker.told, message.order)
                worker.counts = message.counts or worker.counts
            case frames.Refresh():
                task = asyncio.create_task(self._refresh_for(worker, message.issuer))
                self._refreshing.add(task)
                task.add_done_callback(self._refreshing.discard)
        self._progress.set()

    def _has_installed(self, worker: WorkerProcess, message: frames.Installed) -> None:
        worker.has_installed(message.order, message.epoch)
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
            for place in self._places:
                group.create_task(self._keep(place))
            group.create_task(self._watch())

    async def _watch(self) -> None:
        """Ask for counts, and end whoever is late. No more of that once they are to stop."""
        asked, looked = 0.0, time.monotonic()
        while not self._stopping:
            await asyncio.sleep(WATCH_INTERVAL)
            now = time.monotonic()
            if now - asked >= COUNTS_INTERVAL:
                asked = now
                self._ask()
            for worker in list(self._living):
                if now - looked > STALL:
                    worker.wait_anew(now)
                if why := worker.late(now):
                    self._kill(worker, why)
            looked = now

    def _ask(self) -> int:
        self._asked += 1
        data, now = frames.frame(frames.Ask(self._asked)), time.monotonic()
        for worker in self._deciding():
            worker.send(data)
            if worker.asked is None:
                worker.asked = now
        return self._asked

    def _kill(self, worker: WorkerProcess, why: str) -> None:
        if worker.process.poll() is None:
            log.error("worker %d (pid %d) %s: killed", worker.place.number, worker.process.pid, why)
            worker.process.kill()

    def _deciding(self) -> list[WorkerProcess]:
        return [w for w in self._living if w.listens]

    def _is_settled(self) -> bool:
        return all(w.installed == self._order for w in self._deciding())

    def _forget(self) -> None:
        """Keep the text of the newest epoch's policy, and of the one that may come."""
        kept = {self._newest, self._epoch.policy if self._epoch else ""}
        self._policies = {digest: data for digest, data in self._policies.items() if digest in kept}

    async def _until(self, done: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until `done()`, which is asked whenever a worker says something or ends; whether it is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not done():
                    self._progress.clear()
                    await self._progress.wait()
        return done()


def sockets(settings: Settings) -> Sequence[Path]:
    """Where the owner and its workers listen, the owner first; nothing if it has none."""
    path = unix_path(settings.listen)
    if path is None or settings.workers == 1:
        return ()
    return [path, *(Path(f"{path}.{n}") for n in range(1, settings.workers))]


def _policy_frame(digest: str, text: bytes, path: Path) -> bytes:
    return frames.frame(frames.PolicyText(digest, text.decode(), str(path.absolute())))
