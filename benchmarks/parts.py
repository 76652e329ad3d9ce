"""Building blocks of the benchmarks: processes and their CPU time, Envoy's configuration, the load generator."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from benchmarks.callers import AUDIENCE, ISSUER, jwks
from ext_authz.observe import lease_counts as lease_counts_
from ext_authz.observe.lease_counts import LeaseCounts
from ext_authz.wire.bootstrap import bootstrap, envoy_file

HOST = "127.0.0.1"
HERE = Path(__file__).parent
ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy") or "envoy"

_TICK = os.sysconf("SC_CLK_TCK")
Json = dict[str, Any]


class Process:
    """A child process with its log in `directory`. `cores` are the CPU cores it may use; empty: those of this one."""

    def __init__(
        self, command: Sequence[str | Path], directory: Path, name: str, cores: frozenset[int] = frozenset()
    ) -> None:
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as log, _on(cores):
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=HERE.parent,
            )
        self.pid = self._process.pid

    def cpu(self) -> float:
        """CPU seconds used so far by all threads, in user mode and in the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def rss(self) -> int:
        """Resident memory in bytes."""
        return rss(self.pid)

    def wait_for(self, ready: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until `ready()`. RuntimeError, with the end of the log, if the process ends or time runs out first."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                if ready():
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{self.log.stem} is not ready:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()


def part_cores() -> tuple[frozenset[int], frozenset[int]]:
    """One core for the servers, and the other cores for everything else. With a single core, both share it."""
    cores = sorted(os.sched_getaffinity(0))
    return (frozenset(cores[:1]), frozenset(cores[1:])) if len(cores) > 1 else (frozenset(cores), frozenset(cores))


@contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    """Start child processes on these cores: a child inherits its parent's CPU affinity."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def rss(pid: int | str = "self") -> int:
    """Resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(
    directory: Path, name: str, *flags: str | Path, policy: str = "policy.yaml", cores: frozenset[int] = frozenset()
) -> Process:
    """`srp serve` with a policy in `directory`, on the socket `directory/name`."""
    command = ["-m", "ext_authz", "serve", "--policy", directory / policy, "--listen", f"unix:{directory / name}"]
    return _server([*command, "--status", "off", *flags], directory, name, cores)


def floor(
    directory: Path, name: str, answer: bytes, *flags: str | Path, cores: frozenset[int] = frozenset()
) -> Process:
    """The empty server on the socket `directory/name`. It answers every Check with `answer`."""
    (directory / "answer").write_bytes(answer)
    return _server(["-m", "benchmarks.floor", directory / name, directory / "answer", *flags], directory, name, cores)


def _server(command: Sequence[str | Path], directory: Path, name: str, cores: frozenset[int]) -> Process:
    """Run this Python with `command`, and wait until it listens on the socket `directory/name`."""
    process = Process([sys.executable, *command], directory, f"{name}-srv", cores)
    process.wait_for((directory / name).exists)
    return process


def upstream(directory: Path, port: int) -> Process:
    """The experts: a separate Envoy that answers every request with 200 and a few bytes."""
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "{}\n"}}}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "upstream",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [_filter("router", "router.v3.Router")],
    }
    listener = {
        "name": "http",
        "address": {"socket_address": {"address": HOST, "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return _envoy(directory, "upstream", {"static_resources": {"listeners": [listener]}}, port)


def envoy(
    directory: Path,
    name: str,
    port: int,
    authz: str,
    filters: Sequence[Json] | None = None,
    targets: str = "",
    control: str = "srp",
    admin: int | None = None,
) -> Process:
    """Envoy with the project's own configuration and the ext_authz server on the socket `directory/authz`.

    The experts' clusters and the lease filter come from the server on `directory/control`. If `filters` are given, they
    replace the lease filter and ext_authz, and every request goes to `targets`. `admin` is the port of the admin
    interface; None: no admin interface.
    """
    config = yaml.safe_load(
        bootstrap(
            envoy_file("envoy.yaml").read_text(),
            listen=(HOST, port), admin=(HOST, admin) if admin else None, socket=str(directory / authz), lua=str(envoy_file("least_request.lua")),
        )
    )  # fmt: skip
    ads = next(c for c in config["static_resources"]["clusters"] if c["name"] == "ext_authz_ads")
    endpoint = ads["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"] = {"pipe": {"path": str(directory / control)}}
    if filters is not None:
        manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        manager["http_filters"][:2] = filters
        mutations = manager["early_header_mutation_extensions"][0]["typed_config"]["mutations"]
        mutations.append(
            {"append": {"header": {"key": "x-target-cluster", "value": targets}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
        )  # fmt: skip
    return _envoy(directory, name, config, port)


def native() -> list[Json]:
    """Envoy's own filters that verify a token and require a claim in it."""
    provider = {
        "issuer": ISSUER,
        "audiences": [AUDIENCE],
        "local_jwks": {"inline_string": json.dumps(jwks())},
        "payload_in_metadata": "claims",
    }
    authn = {
        "providers": {"idp": provider},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "idp"}}],
    }
    premium = {
        "filter": "envoy.filters.http.jwt_authn",
        "path": [{"key": "claims"}, {"key": "plan"}],
        "value": {"string_match": {"exact": "premium"}},
    }
    allowed = {"permissions": [{"any": True}], "principals": [{"metadata": premium}]}
    return [
        _filter("jwt_authn", "jwt_authn.v3.JwtAuthentication", **authn),
        _filter("rbac", "rbac.v3.RBAC", rules={"action": "ALLOW", "policies": {"premium": allowed}}),
    ]


def load(port: int, requests: Path, start: int, connections: int, seconds: int, pause: int | None = None) -> Json:
    """The output of load.lua for one run of wrk: a closed loop, or `pause` milliseconds on average between requests."""
    url = f"http://{HOST}:{port}/"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", HERE / "load.lua", url, "--", requests, start]
    command += [] if pause is None else [pause]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def lease_counts(admin: int) -> LeaseCounts:
    """The lease counts of the Envoy with its admin interface on port `admin`."""
    return asyncio.run(lease_counts_.fetch((HOST, admin)))


def free_ports(n: int) -> list[int]:
    probes = [socket.create_server((HOST, 0)) for _ in range(n)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _filter(name: str, kind: str, **config: Any) -> Json:
    url = f"type.googleapis.com/envoy.extensions.filters.http.{kind}"
    return {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": url, **config}}


def _envoy(directory: Path, name: str, config: Json, port: int) -> Process:
    """Envoy with one worker thread."""
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    flags = ("--concurrency", "1", "--log-level", "error", "--disable-hot-restart")
    process = Process([ENVOY, "-c", file, *flags], directory, f"{name}-envoy")

    def listens() -> bool:
        socket.create_connection((HOST, port), 1).close()
        return True

    process.wait_for(listens)
    return process
