"""A whole gateway whose policy and keys may change at any time, with a judge behind it.

ext_authz, the backends and the clients run on the test's event loop, so their times compare. Envoys are processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import grpc.aio

from ext_authz.demo.ports import HOST, free_ports
from ext_authz.observe.metrics import Tally
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.control import WORKER_LAG, Control, Leasing
from ext_authz.serve.epoch import NO_POLICY, Epoch
from ext_authz.sources.keys import KeyStore, Pace
from ext_authz.wire.ads import SETTLE_TIME, Ads
from ext_authz.wire.bootstrap import envoy_file
from tests.harness import envoy, tokens
from tests.harness.backends import Backends
from tests.harness.process import Process
from tests.harness.rules import Caller, Keys, Rules
from tests.harness.timeline import Change, Judge, Request, Timeline

PACE = Pace(refresh_apart=0.0)
PATIENCE = 20.0  # seconds to wait for anything


class Gateway:
    """`breaches` says what reached a backend and should not have; `now` is in seconds since the start.

    `open` is the number of requests without an answer so far, `held` of those that a backend holds.
    """

    def __init__(self, directory: Path, backends: Sequence[str], envoys: int, settle: float) -> None:
        self._directory = directory
        self._settle = settle
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._backends = Backends(backends, self._arrived)
        self._ports = [free_ports(2) for _ in range(envoys)]  # listener and admin
        self._news = [asyncio.Event() for _ in range(envoys)]
        self._following: list[asyncio.Task[None]] = []
        self._release = asyncio.Event()
        self._decisions: set[str] = set()
        self._epoch = NO_POLICY
        self.envoys: list[Process] = []
        self.policies: Timeline[Rules] = Timeline(envoys)
        self.keys: Timeline[Keys] = Timeline(envoys)
        self.requests: list[Request] = []
        self.breaches: list[str] = []
        self.counts: Counter[str] = Counter()
        self.open = self.held = 0

    @property
    def now(self) -> float:
        return self._loop.time() - self._began

    async def start(self, rules: Rules) -> None:
        """Start everything, and wait until `rules` have settled."""
        await self._backends.start()
        await self.start_authz(rules)
        for n, (listener, admin) in enumerate(self._ports):
            config = self._directory / f"envoy-{n}.yaml"
            config.write_text(envoy.configuration(listener, admin, str(self._socket)))
            self.envoys.append(Process(envoy.command(config, 1), self._directory / f"envoy-{n}.log"))
            self.envoys[n].start()
        await asyncio.gather(*(self._answers(n) for n in range(len(self._ports))))
        self._following = [asyncio.create_task(self._follow(n)) for n in range(len(self._ports))]
        await self.settled()

    async def close(self) -> None:
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in self.envoys))
        await self.stop_authz()
        self.release()
        await self._backends.close()

    # ---- processes ----

    async def start_authz(self, rules: Rules) -> None:
        """Start ext_authz with a new policy and the first key."""
        self._write_keys("")
        change = self._write_policy(rules)
        self._key_store = KeyStore(pace=PACE)
        self._ads = Ads(self._settle)
        self._authorization = Authorization(NO_POLICY, self._key_store, Tally())
        script = envoy_file("lease.lua").read_text()
        self.control = Control(self._policy, self._key_store, self._ads, self._install, Leasing(script))
        await self.control.start()
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self._authorization.handlers(), self._ads.handlers()))
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        self._report(self.policies, change.digest)
        self._report_keys()

    async def stop_authz(self) -> None:
        """Checks under way are cut off."""
        await self.control.close()
        await self._ads.close()
        await self._server.stop(0)
        await self._key_store.close()

    async def restart_envoy(self, n: int) -> None:
        """Kill an Envoy and start it again; it has forgotten everything."""
        await asyncio.to_thread(self.envoys[n].kill)
        self.envoys[n].start()
        await self._answers(n)

    async def _answers(self, n: int) -> None:
        """Wait until Envoy answers requests."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await _fetch(self._ports[n][0], "/")
                    return
                await asyncio.sleep(0.01)

    async def connected(self) -> None:
        """Wait until every Envoy has a stream to ext_authz."""
        async with asyncio.timeout(PATIENCE):
            while self._ads.connected < len(self._ports):
                await asyncio.sleep(0.01)

    # ---- changes ----

    async def edit(self, rules: Rules) -> bool:
        """Write a policy and have it adopted. Returns whether it is in force."""
        change = self._write_policy(rules)
        await self.control.reload()
        self._report(self.policies, self.control.status.digest)
        change.dropped = change.reported == inf  # rejected, or overwritten before it was read
        self._report_keys()  # if the old policy did not name the issuer, the new one has brought its keys
        return not change.dropped

    async def rotate(self, *names: str) -> None:
        """Have these keys and no others. Without names, an empty set, which is rejected: the good keys stay."""
        self._write_keys(*names)
        newest = self.keys.newest
        await self._key_store.refresh(tokens.ISSUER)
        while names and newest is self.keys.newest and tokens.ISSUER in self._key_store.keys:
            if self._report_keys():
                return
            await self._key_store.refresh(tokens.ISSUER)  # the last one may have read the old file

    async def settled(self) -> None:
        """Wait until no Envoy uses anything older than what was reported last."""
        async with asyncio.timeout(PATIENCE):
            while not all(at <= self.now for change in self._reported() for at in change.settled):
                await asyncio.sleep(0.005)

    @property
    def _policy(self) -> Path:
        return self._directory / "policy.yaml"

    @property
    def _socket(self) -> Path:
        return self._directory / "authz.sock"

    def _write_policy(self, rules: Rules) -> Change[Rules]:
        text = rules.text(self._backends.address, f"policy {len(self.policies.changes)}").encode()
        change = self.policies.begin(rules, hashlib.sha256(text).hexdigest()[:12], self.now)
        _replace(self._policy, text)
        return change

    def _write_keys(self, *names: str) -> None:
        if names:
            self.keys.begin(frozenset(names), str(len(self.keys.changes)), self.now)
        jwks = {"keys": [tokens.jwk("ES256", name) for name in names]}
        _replace(self._directory / "jwks.json", json.dumps(jwks).encode())

    def _install(self, epoch: Epoch) -> None:
        self._epoch = self._authorization.epoch = epoch

    def _report(self, timeline: Timeline[Any], digest: str) -> None:
        timeline.report(digest, self.now)
        for news in self._news:
            news.set()

    def _report_keys(self) -> bool:
        """Report the newest keys in force if ext_authz has them. Returns whether it has."""
        newest = self.keys.newest
        wanted = {tokens.kid_of("ES256", name) for name in newest.value}
        if {key.kid for key in self._key_store.keys.get(tokens.ISSUER, ())} != wanted:
            return False
        self._report(self.keys, newest.digest)
        return True

    def _reported(self) -> list[Change[Any]]:
        return [change for change in (self.policies.reported, self.keys.reported) if change is not None]

    async def _follow(self, n: int) -> None:
        """Record when an Envoy acknowledges what was reported: it has the lease filter, which is sent last."""
        while True:
            await self._news[n].wait()
            self._news[n].clear()
            reported = self._reported()
            while await self._lease_epoch(n) != self._epoch.lease_epoch:
                await asyncio.sleep(0.005)
            for change in reported:
                change.settled[n] = min(change.settled[n], self.now + WORKER_LAG)

    async def _lease_epoch(self, n: int) -> str:
        """The epoch of Envoy's lease filter. A frozen Envoy answers when it runs again."""
        try:
            text = await _fetch(self._ports[n][1], "/config_dump?resource=ecds_filters")
        except (OSError, asyncio.IncompleteReadError):
            return ""
        found = re.search(r"epoch[^0-9a-f]{1,12}([0-9a-f]{16})", text)
        return found[1] if found else ""

    # ---- requests ----

    async def ask(
        self, caller: Caller, *names: str, envoy: int = 0, gate: str = "header", fate: str = "answer"
    ) -> None:
        """One request on its own connection. `gate` says where it names its experts: `header` or `body`."""
        request = Request(len(self.requests), caller, names, envoy, gate, fate, self.now)
        self.requests.append(request)
        self.open += 1
        try:
            await self._exchange(request)
        except (OSError, asyncio.IncompleteReadError):
            self.counts["broken"] += 1
        finally:
            self.open -= 1

    def release(self) -> None:
        """Let go of every request that is held."""
        self._release.set()
        self._release = asyncio.Event()

    async def _exchange(self, request: Request) -> None:
        headers, path, body = [f"baggage: {request.number}"], "/x", b""
        if request.caller.token is not None:
            headers.append(f"authorization: Bearer {request.caller.token}")
        if request.gate == "header":
            headers.append(f"x-expert-names: {','.join(request.names)}")
        else:
            path, body = "/route", json.dumps({"expert_names": request.names}).encode()
        head = await _fetch(self._ports[request.envoy][0], path, headers, body)
        self.counts[head.split(None, 2)[1]] += 1
        decision = re.search(r"^x-srp-decision-id: (\w+)", head, re.MULTILINE)
        if decision:
            self.counts["leased"] += decision[1] in self._decisions
            self._decisions.add(decision[1])

    async def _arrived(self, backend: str, number: str) -> int:
        """Judge an arrival, and let the request meet its fate."""
        request = self.requests[int(number)]
        breach = self._judge.breach(request, backend, self.now)
        if breach:
            self.breaches.append(breach)
        self.counts["under one policy"] += self._judge.certain(request)
        request.arrivals.append((backend, self.now))
        if len(request.arrivals) > 1:
            self.counts["retried"] += 1
            return 200
        if request.fate.startswith("hold"):
            self.held += 1
            await self._release.wait()
            self.held -= 1
        return {"close": 0, "fail": 503}.get(request.fate.removeprefix("hold, "), 200)

    @property
    def _judge(self) -> Judge:
        return Judge(self.policies, self.keys)


@contextlib.asynccontextmanager
async def gateway(
    backends: Sequence[str], rules: Rules, envoys: int = 1, settle: float = SETTLE_TIME
) -> AsyncIterator[Gateway]:
    """A running gateway. `settle` is the time in seconds that new clusters get for their first health check."""
    with tempfile.TemporaryDirectory(prefix="srp-") as made:
        it = Gateway(Path(made), backends, envoys, settle)
        try:
            await it.start(rules)
            yield it
        finally:
            await it.close()


async def _fetch(port: int, path: str, headers: Sequence[str] = (), body: bytes = b"") -> str:
    """The answer, head and body, to a request on its own connection: GET, or POST with a body."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        lines = [f"{'POST' if body else 'GET'} {path} HTTP/1.1", "host: x", "connection: close", *headers]
        writer.write("\r\n".join([*lines, f"content-length: {len(body)}", "\r\n"]).encode() + body)
        answer = await reader.read(-1)
        if not answer.startswith(b"HTTP/1.1 "):
            raise asyncio.IncompleteReadError(answer, None)
        return answer.decode()
    finally:
        writer.close()


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.rename(path)
