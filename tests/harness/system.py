"""The whole proxy for tests: a real Envoy, a real `srp serve`, real experts, all on loopback and on free ports."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ext_authz.demo.ports import HOST, free_ports
from ext_authz.policyfile.parse import parse_policy
from tests.harness import envoy
from tests.harness.answer import Answer, lower
from tests.harness.process import Process
from tests.harness.waiting import wait_for


@dataclass
class System:
    """Envoy, `srp serve` and experts. `experts` maps a name to one process per replica."""

    directory: Path
    port: int = 0
    admin: int = 0
    status_port: int = 0
    envoy: Process = field(init=False)
    authz: Process = field(init=False)
    experts: dict[str, list[Process]] = field(default_factory=dict)
    ports: dict[str, list[int]] = field(default_factory=dict)

    @property
    def policy(self) -> Path:
        return self.directory / "policy.yaml"

    def send(
        self,
        path: str = "/route",
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | dict[str, Any] | None = None,
        token: str | None = None,
        experts: Any = None,
        method: str = "POST",
        timeout: float = 10,
    ) -> Answer:
        """One request with exactly these headers. `experts` is a shorthand for the demo's JSON body."""
        if experts is not None:
            body = {"token_id": 101, "expert_names": experts}
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        began = time.monotonic()
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_accept_encoding=True)
            if token is not None:
                connection.putheader("authorization", f"Bearer {token}")
            for name, value in headers:
                connection.putheader(name, value)
            if data is not None:
                connection.putheader("content-length", str(len(data)))
            connection.endheaders(data)
            response = connection.getresponse()
            found, content = lower(response.getheaders()), response.read()
            return Answer(response.status, found, content, time.monotonic() - began)

    def status(self) -> Any:
        return get_json(self.status_port, "/status")

    def seen(self, name: str) -> dict[str, int]:
        """The requests that reached an expert's replicas: `x-srp-tier|x-srp-subject` to count."""
        total: dict[str, int] = {}
        for port in self.ports[name]:
            for who, n in get_json(port, "/seen").items():
                total[who] = total.get(who, 0) + n
        return total

    def served(self, name: str) -> int:
        return sum(self.seen(name).values())

    def write_policy(self, text: str) -> None:
        """Replace the policy file in one step, as a kubelet or an editor does."""
        new = self.policy.with_name(".policy.new")
        new.write_text(text)
        new.rename(self.policy)

    @property
    def digest(self) -> str:
        """The digest of the policy in force."""
        return str(self.status()["policy"]["digest"])

    def swap(self, text: str) -> str:
        """Put a policy in force. Returns its digest."""
        wanted = parse_policy(text, "policy.yaml", self.directory).digest
        self.write_policy(text)
        wait_for(lambda: self.digest == wanted, f"policy {wanted}", self, seconds=10)
        return wanted

    def restart_authz(self) -> None:
        self.authz.start()
        wait_for(lambda: self.send(experts=["A"]).status == 200, "ext_authz to be back")


@contextlib.contextmanager
def system(
    policy: Callable[[Mapping[str, list[int]]], str],
    replicas: Mapping[str, int],
    files: Mapping[str, bytes] | None = None,
    *,
    expert_flags: Mapping[str, Sequence[str]] | None = None,
    serve_flags: Sequence[str] = (),
    workers: int = 2,
    expert_command: Sequence[str] = (sys.executable, "-m", "experts"),
    envoy_config: Callable[[str], str] = str,
) -> Iterator[System]:
    """A running system. `policy` returns the policy's text for the ports of each expert's replicas.

    `expert_command` starts an expert; `--name`, `--port` and its flags are appended. `envoy_config` may change the text
    of Envoy's configuration.
    """
    with tempfile.TemporaryDirectory(prefix="srp-") as made:
        it = System(Path(made))
        spare = free_ports(3 + sum(replicas.values()))
        it.port, it.admin, it.status_port = spare[:3]
        ports = iter(spare[3:])
        for name, n in replicas.items():
            it.ports[name] = [next(ports) for _ in range(n)]
            flags = (expert_flags or {}).get(name, ("--delay", "0"))
            it.experts[name] = [
                Process(
                    [*expert_command, "--name", f"Expert_{name}", "--port", str(port), *flags],
                    it.directory / f"expert-{name}-{port}.log",
                )
                for port in it.ports[name]
            ]
        for name, data in (files or {}).items():
            (it.directory / name).write_bytes(data)
        it.policy.write_text(policy(it.ports))
        sock = it.directory / "ext_authz.sock"
        it.authz = Process(
            [
                sys.executable, "-m", "ext_authz", "serve", "--policy", str(it.policy), "--listen", f"unix:{sock}",
                "--status", f"{HOST}:{it.status_port}", "--envoy-admin", f"{HOST}:{it.admin}", *serve_flags,
            ],
            it.directory / "authz.log",
        )  # fmt: skip
        config = it.directory / "envoy.yaml"
        config.write_text(envoy_config(envoy.configuration(it.port, it.admin, str(sock))))
        it.envoy = Process(envoy.command(config, workers), it.directory / "envoy.log")
        children = [*(p for group in it.experts.values() for p in group), it.authz, it.envoy]
        try:
            for child in children:
                child.start()
            wait_for(lambda: it.send(experts=[next(iter(replicas))], method="POST").status != 503, "the system", it)
            yield it
        finally:
            for child in reversed(children):
                child.stop()


def get_json(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5) as response:
        return json.load(response)


def rss(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
