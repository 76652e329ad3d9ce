"""The whole proxy for tests: a real Envoy, a real `srp serve`, real experts, all on loopback and on free ports."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ext_authz.demo.ports import HOST, free_ports
from ext_authz.wire.bootstrap import bootstrap, envoy_file
from tests.harness import ROOT

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy") or "envoy"


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; header names in lower case, repeated ones joined by a comma."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


@dataclass
class Proc:
    """A child process that can be killed, stopped and started again under the same command line."""

    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass
class System:
    """Envoy, `srp serve` and experts. `experts` maps a name to one process a replica."""

    directory: Path
    port: int = 0
    admin: int = 0
    status_port: int = 0
    envoy: Proc = field(init=False)
    authz: Proc = field(init=False)
    experts: dict[str, list[Proc]] = field(default_factory=dict)
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
        """One request, its headers exactly as given. `experts` is a shorthand for the demo's JSON body."""
        if experts is not None:
            body = {"token_id": 101, "expert_names": experts}
        data = json.dumps(body).encode() if isinstance(body, dict) else body
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
            found: dict[str, str] = {}
            for name, value in response.getheaders():
                found[name.lower()] = f"{found[name.lower()]},{value}" if name.lower() in found else value
            return Answer(response.status, found, response.read())

    def status(self) -> Any:
        return get_json(self.status_port, "/status")

    def seen(self, name: str) -> dict[str, int]:
        """What has reached the replicas of an expert: `x-srp-tier|x-srp-subject` to count."""
        total: dict[str, int] = {}
        for port in self.ports[name]:
            for who, n in get_json(port, "/seen").items():
                total[who] = total.get(who, 0) + n
        return total

    def served(self, name: str) -> int:
        return sum(self.seen(name).values())

    def write_policy(self, text: str) -> None:
        """Replace the policy in one step, as a kubelet or an editor does."""
        new = self.policy.with_name(".policy.new")
        new.write_text(text)
        new.rename(self.policy)

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
    """A running system. `policy` makes the policy's text from the ports of each expert's replicas.

    `expert_command` starts an expert, with `--name`, `--port` and its flags after it; `envoy_config` may change the
    text of Envoy's configuration.
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
                Proc(
                    [*expert_command, "--name", f"Expert_{name}", "--port", str(port), *flags],
                    it.directory / f"expert-{name}-{port}.log",
                )
                for port in it.ports[name]
            ]
        for name, data in (files or {}).items():
            (it.directory / name).write_bytes(data)
        it.policy.write_text(policy(it.ports))
        sock = it.directory / "ext_authz.sock"
        it.authz = Proc(
            [
                sys.executable, "-m", "ext_authz", "serve", "--policy", str(it.policy), "--listen", f"unix:{sock}",
                "--status", f"{HOST}:{it.status_port}", "--envoy-admin", f"{HOST}:{it.admin}", *serve_flags,
            ],
            it.directory / "authz.log",
        )  # fmt: skip
        config = it.directory / "envoy.yaml"
        template, lua = envoy_file("envoy.yaml").read_text(), str(envoy_file("least_request.lua"))
        listen, admin = (HOST, it.port), (HOST, it.admin)
        made_for_here = bootstrap(template, listen=listen, admin=admin, socket=str(sock), lua=lua)
        config.write_text(envoy_config(made_for_here))
        it.envoy = Proc(
            [
                ENVOY, "-c", str(config), "--concurrency", str(workers), "--log-level", "warning",
                "--disable-hot-restart",
            ],
            it.directory / "envoy.log",
        )  # fmt: skip
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


def wait_for(ready: Callable[[], bool], what: str, it: System | None = None, seconds: float = 30) -> None:
    """Until `ready()` holds; TimeoutError, with the logs' tails, if it does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ready():
                return
        time.sleep(0.05)
    logs = "\n".join(f"{f.name}: {f.read_text()[-2000:]}" for f in it.directory.glob("*.log")) if it else ""
    raise TimeoutError(f"waited {seconds} s for {what}\n{logs}")


def pause(proc: Proc) -> None:
    proc.signal(signal.SIGSTOP)


def resume(proc: Proc) -> None:
    proc.signal(signal.SIGCONT)


def rss(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
