"""ext_authz in this process, real Envoys with and without leases before it, and one expert that tells what it got."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import yaml

from ext_authz.observe.metrics import Tally
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.control import Control, Leasing
from ext_authz.serve.epoch import NO_POLICY, Epoch
from ext_authz.sources.keys import KeyStore, Pace
from ext_authz.wire.ads import Ads
from ext_authz.wire.bootstrap import bootstrap, envoy_file
from tests.harness import tokens
from tests.harness.rig import Loop, Upstream
from tests.harness.system import ENVOY, HOST, free_ports

POLICY = """\
version: 1
tiers: [low, high]
issuers:
  - {{issuer: {issuer}, audiences: [{audience}], algorithms: [ES256], jwks: {{file: jwks.json}}}}
anonymous: low
leeway: 1s
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: ["{at}"], health: false}}
  B: {{tier: low, cluster: expert-b, endpoints: ["{at}"], health: false}}
  C: {{tier: high, cluster: expert-c, endpoints: ["{at}"], health: false, downgrade_to: [B]}}
  D: {{tier: high, cluster: expert-d, endpoints: ["{at}"], health: false}}
  R: {{tier: low, cluster: expert-r, endpoints: ["{at}"], health: false, allow: 'request.method == "POST"'}}
  S: {{tier: high, cluster: expert-s, endpoints: ["{at}"], health: false, downgrade_to: [R, B]}}
  O: {{tier: low, cluster: expert-o, endpoints: ["{at}"], health: false, lease: 0}}
  T: {{tier: low, cluster: expert-t, endpoints: ["{at}"], health: false, lease: 400ms}}
gate:
  - {{path: /route, json: /expert_names, default: [A, B]}}
  - {{prefix: /asked/, header: x-target-cluster, default: [A, B]}}
  - {{prefix: /always, default: [A]}}
  - {{prefix: /, header: x-expert-names, default: [A, B]}}
"""

# The expert is to see whom the decision permits.
_SHOWN = "request_headers_to_remove: [x-target-cluster, x-requested-cluster]"


@dataclass(frozen=True)
class Answer:
    """What the client got, and what the expert did (None if no expert was asked). Header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    upstream: dict[str, str] | None = None

    @property
    def id(self) -> str:
        return self.headers.get("x-srp-decision-id", "")


