"""What a hostile client can send, byte by byte, through a real Envoy."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.harness.raw import exchange
from tests.harness.system import System
from tests.harness.waiting import wait_for

LONE_CR = "a: b\rx-srp-tier: high\r\n"
H2C = "upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk\r\n"
BODY = b'{"token_id":1,"expert_names":["A"]}'
CHUNKED = b"POST /route HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
TRAILERS = b"x-expert-names: C\r\nx-target-cluster: expert-c\r\nx-srp-tier: high\r\n"


def post(target: str, headers: str = "", version: str = "HTTP/1.1") -> bytes:
    fixed = "host: x\r\nconnection: close\r\ncontent-length: 0\r\n"
    return f"POST {target} {version}\r\n{fixed}{headers}\r\n".encode("latin-1")


NOBODY_IS_REACHED = [
    # name, bytes, status
    ("escaped slash", post("/route%2f..%2fx"), 400),
    ("escaped backslash", post("/v1/%5c..%5croute"), 400),
    ("NUL in the path", post("/route%00"), 400),
    ("fragment", post("/x#/route"), 400),
    ("bytes over 7F in the path", post("/\xff"), 400),
    ("no path", post("route"), 400),
    ("asterisk", b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 404),
    ("CONNECT", b"CONNECT expert-c:80 HTTP/1.1\r\nhost: expert-c:80\r\nconnection: close\r\n\r\n", 404),
    ("websocket", post("/x", "upgrade: websocket\r\nconnection: upgrade\r\n"), 403),
    ("HTTP/1.0", post("/x", version="HTTP/1.0"), 426),
    ("space before the colon", post("/x", "x-expert-names : A\r\n"), 400),
    ("underscores", post("/x", "x_expert_names: A\r\n"), 400),
    ("NUL in a header", post("/x", "x-expert-names: A\0\r\n"), 400),
    ("lone CR in a name", post("/x", "x-expert-names: A\rx-target-cluster: expert-c\r\n"), 400),
    ("two lengths", post("/x", "content-length: 0\r\n"), 400),
    ("length and chunks", post("/x", "transfer-encoding: chunked\r\n"), 400),
    ("hexadecimal chunk", CHUNKED + b"0x%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), 400),
    ("chunks by LF", CHUNKED + b"%x\n%s\n0\n\n" % (len(BODY), BODY), 400),
    ("too many headers", post("/x", "".join(f"h{n}: v\r\n" for n in range(101))), 431),
    ("too long headers", post("/x", f"h: {'v' * 65_000}\r\n"), 431),
]


@pytest.mark.parametrize(("data", "status"), [c[1:] for c in NOBODY_IS_REACHED], ids=[c[0] for c in NOBODY_IS_REACHED])
def test_what_could_be_read_in_two_ways_reaches_nobody(proxy: System, data: bytes, status: int) -> None:
    """Each is refused as a whole, with a JSON body and without an expert."""
    before = sum(map(proxy.served, proxy.ports))
    answer = exchange(proxy.port, data)
    assert (answer.status, "x-srp-expert" in answer.headers) == (status, False)
    assert answer.code
    assert sum(map(proxy.served, proxy.ports)) == before


ONE_MEANING = [
    # name, bytes, status, what was asked
    ("dots", post("/route/../asked/x", "x-target-cluster: expert-c\r\n"), 403, "C"),
    ("escaped dots", post("/route/%2e%2e/asked/x", "x-target-cluster: expert-c\r\n"), 403, "C"),
    ("backslashes", post("/x\\..\\asked\\x", "x-target-cluster: expert-c\r\n"), 403, "C"),
    ("absolute form", post("http://evil//asked/./x", "x-target-cluster: expert-c\r\n"), 403, "C"),
    ("escaped letter", post("/%61sked/x", "x-target-cluster: expert-c\r\n"), 403, "C"),
    ("dots in a query", post("/x?/../asked/x", "x-target-cluster: expert-c\r\n"), 200, "A,B"),
    ("folded header", post("/x", "x-expert-names: A\r\n ,C\r\n"), 200, "A,C"),
    ("upper case and tabs", post("/x", "X-EXPERT-NAMES:\tC\t\r\n"), 403, "C"),
    ("lone CR in a header", post("/x", LONE_CR), 200, "A,B"),
    ("identity of the client's", post("/x", "x-srp-tier: high\r\nX-Srp-Subject: root\r\n"), 200, "A,B"),
    ("h2c", post("/x", H2C), 200, "A,B"),
    ("trailers", CHUNKED + b"%x;x=1\r\n%s\r\n0\r\n%s\r\n" % (len(BODY), BODY, TRAILERS), 200, "A"),
]


@pytest.mark.parametrize(("data", "status", "asked"), [c[1:] for c in ONE_MEANING], ids=[c[0] for c in ONE_MEANING])
def test_what_is_odd_has_one_meaning(proxy: System, data: bytes, status: int, asked: str) -> None:
    """The gate and the expert take it for the same; nobody above the caller's tier is reached, no identity forged."""
    before = {name: Counter(proxy.seen(name)) for name in proxy.ports}
    answer = exchange(proxy.port, data)
    headers = answer.headers
    assert (answer.status, headers["x-srp-requested"]) == (status, asked)
    now = {name: Counter(proxy.seen(name)) - before[name] for name in proxy.ports}
    reached = {(name, who) for name, seen in now.items() for who in seen}
    assert reached == ({(headers["x-srp-expert"], "low|")} if status == 200 else set())
    assert headers.get("x-srp-expert", "A") in {"A", "B"}


