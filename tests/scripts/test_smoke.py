"""`scripts/smoke` against small gateways: one that behaves, and some that each have one hole it must find."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT

SMOKE = ROOT / "scripts" / "smoke"
TIERS = {"A": "low", "B": "low", "C": "high"}


def jwt(subject: str) -> str:
    """A token in form only: the stub knows its tokens by heart."""
    parts = (b'{"alg":"ES256"}', json.dumps({"sub": subject}).encode(), b"signature of " + subject.encode())
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


TOKENS = {"low": jwt("lou"), "premium": jwt("pat")}


class Stub(BaseHTTPRequestHandler):
    """Design §3 in a few lines. `hole` names what this gateway gets wrong."""

    hole = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if len(body) > 1 << 16 and self.hole != "any size":
            return self.answer(413, {}, {})
        caller = self.caller()
        if caller is None:
            return self.deny(401, "invalid_token")
        try:
            requested = self.requested(body)
        except (ValueError, TypeError):
            return self.deny(400, "bad_gate")
        if not requested:
            return self.deny(400, "no_experts_requested")
        known = [name for name in requested if name in TIERS]
        if not known:
            return self.deny(404, "unknown_expert")
        permitted = [name for name in known if TIERS[name] == "low" or caller == "high" or self.hole == "C open"]
        if not permitted:
            return self.deny(403, "tier_too_low", required_tier="high", caller_tier="low")
        if permitted != known and self.headers["x-srp-downgrade"] == "never":
            return self.deny(403, "downgrade_forbidden")
        return self.serve("allow" if permitted == known else "downgrade", permitted[-1])

    def caller(self) -> str | None:
        if self.hole == "believes x-srp-tier" and self.headers["x-srp-tier"]:
            return "high"
        if self.headers["authorization"] is None:
            return "low"
        token = self.headers["authorization"].removeprefix("Bearer ")
        if self.hole == "reads claims only":
            token = {t.split(".")[1]: t for t in TOKENS.values()}.get(token.partition(".")[2].partition(".")[0], "")
        if token not in TOKENS.values():
            return "low" if self.hole == "bad token is nobody" else None
        return "high" if token == TOKENS["premium"] else "low"

    def requested(self, body: bytes) -> list[str]:
        default = ["A", "B"]
        if self.path == "/route":
            names = json.loads(body).get("expert_names", default)
            if not isinstance(names, list):
                raise TypeError(names)
            return names or (default if self.hole == "empty is default" else [])
        if self.path.startswith("/v1/"):
            return [json.loads(body)["model"]]
        return self.headers.get("x-expert-names", "A,B").split(",")

    def serve(self, decision: str, expert: str) -> None:
        answered = "C" if self.hole == "believes x-target-cluster" and self.headers["x-target-cluster"] else expert
        told = {"x-srp-decision": decision, "x-srp-reason": "permitted", "x-srp-expert": expert}
        self.answer(200, told, {"expert": f"Expert_{answered}", "status": "processed"})

    def deny(self, status: int, reason: str, **more: str) -> None:
        told = {"x-srp-decision": "deny", "x-srp-reason": reason}
        if status == 401 and self.hole != "no challenge":
            told["www-authenticate"] = 'Bearer error="invalid_token"'
        self.answer(status, told, {"error": {"code": reason, "decision_id": "d1", **more}})

    def answer(self, status: int, told: dict[str, str], body: dict[str, Any]) -> None:
        if self.hole == "hangs up":
            return
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**told, "X-Srp-Decision-Id": "d1", "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def gateway(hole: str = "") -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Gateway", (Stub,), {"hole": hole}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    for name, token in TOKENS.items():
        (tmp_path / f"{name}.jwt").write_text(token + "\n")
    return tmp_path


def smoke(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", str(SMOKE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_passes_a_gateway_that_keeps_the_table(tokens: Path) -> None:
    """Every row is `ok`, the last line counts them, and the exit status is 0."""
    with gateway() as url:
        result = smoke(url, tokens)
    *rows, last = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout
    assert all(row.startswith("ok    ") for row in rows)
    assert last == f"{len(rows)} passed, 0 failed"
    assert "ok    low caller asks for A,B -> 200 allow A|B" in rows
    assert len(rows) >= 20


HOLES = [
    # hole, the rows that must fail
    (
        "C open",
        {
            "low caller asks for C",
            "anonymous caller asks for C",
            "anonymous caller asks for A,C",
            "anonymous caller asks for A,C, downgrade never",
            "anonymous caller asks for model C",
            "anonymous caller asks for C by header",
            "anonymous caller asks for C, spoofs x-srp-tier",
        },
    ),
    ("reads claims only", {"tampered premium token asks for C", "unsigned premium token asks for C"}),
    (
        "bad token is nobody",
        {"garbage token asks for A", "tampered premium token asks for C", "unsigned premium token asks for C"},
    ),
    (
        "no challenge",
        {"garbage token asks for A", "tampered premium token asks for C", "unsigned premium token asks for C"},
    ),
    ("believes x-target-cluster", {"anonymous caller asks for A, spoofs x-target-cluster"}),
    ("believes x-srp-tier", {"anonymous caller asks for C, spoofs x-srp-tier"}),
    ("empty is default", {"anonymous caller sends an empty list"}),
    ("any size", {"anonymous caller sends more than 64 KiB"}),
]


@pytest.mark.parametrize(("hole", "failing"), HOLES, ids=[hole for hole, _ in HOLES])
def test_fails_exactly_the_rows_that_a_hole_breaks(tokens: Path, hole: str, failing: set[str]) -> None:
    """A gateway with a hole makes smoke exit 1 and name the broken rows, and no other."""
    with gateway(hole) as url:
        result = smoke(url, tokens)
    *rows, last = result.stdout.splitlines()
    assert result.returncode == 1
    assert {row[6:].split(": ")[0] for row in rows if row.startswith("FAIL  ")} == failing
    assert last == f"{len(rows) - len(failing)} passed, {len(failing)} failed"


def test_says_what_was_expected_and_what_came(tokens: Path) -> None:
    """A FAIL line holds both sides of every difference."""
    with gateway("C open") as url:
        result = smoke(url, tokens)
    (line,) = (row for row in result.stdout.splitlines() if row.startswith("FAIL  low caller asks for C:"))
    assert "status: expected 403, got 200" in line
    assert "required_tier: expected high, got None" in line


def test_a_row_without_an_answer_fails(tokens: Path) -> None:
    """A gateway that accepts and hangs up passes no row."""
    with gateway("hangs up") as url:
        result = smoke(url, tokens)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith("0 passed, ")
    assert "no response: RemoteDisconnected" in result.stdout


def test_verbose_prints_no_token(tokens: Path) -> None:
    """-v shows requests and answers, and keeps the credentials to itself."""
    with gateway() as url:
        result = smoke(url, tokens, "-v")
    assert "POST /route" in result.stdout
    assert not any(token.split(".")[2] in result.stdout for token in TOKENS.values())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: URL, TOKENS_DIR"),
        (["ftp://127.0.0.1", "{tokens}"], "expected an http or https URL, found `ftp://127.0.0.1`"),
        (["http://127.0.0.1:99999", "{tokens}"], "Port out of range"),
        (["http://127.0.0.1", "{tokens}/none"], "low.jwt"),
        (["http://127.0.0.1", "{tokens}/bad"], "low.jwt is not a signed compact JWT"),
        (["http://127.0.0.1", "{tokens}", "--timeout", "nan"], "--timeout must be above 0"),
        (["http://127.0.0.1:{closed}", "{tokens}"], "cannot reach http://127.0.0.1:"),
    ],
    ids=["no arguments", "scheme", "port", "no tokens", "no token", "timeout", "unreachable"],
)
def test_bad_usage_exits_2_with_one_line(tokens: Path, arguments: list[str], complaint: str) -> None:
    """Mistakes of the person who runs it are told apart from mistakes of the gateway."""
    (tokens / "bad").mkdir()
    for name in TOKENS:
        (tokens / "bad" / f"{name}.jwt").write_text("not-a-token")
    with socket.socket() as bound:  # bound and not listening: nothing else can take the port, nothing answers
        bound.bind(("127.0.0.1", 0))
        closed = bound.getsockname()[1]
        result = smoke(*(argument.format(tokens=tokens, closed=closed) for argument in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    assert complaint in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