@dataclass(repr=False)
class Proxy:
    """One Envoy of one worker thread."""

    upstream: Upstream
    port: int
    admin: int
    process: subprocess.Popen[bytes]
    log: Path

    def send(
        self,
        path: str = "/x",
        *,
        token: str | None = None,
        experts: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        method: str = "GET",
        chunked: bool = False,
        pause: float = 0.0,
    ) -> Answer:
        """One request on a connection of its own, its headers as given; its body comes `pause` seconds after them."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        before = len(self.upstream.seen)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_accept_encoding=True)
            if token is not None:
                connection.putheader("authorization", f"Bearer {token}")
            if experts is not None:
                connection.putheader("x-expert-names", experts)
            for name, value in headers:
                connection.putheader(name, value)
            if chunked:
                connection.putheader("transfer-encoding", "chunked")
            elif body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders()
            time.sleep(pause)
            if chunked:
                connection.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")
            elif body:
                connection.send(body)
            response = connection.getresponse()
            found = {k.lower(): v for k, v in response.getheaders()}
            content = response.read()
        seen = self.upstream.seen[before:]
        got = {k.lower(): ",".join(seen[-1].headers.getall(k)) for k in seen[-1].headers} if seen else None
        return Answer(response.status, found, content, got)

    def leased(self, **request: Any) -> bool:
        """Whether the second of two such requests is answered by the decision on the first."""
        first, second = self.send(**request), self.send(**request)
        assert first.status == second.status
        return first.id == second.id

    def counters(self) -> dict[str, int]:
        """The lease filter's counters of this epoch, those of all pushes, and how often ext_authz was not asked."""
        stats = self._admin("/stats?format=json&filter=lua.lease|srp.lease.config_reload|ext_authz.disabled")["stats"]
        found = dict.fromkeys(("hits", "misses", "stores", "evictions"), 0)
        return found | {s["name"].rpartition(".")[2]: s["value"] for s in stats if "value" in s}

    def memory(self) -> int:
        return int(self._admin("/memory")["allocated"])

    def _admin(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{HOST}:{self.admin}{path}", timeout=5) as response:
            return json.load(response)


@dataclass(repr=False)
class Leased:
    """The whole. What is asynchronous runs on `loop`, by `run`."""

    directory: Path
    upstream: Upstream = field(default_factory=lambda: Upstream("any"))
    loop: Loop = field(default_factory=Loop)
    tally: Tally = field(default_factory=Tally)
    proxies: list[Proxy] = field(default_factory=list)
    held: asyncio.Event | None = None  # while set, answers of ext_authz wait for it, once decided
    decided: int = 0

    @property
    def policy(self) -> Path:
        return self.directory / "policy.yaml"

    @property
    def text(self) -> str:
        """The policy that every test begins with."""
        return POLICY.format(issuer=tokens.ISSUER, audience=tokens.AUDIENCE, at=f"{HOST}:{self.upstream.port}")

    def run(self, work: Any) -> Any:
        return self.loop.run(work)

    async def start(self, entries: int, settle: float) -> None:
        await self.upstream.start()
        self.write_keys("")
        self.policy.write_text(self.text)
        self.keys = KeyStore(pace=Pace(refresh_apart=0.0, file_interval=3600.0))
        self.ads = Ads(settle)
        self.authorization = Authorization(NO_POLICY, self.keys, self.tally)
        self.control = Control(
            self.policy, self.keys, self.ads, self._install, Leasing(envoy_file("lease.lua").read_text(), entries)
        )
        await self.control.start()
        self.server = grpc.aio.server()
        check = grpc.unary_unary_rpc_method_handler(self._check)
        authorization = grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": check})
        self.server.add_generic_rpc_handlers((authorization, self.ads.handlers()))
        self.server.add_insecure_port(f"unix:{self.directory}/authz.sock")
        await self.server.start()

    def _install(self, epoch: Epoch) -> None:
        self.authorization.epoch = epoch

    async def _check(self, data: bytes, context: Any) -> bytes:
        answer = await self.authorization.check(data, context)
        self.decided += 1
        if self.held is not None:
            await self.held.wait()
        return answer

    def write_keys(self, *names: str) -> None:
        keys = [tokens.jwk("ES256", name) for name in names]
        (self.directory / "jwks.json").write_text(json.dumps({"keys": keys}))

    def add_proxy(self, change: Callable[[Any], None] = lambda manager: None) -> Proxy:
        """A running Envoy; `change` has its HTTP connection manager in hand before it starts."""
        template = envoy_file("envoy.yaml").read_text().replace(_SHOWN, "request_headers_to_remove: []")
        assert template != envoy_file("envoy.yaml").read_text()
        port, admin = free_ports(2)
        config = yaml.safe_load(
            bootstrap(
                template,
                listen=(HOST, port), admin=(HOST, admin), socket=f"{self.directory}/authz.sock",
                lua=str(envoy_file("least_request.lua")),
            )
        )  # fmt: skip
        manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        authz = next(f for f in manager["http_filters"] if f["name"] == "envoy.filters.http.ext_authz")
        authz["typed_config"]["grpc_service"]["timeout"] = "5s"  # this process has better things to do, too
        change(manager)
        file = self.directory / f"envoy-{port}.yaml"
        file.write_text(yaml.safe_dump(config))
        log = self.directory / f"envoy-{port}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [ENVOY, "-c", str(file), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        proxy = Proxy(self.upstream, port, admin, process, log)
        self.proxies.append(proxy)
        wait_for(lambda: proxy.send(experts="O").status == 200, "envoy")
        return proxy

    def granting(self) -> None:
        """Until leases are granted."""
        wait_for(lambda: self.control.lease_epoch is not None, "leases")

    def swap(self, text: str) -> None:
        """Put a policy in force."""
        self.policy.write_text(text)
        assert self.run(self.control.reload()) or self.control.status.error is None

    def rotate(self, *names: str) -> None:
        """Have these keys and no others, everywhere."""
        self.write_keys(*names)

        async def play() -> None:
            await self.keys.refresh(tokens.ISSUER)
            if self.control._pushing is not None:
                await self.control._pushing

        self.run(play())

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.process.terminate()
            proxy.process.wait()

        async def stop() -> None:
            await self.control.close()
            await self.ads.close()
            await self.server.stop(0)
            await self.keys.close()
            self.upstream.release.set()
            await self.upstream.stop()

        self.run(stop())
        self.loop.close()


def without_leases(manager: Any) -> None:
    """Somebody else's Envoy: it has ext_authz and never heard of leases."""
    del manager["http_filters"][0]
    del manager["http_filters"][0]["typed_config"]["filter_enabled_metadata"]


@contextlib.contextmanager
def leased(entries: int = 1000, settle: float = 0.05) -> Iterator[Leased]:
    """A running system without an Envoy yet."""
    with tempfile.TemporaryDirectory(prefix="srp-") as made:
        it = Leased(Path(made))
        it.run(it.start(entries, settle))
        try:
            yield it
        finally:
            it.close()


def wait_for(holds: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if holds():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.01)