TWO_READINGS = [
    # body, content-type
    (b'{"model": "A", "Model": "C"}', "application/json"),
    (b'{"MODEL": "C"}', "application/json"),
    ('{"model": "A", "\u017fmodel": 1, "mode\u013f": 2, "\u212a": 3, "MODE\\u004c": "C"}'.encode(), "application/json"),
    (b'{"model": "A", "x": "+ACI-,+ACI-model+ACI-:+ACI-C"}', "application/json; charset=utf-7"),
    (b'{"model": "A"}', 'application/json; charset="UTF-16LE"'),
    (b'{"model": "A"}', "application/json; charset*=utf-8''utf-7"),
    (b'{"model": "A"}', "application/json; charset=utf-8; charset=utf-7"),
]


@pytest.mark.parametrize(("body", "kind"), TWO_READINGS)
def test_a_body_that_an_expert_may_read_otherwise_is_refused(proxy: System, body: bytes, kind: str) -> None:
    """Readers that do not tell case apart, or that go by the charset, would find another model in it."""
    answer = proxy.send("/v1/chat/completions", body=body, headers=[("content-type", kind)])
    assert (answer.status, answer.code) == (400, "bad_gate")


def test_bodies_that_everybody_reads_alike_pass(proxy: System) -> None:
    """Another spelling elsewhere in the body, and UTF-8 by any name, are nobody's business."""
    body = b'{"model": "A", "options": {"Model": "C"}, "models": "C"}'
    for kind in ("application/json; charset=UTF-8", 'application/json;charset="utf-8"', "text/plain; x=charset"):
        answer = proxy.send("/v1/chat/completions", body=body, headers=[("content-type", kind)])
        assert (answer.status, answer.headers.get("x-srp-requested")) == (200, "A"), kind


def test_the_access_log_is_lines_of_json_whatever_comes(proxy: System) -> None:
    """Quotes, control characters and bytes that are no UTF-8 stay inside their line."""
    exchange(proxy.port, post('/log-"quoted"?"secret"', 'x-request-id: "x"\r\nuser-agent: a"\xff\r\n'))
    wait_for(lambda: "log-" in proxy.envoy.log.read_text(errors="replace"), "the access log", seconds=15)
    for line in proxy.envoy.log.read_bytes().splitlines():
        if line.startswith(b"{"):
            json.loads(line)
    assert b"secret" not in proxy.envoy.log.read_bytes()
