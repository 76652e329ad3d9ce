"""A real Envoy under envoy/envoy.yaml, with an ext_authz that does as each request says, and experts that tell all.

Everything but Envoy runs on one event loop in a thread of its own, so that health checks are answered between tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import aiohttp
import grpc
import grpc.aio
from aiohttp import web
from envoy_data_plane.envoy.service.auth.v3 import CheckRequest, CheckResponse

from ext_authz.core.policy import Endpoint, Expert, Health, Policy, Traffic
from ext_authz.wire.ads import Ads, Resources
from ext_authz.wire.bootstrap import bootstrap, envoy_file
from ext_authz.wire.clusters import cluster_resources
from ext_authz.wire.twin import twins

HOST = "127.0.0.1"
ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or "envoy"
FAST = Traffic(health=Health(interval=0.2), connect_timeout=0.3)

_TWINS = twins(CheckRequest, CheckResponse)
T = TypeVar("T")


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 30) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def close(server: asyncio.Server) -> None:
    """Close what it listens on, when the connections it has accepted are all open.

    One that is being accepted while its server closes is never closed by anybody: asyncio's `Server._attach` fails.
    """
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener.fileno())
    for _ in ("its transport is made", "its protocol hears of it"):
        await asyncio.sleep(0)
    server.close()


@dataclass(eq=False)
class Upstream:
    """One endpoint of an expert. `status` and `headers` are its answer; a request with `x-hold` waits for `release`."""

    name: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    seen: list[web.BaseRequest] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    held: int = 0
    health_delay: float = 0.0
    port: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None

    async def start(self) -> Upstream:
        """Listen, on the same port as before if there was one."""
        self._web = web.Server(self._handle, access_log=None)
        self._server = await asyncio.get_running_loop().create_server(self._web, HOST, self.port, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Refuse connections and cut the ones there are."""
        if self._server is not None:
            await close(self._server)
            self._server = None
            await self._web.shutdown(timeout=0.01)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/healthz":
            await asyncio.sleep(self.health_delay)
            return web.Response(status=200)
        self.seen.append(request)
        self.bodies.append(await request.read())
        if "x-hold" in request.headers:
            self.held += 1
            try:
                await self.release.wait()
            finally:
                self.held -= 1
        return web.Response(status=self.status, headers=self.headers, text=self.name)


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


class StubAuthz:
    """Check for tests: `x-test` holds what to answer, as JSON. `checks` are each request's headers, as they came."""

    def __init__(self) -> None:
        self.checks: list[list[tuple[str, str]]] = []
        self.bodies: list[bytes] = []
        self.delay = 0.0

    def handlers(self) -> grpc.GenericRpcHandler:
        method = grpc.unary_unary_rpc_method_handler(self._check)
        return grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": method})

    async def _check(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        http = _TWINS[CheckRequest].FromString(data).attributes.request.http  # type: ignore[attr-defined]
        headers = [(h.key, h.raw_value.decode()) for h in http.header_map.headers]
        self.checks.append(headers)
        self.bodies.append(http.raw_body)
        if self.delay:
            await asyncio.sleep(self.delay)
        script = json.loads(dict(headers).get("x-test", "{}"))
        fields: dict[str, Any] = {}
        if deny := script.get("deny"):
            fields["status"] = {"code": 7}
            fields["denied_response"] = {
                "status": {"code": deny["status"]}, "body": deny["body"], "headers": _options(deny.get("headers", {}))
            }  # fmt: skip
        else:
            fields["ok_response"] = {
                "headers": _options(script.get("set", {})),
                "headers_to_remove": script.get("remove", ["x-requested-cluster"]),
                "response_headers_to_add": _options({"x-srp-decision": "allow"}),
            }
        fields["dynamic_metadata"] = {"fields": {"decision": {"string_value": "allow"}}}
        return bytes(_TWINS[CheckResponse](**fields).SerializeToString())


def _options(headers: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"header": {"key": k, "value": v}} for k, v in headers.items()]


class Rig:
    """Envoy, ext_authz and experts. Its coroutines run on `loop`."""

    def __init__(self, loop: Loop, directory: Path, *, settle: float = 0.1) -> None:
        self._loop = loop
        self._directory = directory
        self._socket = str(directory / "authz.sock")
        self._server: grpc.aio.Server | None = None
        self._envoy: subprocess.Popen[bytes] | None = None
        self._settle = settle
        self.authz = StubAuthz()
        self.ads = Ads(settle)
        self.resources: Resources | None = None
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
        """A policy with experts of these names (default: all there are), at the endpoints they have."""
        common = replace(FAST, **traffic)
        return policy({n: [Endpoint(HOST, u.port) for u in self.experts[n]] for n in names or self.experts}, common)

    async def start_authz(self) -> None:
        """A new server, as after a restart: it publishes what was published last."""
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
        return await self.ads.publish(self.resources, timeout)

    async def start_envoy(self, change: Callable[[str], str] = lambda text: text) -> None:
        template = change(envoy_file("envoy.yaml").read_text())
        lua = str(envoy_file(LUA))
        config = self._directory / "envoy.yaml"
        config.write_text(bootstrap(template, listen=(HOST, self.port), admin=(HOST, 0), socket=self._socket, lua=lua))
        address = self._directory / "admin"
        address.unlink(missing_ok=True)
        with self.log.open("ab") as out:
            self._envoy = subprocess.Popen(
                [
                    ENVOY, "-c", str(config), "--concurrency", "2", "--disable-hot-restart", "--log-level", "warning",
                    "--admin-address-path", str(address),
                ],
                stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
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
        """One request on a connection of its own. ext_authz answers with `target` and `set`, or as `script` says."""
        chosen = {**set} if target is None else {"x-target-cluster": target, **set}
        sent = [*headers, ("x-test", json.dumps({"set": chosen, **script}))]
        began = time.monotonic()
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://{HOST}:{self.port}{path}", data=body, headers=sent) as response,
        ):
            found = {k.lower(): ",".join(response.headers.getall(k)) for k in response.headers}
            return Answer(response.status, found, await response.read(), time.monotonic() - began)

    async def healthy(self, **expected: int) -> None:
        """Until Envoy sees so many living endpoints of each cluster (`expert_a=1` means cluster expert-a)."""

        lines = {f"cluster.{name.replace('_', '-')}.membership_healthy: {n}" for name, n in expected.items()}
        deadline = time.monotonic() + 10
        while not lines <= set((await self.ask_admin("/stats?filter=membership_healthy")).splitlines()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"envoy never saw {expected}:\n{await self.ask_admin('/clusters')}")
            await asyncio.sleep(0.02)


LUA = "least_request.lua"


def policy(endpoints: Mapping[str, Sequence[Endpoint]], traffic: Traffic = FAST) -> Policy:
    """Experts of one tier; expert A has cluster expert-a."""
    experts = {n: Expert(n, 0, f"expert-{n.lower()}", tuple(e), traffic=traffic) for n, e in endpoints.items()}
    return Policy(tiers=("low",), experts=experts)


async def until(ready: Callable[[], object], what: str, rig: Rig | None = None, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}\n{rig.log.read_text()[-3000:] if rig else ''}")
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def rig(experts: Mapping[str, int], *, settle: float = 0.1, **traffic: Any) -> Iterator[Rig]:
    """A running rig with an expert of so many replicas for each name, all of them known to Envoy and healthy."""
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
