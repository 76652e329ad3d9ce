"""A real Envoy under envoy/envoy.yaml, with an ext_authz that answers as each request says, and experts that record.

Everything but Envoy runs on one event loop in a thread of its own, so that health checks are answered between tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import aiohttp
import grpc.aio

from ext_authz.core.policy import Endpoint, Expert, Health, Policy, Traffic
from ext_authz.demo.ports import HOST
from ext_authz.wire.ads import Ads, Resources
from ext_authz.wire.clusters import cluster_resources
from tests.harness import envoy
from tests.harness.answer import Answer, lower
from tests.harness.loop import Loop
from tests.harness.stub_authz import StubAuthz
from tests.harness.upstream import Upstream
from tests.harness.waiting import until

FAST = Traffic(health=Health(interval=0.2), connect_timeout=0.3)

T = TypeVar("T")


class Rig:
    """Envoy, ext_authz and experts. Its coroutines run on `loop`."""

    def __init__(self, loop: Loop, directory: Path, *, settle: float = 0.1) -> None:
        self._loop = loop
        self.directory = directory
        self._socket = str(directory / "authz.sock")
        self._server: grpc.aio.Server | None = None
        self._envoy: subprocess.Popen[bytes] | None = None
        self._settle = settle
        self.authz = StubAuthz()
        self.ads = Ads(settle)
        self.resources: Resources | None = None
        self._clusters: dict[str, str] = {}  # Envoy's name of each cluster in the last policy that has it
        self.experts: dict[str, list[Upstream]] = {}
        self.port = self.admin = 0
        self.log = directory / "envoy.log"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)

    # ---- the parts ----

    async def add(self, name: str, replicas: int = 1) -> Sequence[Upstream]:
        self.experts[name] = [await Upstream(name).start() for _ in range(replicas)]
        return self.experts[name]

    def policy(self, names: Sequence[str] = (), **traffic: Any) -> Policy:
        """A policy with these experts (default: all of them), at their endpoints."""
        common = replace(FAST, **traffic)
        return policy({n: [Endpoint(HOST, u.port) for u in self.experts[n]] for n in names or self.experts}, common)

    async def start_authz(self) -> None:
        """A new server, as after a restart: it publishes what was last published."""
        self.ads = Ads(self._settle)
        if self.resources is not None:
            await self.ads.publish(self.resources)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self.authz.handlers(), self.ads.handlers()))
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()

    async def stop_authz(self) -> None:
        if self._server is not None:
            await self.ads.close()
            await self._server.stop(0)
            self._server = None

    async def publish(self, policy: Policy, timeout: float = 2.0) -> Any:
        self.resources = cluster_resources(policy)
        self._clusters |= {e.cluster: policy.envoy_clusters[e.name] for e in policy.experts.values()}
        return await self.ads.publish(self.resources, timeout)

    async def start_envoy(self, change: Callable[[str], str] = str) -> None:
        config = self.directory / "envoy.yaml"
        config.write_text(envoy.configuration(self.port, 0, self._socket, change))
        address = self.directory / "admin"
        address.unlink(missing_ok=True)
        command = envoy.command(config, 2, "--admin-address-path", str(address))
        with self.log.open("ab") as out:
            self._envoy = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        await until(lambda: address.exists() and address.read_text().strip(), "envoy's admin address", self)
        self.admin = int(address.read_text().rpartition(":")[2])
        while "LIVE" not in await self.ask_admin("/ready"):
            await asyncio.sleep(0.02)
        statuses = (await self.ask_admin("/listeners?format=json"))["listener_statuses"]
        self.port = statuses[0]["local_address"]["socket_address"]["port_value"]

    async def stop_envoy(self) -> None:
        if self._envoy is not None:
            self._envoy.terminate()
            await asyncio.to_thread(self._envoy.wait)
            self._envoy = None

    async def close(self) -> None:
        await self.stop_envoy()
        await self.stop_authz()
        for upstream in (u for group in self.experts.values() for u in group):
            upstream.release.set()
            await upstream.stop()

    # ---- asking ----

    def target(self, text: str) -> str:
        """`text` with the names of clusters that Envoy has for them: `expert-a;w=2` is `expert-a.DIGEST;w=2` there."""
        return re.sub("[a-z0-9-]+", lambda name: self._clusters.get(name[0], name[0]), text)

    async def ask_admin(self, path: str) -> Any:
        async with aiohttp.ClientSession() as session, session.get(f"http://{HOST}:{self.admin}{path}") as response:
            text = await response.text()
            return json.loads(text) if "json" in path else text

    async def send(
        self,
        target: str | None = None,
        *,
        path: str = "/",
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"{}",
        set: Mapping[str, str] = MappingProxyType({}),
        **script: Any,
    ) -> Answer:
        """One request on a connection of its own. ext_authz answers with `target` and `set`, or as `script` says.

        Only in `target` are clusters named as in the policy.
        """
        chosen = {**set} if target is None else {"x-target-cluster": self.target(target), **set}
        sent = [*headers, ("x-test", json.dumps({"set": chosen, **script}))]
        began = time.monotonic()
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://{HOST}:{self.port}{path}", data=body, headers=sent) as response,
        ):
            body = await response.read()
            return Answer(response.status, lower([*response.headers.items()]), body, time.monotonic() - began)

    async def healthy(self, **expected: int) -> None:
        """Until Envoy sees this many healthy endpoints of each cluster (`expert_a=1` means cluster expert-a)."""
        lines = {f"cluster.{name.replace('_', '-')}.membership_healthy: {n}" for name, n in expected.items()}
        deadline = time.monotonic() + 10
        while not lines <= set((await self.ask_admin("/stats?filter=membership_healthy")).splitlines()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"envoy never saw {expected}:\n{await self.ask_admin('/clusters')}")
            await asyncio.sleep(0.02)


def policy(endpoints: Mapping[str, Sequence[Endpoint]], traffic: Traffic = FAST) -> Policy:
    """Experts of one tier; expert A has cluster expert-a."""
    experts = {n: Expert(n, 0, f"expert-{n.lower()}", tuple(e), traffic=traffic) for n, e in endpoints.items()}
    return Policy(tiers=("low",), experts=experts)


@contextlib.contextmanager
def rig(experts: Mapping[str, int], *, settle: float = 0.1, **traffic: Any) -> Iterator[Rig]:
    """A running rig with the given number of replicas of each expert, all of them known to Envoy and healthy."""
    loop = Loop()
    with tempfile.TemporaryDirectory(prefix="srp-") as made:
        it = Rig(loop, Path(made), settle=settle)

        async def start() -> None:
            for name, replicas in experts.items():
                await it.add(name, replicas)
            await it.publish(it.policy(**traffic))
            await it.start_authz()
            await it.start_envoy()

        try:
            loop.run(start())
            yield it
        finally:
            loop.run(it.close())
            loop.close()
