"""A real `srp serve` without an Envoy: its status, its metrics, its log, and what each of its processes decides."""

from __future__ import annotations

import contextlib
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ext_authz.demo.ports import HOST, free_ports
from ext_authz.observe import status_text
from ext_authz.serve.authorization import SERVICE
from tests.harness.checks import check_request, client_headers
from tests.harness.process import Process
from tests.harness.system import get_json
from tests.harness.waiting import wait_for


@dataclass
class Served:
    """The server of the policy in `directory`."""

    directory: Path
    status_port: int
    process: Process

    @property
    def policy(self) -> Path:
        return self.directory / "policy.yaml"

    @property
    def socket(self) -> Path:
        return self.directory / "s"

    @property
    def log(self) -> str:
        return self.process.log.read_text()

    def status(self) -> Any:
        return get_json(self.status_port, "/status")

    def text(self) -> str:
        """What `srp status` prints."""
        return status_text.text(self.status())

    def metrics(self) -> set[str]:
        with urllib.request.urlopen(f"http://{HOST}:{self.status_port}/metrics", timeout=10) as response:
            return set(response.read().decode().splitlines())

    def reason(self, *experts: str, caller: str | None = None, worker: int = 0) -> str:
        """Why a worker's decision on a request for `experts` is what it is."""
        path = f"{self.socket}.{worker}" if worker else self.socket
        with grpc.insecure_channel(f"unix:{path}") as channel:
            answer = channel.unary_unary(f"/{SERVICE}/Check")(check_request(*experts, caller=caller), timeout=10)
        return client_headers(answer)["x-srp-reason"]

    def replace(self, name: str, data: str | bytes) -> None:
        """Replace a file in one step."""
        new = self.directory / f".{name}.new"
        new.write_bytes(data.encode() if isinstance(data, str) else data)
        new.rename(self.directory / name)


@contextlib.contextmanager
def served(directory: Path, *flags: str) -> Iterator[Served]:
    """A server that accepts checks, with `directory/policy.yaml` in force."""
    (port,) = free_ports(1)
    command = [
        sys.executable, "-m", "ext_authz", "serve", "--policy", str(directory / "policy.yaml"),
        "--listen", f"unix:{directory}/s", "--status", f"{HOST}:{port}", *flags,
    ]  # fmt: skip
    it = Served(directory, port, Process(command, directory / "authz.log"))
    it.process.start()
    try:
        wait_for(lambda: "listens on" in it.log, "the server", it)
        yield it
    finally:
        it.process.stop()
