"""ext_authz in this process, real Envoys with and without leases in front of it, and one expert that records."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import yaml

from ext_authz.demo.ports import HOST, free_ports
from ext_authz.observe.metrics import Tally
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.control import Control, Leasing
from ext_authz.serve.epoch import NO_POLICY, Epoch
from ext_authz.sources.keys import KeyStore, Pace
from ext_authz.wire.ads import Ads
from ext_authz.wire.bootstrap import envoy_file
from tests.harness import envoy, tokens
from tests.harness.loop import Loop
from tests.harness.policies import HEAD
from tests.harness.proxy import Proxy
from tests.harness.upstream import Upstream
from tests.harness.waiting import wait_for

RULES = """\
leeway: 1s
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

# Removed from the template, so that the expert sees whom the decision permits.
_HIDES_TARGET = "request_headers_to_remove: [x-target-cluster, x-requested-cluster]"


@dataclass(repr=False)
class Leased:
    """All of it. Coroutines run on `loop`, through `run`."""

    directory: Path
    upstream: Upstream = field(default_factory=lambda: Upstream("any"))
    loop: Loop = field(default_factory=Loop)
    tally: Tally = field(default_factory=Tally)
    proxies: list[Proxy] = field(default_factory=list)
    held: asyncio.Event | None = None  # if there is one, ext_authz decides at once and answers when it is set
    decided: int = 0

    @property
    def policy(self) -> Path:
        return self.directory / "policy.yaml"

    @property
    def text(self) -> str:
        """The policy that every test starts with."""
        return HEAD + RULES.format(at=f"{HOST}:{self.upstream.port}")

    def run(self, work: Any) -> Any:
        return self.loop.run(work)

    async def start(self, entries: int, settle: float) -> None:
        await self.upstream.start()
        self.write_keys("")
        self.policy.write_text(self.text)
        self.keys = KeyStore(pace=Pace(refresh_apart=0.0))
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
        """A running Envoy; `change` may edit its HTTP connection manager before the start."""
        port, admin = free_ports(2)
        config = yaml.safe_load(envoy.configuration(port, admin, f"{self.directory}/authz.sock", _showing_target))
        manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        authz = next(f for f in manager["http_filters"] if f["name"] == "envoy.filters.http.ext_authz")
        authz["typed_config"]["grpc_service"]["timeout"] = "5s"  # this process does much besides deciding
        change(manager)
        file = self.directory / f"envoy-{port}.yaml"
        file.write_text(yaml.safe_dump(config))
        log = self.directory / f"envoy-{port}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                envoy.command(file, 1), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        proxy = Proxy(self.upstream, port, admin, process, log)
        self.proxies.append(proxy)
        wait_for(lambda: proxy.send(experts="O").status == 200, "envoy", self)
        return proxy

    def wait_for_leases(self) -> None:
        """Until leases are granted."""
        wait_for(lambda: self.control.lease_epoch is not None, "leases")

    def swap(self, text: str) -> None:
        """Put a policy in force."""
        self.policy.write_text(text)
        assert self.run(self.control.reload()) or self.control.status.error is None

    def rotate(self, *names: str) -> None:
        """Put these keys, and no others, in force."""
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


def _showing_target(template: str) -> str:
    assert _HIDES_TARGET in template
    return template.replace(_HIDES_TARGET, "request_headers_to_remove: []")


def without_leases(manager: Any) -> None:
    """An Envoy that has ext_authz and does not know leases."""
    del manager["http_filters"][0]
    del manager["http_filters"][0]["typed_config"]["filter_enabled_metadata"]


@contextlib.contextmanager
def leased(entries: int = 1000, settle: float = 0.05) -> Iterator[Leased]:
    """A running system, without an Envoy so far."""
    with tempfile.TemporaryDirectory(prefix="srp-") as made:
        it = Leased(Path(made))
        it.run(it.start(entries, settle))
        try:
            yield it
        finally:
            it.close()
