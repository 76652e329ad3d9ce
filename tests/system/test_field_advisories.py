"""Known flaws of this field: of authorizing proxies, JWT libraries and model gateways. This proxy must have none.

Each test is named by its advisory, and its docstring says what the flaw was. Requests go byte by byte to a real Envoy
with a real ext_authz behind it; the experts record everything that reaches them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ext_authz.demo.ports import HOST
from tests.harness import raw, tokens
from tests.harness.answer import Answer
from tests.harness.loop import Loop
from tests.harness.system import System, system
from tests.harness.upstream import Upstream
from tests.harness.waiting import wait_for

SHARED = "https://shared.example.com/"

# A and C tell who was let in; the experts below them have conditions that read the request.
POLICY = f"""\
version: 1
tiers: [low, high]
issuers:
  - issuer: {tokens.ISSUER}
    audiences: [{tokens.AUDIENCE}]
    algorithms: [ES256, RS256, EdDSA]
    jwks: {{file: jwks.json}}
  - {{issuer: {SHARED}, audiences: [{tokens.AUDIENCE}], algorithms: [HS256], secret_file: secret}}
anonymous: low
leeway: 1s
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: [LOW], health: false}}
  C: {{tier: high, cluster: expert-c, endpoints: [HIGH], health: false}}
  D: {{tier: high, cluster: expert-d, endpoints: [HIGH], health: false, downgrade_to: [A]}}
  Open: {{tier: low, endpoints: [LOW], health: false, allow: 'request.path.startsWith("/open/")'}}
  Shut:
    tier: low
    endpoints: [LOW]
    health: false
    allow: '!(request.path == "/admin" || request.path.startsWith("/admin/"))'
  Tag: {{tier: low, endpoints: [LOW], health: false, allow: '!request.headers["x-tag"].matches("blocked")'}}
  Plain: {{tier: low, endpoints: [LOW], health: false, allow: '!("x-debug" in request.headers)'}}
gate:
  - {{path: /route, json: /expert_names, default: [A]}}
  - {{prefix: /asked/, header: x-target-cluster}}
  - {{prefix: "/q']]..error('x')--/", header: x-names-of-q}}
  - {{prefix: /, header: x-expert-names}}
"""

Header = tuple[str, str | bytes]
Outcome = tuple[int, str, list[tuple[str, str]]]  # status, reason, and who got the request under which path

INVALID_TOKEN: Outcome = (401, "invalid_token", [])
NOT_ALLOWED: Outcome = (403, "not_allowed", [])
TIER_TOO_LOW: Outcome = (403, "tier_too_low", [])
UNKNOWN_EXPERT: Outcome = (404, "unknown_expert", [])
BAD_GATE: Outcome = (400, "bad_gate", [])
BAD_REQUEST: Outcome = (400, "bad_request", [])  # Envoy's own


def permitted(path: str, expert: str = "LOW") -> Outcome:
    return 200, "permitted", [(expert, path)]


@dataclass
class World:
    """A running system, with one recording endpoint for the experts of each tier."""

    proxy: System
    experts: Mapping[str, Upstream]

    def send(self, data: bytes) -> tuple[Answer, list[tuple[str, web.BaseRequest]]]:
        """The answer to exactly these bytes, and the requests that reached experts meanwhile."""
        before = self.counts()
        answer = raw.exchange(self.proxy.port, data)
        return answer, [(name, r) for name, expert in self.experts.items() for r in expert.seen[before[name] :]]

    def outcome(self, data: bytes) -> Outcome:
        answer, seen = self.send(data)
        return answer.status, reason(answer), [(name, request.raw_path) for name, request in seen]

    def counts(self) -> dict[str, int]:
        return {name: len(expert.seen) for name, expert in self.experts.items()}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    loop = Loop()
    experts = {name: loop.run(Upstream(name).start()) for name in ("LOW", "HIGH")}
    text = POLICY
    for name, expert in experts.items():
        text = text.replace(f"[{name}]", f'["{HOST}:{expert.port}"]')
    files = {"jwks.json": json.dumps({"keys": keys()}).encode(), "secret": tokens.private_key("HS256")}
    try:
        with system(lambda _: text, {"A": 0}, files, workers=1) as proxy:
            yield World(proxy, experts)
    finally:
        for expert in experts.values():
            loop.run(expert.stop())
        loop.close()


@cache
def keys() -> list[dict[str, Any]]:
    """The issuer's keys. It may not use the last two: they are for algorithms that the policy does not list."""
    return [tokens.jwk(alg) for alg in ("ES256", "RS256", "EdDSA", "ES384", "PS256")]


def reason(answer: Answer) -> str:
    """The decision's reason, or the code of an answer that Envoy gives itself."""
    return answer.headers.get("x-srp-reason") or answer.code


def ask(path: str = "/x", *headers: Header, experts: str | None = "A", body: bytes | None = None) -> bytes:
    """The bytes of a request: its headers in this order, after the one that names its experts."""
    names: list[Header] = [] if experts is None else [("x-expert-names", experts)]
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1".encode("latin-1"), b"host: x"]
    for name, value in [*names, *headers, ("connection", "close")]:
        lines.append(name.encode() + b": " + (value.encode("latin-1") if isinstance(value, str) else value))
    length = [] if body is None else [b"content-length: %d" % len(body)]
    return b"\r\n".join([*lines, *length, b"", body or b""])


def premium(**more: Any) -> dict[str, Any]:
    """The claims of a high caller. They outlast the whole run: some tokens are made when this file is loaded."""
    return tokens.claims(plan="premium", exp=int(time.time()) + 86_400, **more)


def bearer(token: str) -> Header:
    return "authorization", f"Bearer {token}"


def received(request: web.BaseRequest, *prefixes: str) -> list[tuple[str, str]]:
    """The headers with names of these beginnings, as the expert got them: sorted, repeats included."""
    got = [(name.decode().lower(), value.decode("latin-1")) for name, value in request.raw_headers]
    return sorted(header for header in got if header[0].startswith(prefixes))


# ---- caches ----


def forgeries(good: str) -> dict[str, str]:
    """Tokens that begin like a good one, by what they share with it."""
    header, payload, signature = good.split(".")
    other_header, other_payload, other_signature = tokens.sign(premium(sub="root"), name="another").split(".")
    last, inner = "B" if signature[-1] == "A" else "A", "B" if good[-40] == "A" else "A"
    return {
        "20 characters": f"{good[:20]}{other_header[20:]}.{other_payload}.{other_signature}",
        "the header": f"{header}.{other_payload}.{other_signature}",
        "the header and the signature": f"{header}.{other_payload}.{signature}",
        "the header and the payload": f"{header}.{payload}.{other_signature}",
        "half of the signature": good[: -len(signature) // 2] + other_signature[len(signature) // 2 :],
        "all but a character of the signature": good[:-40] + inner + good[-39:],
        "all but the last character": good[:-1] + last,
        "all but unused bits": f"{header}.{payload}.{tokens.with_unused_bit(signature)}",
        "all, less a character": good[:-1],
        "all, less the signature": f"{header}.{payload}.",
        "all, and a character": f"{good}A",
        "all, and four characters": f"{good}AAAA",
        "all, and padding": f"{good}==",
        "all, and another part": f"{good}.{signature}",
    }


@pytest.mark.parametrize("warm", ["token cache", "decision cache", "lease"])
def test_cve_2026_35030_a_token_that_begins_like_a_cached_one_is_verified_itself(proxy: System, warm: str) -> None:
    """LiteLLM cached identities by the first 20 characters of a token, which the tokens of an issuer have in common:
    with another token that began like a caller's, anybody was that caller."""
    good = tokens.sign(premium(sub=f"victim of the {warm}"))
    by_body: dict[str, Any] = {"path": "/route", "experts": ["C"]}  # never leased
    by_header: dict[str, Any] = {"path": "/x", "headers": [("x-expert-names", "C")]}
    asked, times = {"token cache": (by_body, 1), "decision cache": (by_body, 3), "lease": (by_header, 16)}[warm]
    ids = [proxy.send(**asked, token=good).id for _ in range(times)]
    assert (len(set(ids)) < times) == (warm == "lease")
    before = sum(map(proxy.served, proxy.ports))
    for shared, forged in forgeries(good).items():
        answer = proxy.send(**asked, token=forged)
        assert (answer.status, answer.code) == (401, "invalid_token"), shared
    assert sum(map(proxy.served, proxy.ports)) == before
    again = proxy.send(**asked, token=good)
    assert (again.status, again.headers["x-srp-expert"]) == (200, "C")
    assert (again.id in ids) == (warm == "lease")


# ---- repeated headers ----

NAMES, TARGET, BARE = "x-expert-names", "x-target-cluster", "x-expert-access-token"
DOWNGRADE = "x-srp-downgrade"
GOOD, BAD = tokens.sign(premium()), tokens.sign(premium(), name="another")

REPEATED: list[tuple[str, bytes, Outcome]] = [
    ("names, the permitted one first", ask("/x", (NAMES, "A"), (NAMES, "C"), experts=None), BAD_GATE),
    ("names, the permitted one last", ask("/x", (NAMES, "C"), (NAMES, "A"), experts=None), BAD_GATE),
    ("names, with other capitals", ask("/x", (NAMES, "A"), ("X-Expert-NAMES", "C"), experts=None), BAD_GATE),
    ("names, the second empty", ask("/x", (NAMES, "A"), (NAMES, ""), experts=None), BAD_GATE),
    ("names on one line", ask("/x", experts="A,C"), (200, "tier_too_low", [("LOW", "/x")])),
    ("names on one line, none permitted", ask("/x", experts="C,C, C"), TIER_TOO_LOW),
    ("clusters, the permitted one first", ask("/asked/", (TARGET, "expert-a"), (TARGET, "expert-c")), BAD_GATE),
    ("clusters, the permitted one last", ask("/asked/", (TARGET, "expert-c"), (TARGET, "expert-a")), BAD_GATE),
    ("clusters on one line", ask("/asked/", (TARGET, "expert-a,C")), (200, "tier_too_low", [("LOW", "/asked/")])),
    ("tokens, the good one first", ask("/x", bearer(GOOD), bearer(BAD)), INVALID_TOKEN),
    ("tokens, the good one last", ask("/x", bearer(BAD), bearer(GOOD)), INVALID_TOKEN),
    ("the same token", ask("/x", bearer(GOOD), bearer(GOOD)), INVALID_TOKEN),
    ("tokens on one line", ask("/x", bearer(f"{GOOD}, Bearer {GOOD}")), INVALID_TOKEN),
    ("tokens on one line, one scheme", ask("/x", bearer(f"{GOOD},{BAD}")), INVALID_TOKEN),
    ("another scheme first", ask("/x", ("authorization", "Basic YTpi"), bearer(GOOD)), INVALID_TOKEN),
    ("both token headers", ask("/x", bearer(GOOD), (BARE, GOOD)), INVALID_TOKEN),
    ("both token headers, one empty", ask("/x", ("authorization", ""), (BARE, GOOD)), INVALID_TOKEN),
    ("the bare token header", ask("/x", (BARE, GOOD), (BARE, BAD)), INVALID_TOKEN),
    (
        "a downgrade, allowed and forbidden",
        ask("/x", (DOWNGRADE, "allow"), (DOWNGRADE, "never"), experts="D"),
        (403, "downgrade_forbidden", []),
    ),
    ("what a condition reads", ask("/x", ("x-tag", "fine"), ("x-tag", "blocked"), experts="Tag"), BAD_GATE),
    ("what a condition reads, on one line", ask("/x", ("x-tag", "fine,blocked"), experts="Tag"), NOT_ALLOWED),
    ("what a condition forbids", ask("/x", ("x-debug", "1"), ("x-debug", "1"), experts="Plain"), BAD_GATE),
    ("what a condition forbids, on one line", ask("/x", ("x-debug", "1,1"), experts="Plain"), NOT_ALLOWED),
]


@pytest.mark.parametrize(("data", "expected"), [c[1:] for c in REPEATED], ids=[c[0] for c in REPEATED])
def test_cve_2026_26308_every_value_of_a_header_counts(world: World, data: bytes, expected: Outcome) -> None:
    """Envoy's RBAC judged a header that came several times as one text, in which no rule recognized a single value any
    more, not even a rule that denies; the upstream read value by value."""
    assert world.outcome(data) == expected


# ---- paths ----

C_IN_BODY = b'{"expert_names": ["C"]}'


def to(expert: str, path: str) -> bytes:
    return ask(path, experts=expert)


PARAMETERS: list[tuple[str, bytes, Outcome]] = [
    ("a denied path", to("Shut", "/admin"), NOT_ALLOWED),
    ("a denied folder", to("Shut", "/admin/x"), NOT_ALLOWED),
    ("before a denied path", to("Shut", "/x;y/../admin"), NOT_ALLOWED),
    ("of a dot segment", to("Shut", "/x/..;/admin"), NOT_ALLOWED),
    ("of a dot segment, with a value", to("Shut", "/x/..;a=b/admin/x"), NOT_ALLOWED),
    ("of single dots", to("Shut", "/x/.;/.;/../admin/.;"), NOT_ALLOWED),
    ("out of a permitted folder", to("Open", "/open/..;/admin"), NOT_ALLOWED),
    ("out of a permitted folder, by a backslash", to("Open", "/open/..;\\admin"), NOT_ALLOWED),
    ("of a permitted folder", to("Open", "/open;/x"), NOT_ALLOWED),
    ("an exact gate path", ask("/route", body=C_IN_BODY), TIER_TOO_LOW),
    ("a way round to an exact gate path", ask("/route;x/../route", body=C_IN_BODY), TIER_TOO_LOW),
    ("a way round by a dot segment's", ask("/x/..;/route", body=C_IN_BODY), TIER_TOO_LOW),
    # With parameters it is another path, to the gate, to conditions and to the expert alike.
    ("after a denied path", to("Shut", "/admin;x"), permitted("/admin;x")),
    ("after a denied folder", to("Shut", "/admin;/"), permitted("/admin;/")),
    ("after an exact gate path", ask("/route;x", body=C_IN_BODY), permitted("/route;x")),
    ("after an exact gate path that is left", ask("/route;x=1/..", body=C_IN_BODY), permitted("/")),
]


@pytest.mark.parametrize(("data", "expected"), [c[1:] for c in PARAMETERS], ids=[c[0] for c in PARAMETERS])
def test_cve_2026_73553_and_cve_2026_73511_path_parameters_have_one_meaning(
    world: World, data: bytes, expected: Outcome
) -> None:
    """Envoy's router took `/admin;x` for `/admin` where its RBAC did not, so a rule for `/admin` was passed on the way
    to that route (73553); of a path with parameters in several segments it matched another one than its upstream
    served (73511)."""
    assert world.outcome(data) == expected


DOTS = [
    "/open/%2e%2e;/admin", "/open/.%2e;/admin", "/open/%2E.;a=b/admin", "/open/%2e%2e;/%2e%2e;/admin", "/open/%2e%2e;",
    "/open\\..;\\admin", "/open/x\\..;/..;/admin", "/open/%2e;/x",
]  # fmt: skip


@pytest.mark.parametrize("path", DOTS)
def test_cve_2026_73511_no_expert_gets_a_dot_segment(world: World, path: str) -> None:
    """To an expert that strips the parameters of each segment (RFC 3986 §3.3), `/open/..;/admin` is `/admin`. Envoy
    resolves dot segments with parameters; one that it leaves, because it is written in another way, makes the expert
    serve another path than the condition has judged."""
    status, why, seen = world.outcome(to("Open", path))
    left = [p for _, p in seen if re.search(r"/\.\.?(;|/|\?|$)", p)]
    assert (status, why, left) in ((200, "permitted", []), (400, "bad_gate", []), NOT_ALLOWED, BAD_REQUEST)


SPELLINGS: list[tuple[str, bytes, Outcome]] = [
    ("two slashes", to("Shut", "//admin/x"), NOT_ALLOWED),
    ("many slashes", to("Shut", "////admin////x"), NOT_ALLOWED),
    ("two slashes inside", to("Shut", "/admin//x"), NOT_ALLOWED),
    ("what could be a host", to("Shut", "//host/admin"), permitted("/host/admin")),
    ("the absolute form", to("Shut", "http://host//admin"), NOT_ALLOWED),
    ("the absolute form of another scheme", to("Shut", "ftp://host/admin"), BAD_REQUEST),
    ("a dot segment", to("Shut", "/x/../admin"), NOT_ALLOWED),
    ("an escaped dot segment", to("Shut", "/x/%2e%2E/admin"), NOT_ALLOWED),
    ("dot segments above the root", to("Shut", "/../../admin"), NOT_ALLOWED),
    ("a dot segment at the end", to("Shut", "/admin/x/.."), NOT_ALLOWED),
    ("a dot segment escaped twice", to("Open", "/open/%252e%252e/x"), permitted("/open/%252e%252e/x")),
    ("an escaped slash", to("Shut", "/admin%2fx"), BAD_REQUEST),
    ("an escaped slash after dots", to("Shut", "/x/..%2fadmin"), BAD_REQUEST),
    ("escaped backslashes", to("Shut", "/x%5c..%5cadmin"), BAD_REQUEST),
    ("backslashes", to("Shut", "/x\\..\\admin"), NOT_ALLOWED),
    ("a backslash first", to("Shut", "\\admin\\x"), BAD_REQUEST),
    ("escaped letters", to("Shut", "/%61dmi%6e"), NOT_ALLOWED),
    ("a query", to("Shut", "/admin?/../x"), NOT_ALLOWED),
    ("an escaped query", to("Shut", "/admin%3f"), permitted("/admin%3f")),
    ("an escaped query in a permitted path", to("Open", "/open%3f/x"), NOT_ALLOWED),
    ("a fragment", to("Shut", "/admin#x"), BAD_REQUEST),
    ("an escaped NUL", to("Shut", "/admin%00"), BAD_REQUEST),
    ("two slashes, to the gate", ask("//route", body=C_IN_BODY), TIER_TOO_LOW),
    ("dot segments, to the gate", ask("/x/..//./route", body=C_IN_BODY), TIER_TOO_LOW),
    ("escaped letters, to the gate", ask("/%72oute", body=C_IN_BODY), TIER_TOO_LOW),
    ("an escaped query, to the gate", ask("/route%3f", body=C_IN_BODY), permitted("/route%3f")),
]


@pytest.mark.parametrize(("data", "expected"), [c[1:] for c in SPELLINGS], ids=[c[0] for c in SPELLINGS])
def test_cve_2026_26205_a_path_is_judged_as_the_expert_gets_it(world: World, data: bytes, expected: Outcome) -> None:
    """OPA's plugin for Envoy parsed the path as a URI: in `//admin/x` it took `admin` for the host, and judged `/x`."""
    assert world.outcome(data) == expected


# ---- bytes that are no text ----

OBS_TEXT = [
    b"\x80", b"\x85", b"\xa0", b"\xff", b"\xc3", b"\xc3\xa9", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    bytes(range(0x80, 0x100)),
]  # fmt: skip


@pytest.mark.parametrize("obs", OBS_TEXT, ids=[obs.hex()[:8] for obs in OBS_TEXT])
def test_cve_2026_73552_a_condition_reads_every_byte_of_a_header(world: World, obs: bytes) -> None:
    """Envoy's `safe_regex` read header values as UTF-8 and matched nothing in a value that is none: a byte over 7F
    beside a forbidden word was enough to pass a rule that denies it."""
    for value in (obs + b"blocked", b"blocked" + obs, obs + b"blocked" + obs):
        assert world.outcome(ask("/x", ("x-tag", value), experts="Tag")) == NOT_ALLOWED
    answer, seen = world.send(ask("/x", ("x-tag", b"a" + obs + b"z"), experts="Tag"))
    assert (answer.status, reason(answer)) == (200, "permitted")
    assert [dict(request.raw_headers)[b"x-tag"] for _, request in seen] == [b"a" + obs + b"z"]


# ---- HTTP/2 ----


def http2(port: int, headers: Sequence[tuple[str, str]], body: bytes) -> tuple[str | None, bytes]:
    """Status and body of the answer to one request with exactly these fields; None if its stream or connection ends
    without one."""
    as_given = h2.config.H2Configuration(
        header_encoding="latin-1", validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = h2.connection.H2Connection(as_given)
    connection.initiate_connection()
    connection.send_headers(1, headers, end_stream=not body)
    if body:
        connection.send_data(1, body, end_stream=True)
    status, content, ended = None, b"", False
    with socket.create_connection((HOST, port), timeout=5) as client:
        client.sendall(connection.data_to_send())
        while not ended:
            try:
                data = client.recv(65536)
            except ConnectionResetError:
                data = b""
            ended = not data
            for event in connection.receive_data(data) if data else []:
                match event:
                    case h2.events.ResponseReceived():
                        status = dict(event.headers)[":status"]
                    case h2.events.DataReceived():
                        content += event.data
                    case h2.events.StreamEnded() | h2.events.StreamReset() | h2.events.ConnectionTerminated():
                        ended = True
    return status, content


SCHEME, AUTHORITY, PATH = (":scheme", "http"), (":authority", "x"), (":path", "/x")

CONNECTS: dict[str, list[tuple[str, str]]] = {
    "to a host": [(":authority", "expert-c:80")],
    "to an expert's endpoint": [(":authority", "HIGH")],
    "with a path": [SCHEME, AUTHORITY, PATH],
    "extended, for a websocket": [(":protocol", "websocket"), SCHEME, AUTHORITY, PATH],
    "extended, to the body gate": [(":protocol", "websocket"), SCHEME, AUTHORITY, (":path", "/route")],
    "extended, for bytes": [(":protocol", "bytestream"), SCHEME, AUTHORITY, PATH],
    "extended, for UDP": [(":protocol", "connect-udp"), SCHEME, AUTHORITY, PATH],
    "extended, without a path": [(":protocol", "websocket"), SCHEME, AUTHORITY],
    "extended, with an empty path": [(":protocol", "websocket"), SCHEME, AUTHORITY, (":path", "")],
}
ANSWERED = {"to a host", "to an expert's endpoint"}  # the others are no HTTP/2 here, and end their connections


@pytest.mark.parametrize("body", [b"", b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n"], ids=["no body", "a request as body"])
def test_cve_2026_73547_connect_reaches_nobody_and_harms_nobody(world: World, body: bytes) -> None:
    """Envoy's ext_authz filter ended the whole process at a CONNECT request, which has no path."""
    envoy, before = world.proxy.envoy.process, world.counts()
    high = (":authority", f"{HOST}:{world.experts['HIGH'].port}")

    def connect(fields: list[tuple[str, str]]) -> tuple[str | None, str]:
        fields = [high if field == (":authority", "HIGH") else field for field in fields]
        own = [("x-expert-names", "C"), ("authorization", f"Bearer {GOOD}")]
        status, content = http2(world.proxy.port, [(":method", "CONNECT"), *fields, *own], body)
        return status, json.loads(content)["error"]["code"] if content else ""

    with ThreadPoolExecutor(len(CONNECTS)) as clients:  # Envoy takes a second to close a connection
        found = dict(zip(CONNECTS, clients.map(connect, CONNECTS.values()), strict=True))
    assert found == {name: ("404", "not_found") if name in ANSWERED else (None, "") for name in CONNECTS}
    assert world.counts() == before
    assert envoy is not None
    assert envoy.poll() is None
    assert world.proxy.status()["rpc_errors"] == 0
    assert world.outcome(ask("/x", bearer(GOOD), experts="C")) == permitted("/x", "HIGH")


# ---- tokens ----

CRITICAL: list[tuple[str, dict[str, Any]]] = [
    ("an extension that nobody knows", {"crit": ["x-policy"], "x-policy": "require-mfa"}),
    ("an extension that is not there", {"crit": ["x-policy"]}),
    ("a member that is no extension", {"crit": ["alg"]}),
    ("a claim", {"crit": ["exp"], "exp": 1}),
    ("an extension that PyJWT knows", {"crit": ["b64"], "b64": True}),
    ("an empty list", {"crit": []}),
    ("null", {"crit": None}),
    ("no list", {"crit": "x-policy"}),
]


@pytest.mark.parametrize("header", [c[1] for c in CRITICAL], ids=[c[0] for c in CRITICAL])
def test_cve_2026_32597_a_critical_extension_makes_a_token_invalid(world: World, header: dict[str, Any]) -> None:
    """PyJWT did not read `crit`, and accepted tokens that must not be accepted by who does not know the extension."""
    assert world.outcome(ask("/x", bearer(tokens.sign(premium(), header=header)))) == INVALID_TOKEN


ALGORITHMS: list[tuple[str, str, dict[str, Any]]] = [
    # name, the algorithm of the key that signs, what the header says
    ("that the issuer may not use", "ES384", {}),
    ("under the name of a permitted one", "ES384", {"alg": "ES256"}),
    ("under the names of a permitted one and its key", "ES384", {"alg": "ES256", "kid": "ES256"}),
    ("of an RSA key for another padding", "PS256", {}),
    ("of an RSA key for another padding, under the name of a permitted one", "PS256", {"alg": "RS256"}),
    ("of an EC key under the name of EdDSA", "ES256", {"alg": "EdDSA"}),
    ("of an EC key under the name of RSA", "ES256", {"alg": "RS256"}),
    ("of an RSA key under a name that the issuer may not use", "RS256", {"alg": "PS256"}),
    ("under the name of none", "ES256", {"alg": "none"}),
    ("under the name of none with other capitals", "ES256", {"alg": "nOnE"}),
    ("with other capitals", "ES256", {"alg": "es256"}),
    ("in a list", "ES256", {"alg": ["ES256"]}),
]


@pytest.mark.parametrize(("alg", "header"), [c[1:] for c in ALGORITHMS], ids=[c[0] for c in ALGORITHMS])
def test_cve_2026_48523_header_key_and_issuer_agree_on_the_algorithm(
    world: World, alg: str, header: dict[str, Any]
) -> None:
    """PyJWT compared its list of algorithms with the token's header, and verified by the algorithm of the key: whoever
    had a key for a forbidden algorithm wrote a permitted one into the header."""
    for kid in ("", None):  # the name of the key that signs, or none
        assert world.outcome(ask("/x", bearer(tokens.sign(premium(), alg, kid, header)))) == INVALID_TOKEN


def hs256(secret: bytes, payload: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """A token signed with any bytes at all as its secret."""
    parts = [tokens.b64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT", **header}, payload)]
    signed = ".".join(parts)
    return f"{signed}.{tokens.b64(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


def public_texts() -> dict[str, bytes]:
    """What everybody knows of the issuer's keys, in the forms in which it could be taken for a secret."""
    ec, rsa = keys()[:2]
    key = tokens.private_key("RS256").public_key()
    return {
        "the key set": json.dumps({"keys": keys()}).encode(),
        "a key of the set": json.dumps(ec).encode(),
        "a key without white space": json.dumps(ec, separators=(",", ":")).encode(),
        "a modulus": rsa["n"].encode(),
        "PEM": key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "PKCS 1": key.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        "DER": key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "OpenSSH": key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        "nothing": b"",
    }


def test_ghsa_xgmm_8j9v_c9wx_a_public_key_is_no_secret(world: World) -> None:
    """PyJWT took the JSON of a public key for an HMAC secret where HS256 was permitted beside RS256, so that whoever
    knew the public key could sign."""
    for issuer in (tokens.ISSUER, SHARED):
        for form, secret in public_texts().items():
            for header in ({}, {"kid": "RS256"}, {"kid": "ES256", "jwk": keys()[0]}):
                token = hs256(secret, premium(iss=issuer), header)
                assert world.outcome(ask("/x", bearer(token))) == INVALID_TOKEN, (issuer, form, header)
    genuine = hs256(tokens.private_key("HS256"), premium(iss=SHARED), {})
    assert world.outcome(ask("/x", bearer(genuine), experts="C")) == permitted("/x", "HIGH")


def test_ghsa_xgmm_8j9v_c9wx_a_policy_cannot_make_a_public_key_a_secret(world: World) -> None:
    """The same flaw by an operator's mistake: the issuer has no key then, and no token of it passes."""
    proxy, text = world.proxy, world.proxy.policy.read_text()

    def mistake() -> str:
        return next((k["last_error"] or "" for k in proxy.status()["keys"] if k["issuer"] == SHARED), "")

    digest = proxy.status()["policy"]["digest"]
    proxy.write_policy(text.replace("secret_file: secret", "secret_file: jwks.json"))
    try:
        wait_for(mistake, "the mistake to be found", proxy, seconds=10)
        assert "is a public key, certificate or JWK, not a secret" in mistake()
        forged = hs256((proxy.directory / "jwks.json").read_bytes(), premium(iss=SHARED), {})
        assert world.outcome(ask("/x", bearer(forged))) == (503, "keys_unavailable", [])
    finally:
        proxy.write_policy(text)
    wait_for(lambda: proxy.status()["policy"]["digest"] == digest, "the policy to be as before", proxy, seconds=10)


def unencoded(header: Mapping[str, Any], middle: str) -> str:
    """A token whose signature is over its payload as it is (RFC 7797 §3), with `middle` in the payload's place."""
    first = tokens.b64(json.dumps({"alg": "ES256", "kid": "ES256", **header}).encode())
    signature = tokens.raw_parts(first, json.dumps(premium())).rpartition(".")[2]
    return f"{first}.{middle}.{signature}"


def test_ghsa_w7vc_732c_9m39_an_unencoded_payload_makes_a_token_invalid(world: World) -> None:
    """With `b64: false`, PyJWT decoded a payload of any size before it checked a signature, only to replace it by the
    one that it was given: an attacker had it work for nothing."""
    payload = tokens.b64(json.dumps(premium()).encode())
    middles = {"encoded": payload, "detached": "", "large": "A" * 15_000, "too large": "A" * 40_000}
    for header in ({"b64": False, "crit": ["b64"]}, {"b64": False}, {"b64": True}, {"b64": None}, {"b64": "false"}):
        assert world.outcome(ask("/x", bearer(tokens.sign(premium(), header=header)))) == INVALID_TOKEN, header
        for name, middle in middles.items():
            assert world.outcome(ask("/x", bearer(unencoded(header, middle)))) == INVALID_TOKEN, (header, name)


# ---- text that could be code ----

CODE = {
    "CEL": 'A"||true||"', "a CEL variable": "claims.plan", "Lua": "A]]..os.exit()--", "a Lua string": "A'..error(1)--",
    "a Lua pattern": "A%s*%1(.-)", "formats": "%s%n%x{0}{{C}}${C}", "a shell": "$(id)`id`", "a path": "../C",
    "an Envoy format": "%REQ(a)%", "a cluster": "expert-c", "a ladder": "expert-a~expert-c",
}  # fmt: skip


@pytest.mark.parametrize("text", CODE.values(), ids=CODE)
def test_cve_2025_46569_names_and_claims_are_data(world: World, text: str) -> None:
    """OPA put the path of a request for data into a query in its own language as it was, so a path could be code."""
    assert world.outcome(ask("/x", experts=text)) == UNKNOWN_EXPERT
    assert world.outcome(ask("/route", body=json.dumps({"expert_names": [text]}).encode())) == UNKNOWN_EXPERT
    assert world.outcome(ask("/asked/", ("x-target-cluster", f"{text}~"))) == UNKNOWN_EXPERT
    plan = tokens.sign(tokens.claims(plan=f'premium" || true || "{text}'))
    assert world.outcome(ask("/x", bearer(plan), experts="C")) == TIER_TOO_LOW
    answer, seen = world.send(ask("/x", bearer(tokens.sign(premium(sub=text))), experts="C"))
    assert (answer.status, reason(answer)) == (200, "permitted")
    subject = [("x-srp-subject", text.replace("%", "%25"))]
    assert [(name, received(request, "x-srp-subject")) for name, request in seen] == [("HIGH", subject)]


NO_NAMES = {"a weight": "A;w=1000", "an expression": "A || true", "a byte over 7F": "A\xff", "a tab inside": "A\tC"}


@pytest.mark.parametrize("text", NO_NAMES.values(), ids=NO_NAMES)
def test_cve_2025_46569_what_cannot_be_a_name_is_refused(world: World, text: str) -> None:
    """The same flaw with text that no name may have: it is refused before anything is looked up by it."""
    assert world.outcome(ask("/x", experts=text)) == BAD_GATE


CODE_IN_PATHS = [
    "/x';os.exit()--",
    "/x]]..error()--",
    "/x$(id)",
    "/%25s%25n",
    "/x'or'true'",
    "/claims.plan",
    "/%0aerror()",
]


@pytest.mark.parametrize("path", CODE_IN_PATHS)
def test_cve_2025_46569_paths_are_data(world: World, path: str) -> None:
    """The same flaw in a path, which is part of a lease's key and is what a condition reads."""
    for _ in range(2):
        assert world.outcome(ask(path)) == permitted(path)
    assert world.outcome(to("Shut", path)) == permitted(path)
    assert world.outcome(to("Open", path)) == NOT_ALLOWED
    assert world.proxy.status()["leases"]["envoy"]["errors"] == 0


def test_cve_2025_46569_a_gate_rule_may_look_like_lua(world: World) -> None:
    """The same flaw with the policy's own text, which becomes part of a Lua script: a prefix that would end a string
    there is a prefix like any other, and decisions under it are leased."""
    path = "/q']]..error('x')--/y"
    asked = ask(path, ("x-names-of-q", "A"), experts="C")

    def leased() -> bool:
        first, second = (world.send(asked)[0].id for _ in range(2))
        return first == second

    wait_for(leased, "a lease", world.proxy, seconds=10)
    assert world.outcome(asked) == permitted(path)
    assert world.outcome(ask(path, ("x-names-of-q", "C"), experts="A")) == TIER_TOO_LOW
    assert world.proxy.status()["leases"]["envoy"]["errors"] == 0


# ---- what callers say of themselves ----

WIDER: list[Header] = [
    ("x-srp-tier", "high"), ("x-srp-subject", "forged"), ("x-srp-decision", "allow"), ("x-srp-reason", "permitted"),
    ("x-srp-decision-id", "forged"), ("x-srp-requested", "C"), ("x-srp-unknown", "C"), ("x-srp-policy", "forged"),
    ("x-srp-expert", "C"), ("x-srp-attempts", "9"), ("x-srp-downgrade", "allow"), ("x-target-cluster", "expert-c;w=1"),
    ("x-requested-cluster", "expert-c"), ("x-envoy-original-path", "/forged"), ("x-envoy-internal", "true"),
    ("x-envoy-upstream-rq-timeout-ms", "1"), ("x-envoy-upstream-rq-per-try-timeout-ms", "1"),
    ("x-envoy-expected-rq-timeout-ms", "1"), ("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "99"),
    ("x-envoy-external-address", "10.6.6.6"), ("x-envoy-decorator-operation", "forged"), ("x-envoy-ip-tags", "forged"),
    ("x-envoy-upstream-alt-stat-name", "forged"), ("x-envoy-auth-partial-body", "true"), ("x-envoy-attempt-count", "9"),
    ("x-envoy-hedge-on-per-try-timeout", "true"), ("x-envoy-force-trace", "true"), ("x-envoy-peer-metadata", "forged"),
    ("x-forwarded-for", "10.6.6.6, 127.0.0.1"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "expert-c"),
    ("x-forwarded-client-cert", "By=a;Subject=CN=root"), ("forwarded", "for=127.0.0.1"), ("x-real-ip", "127.0.0.1"),
    ("x-original-url", "/admin"), ("x-rewrite-url", "/admin"), ("x-http-method-override", "DELETE"), ("x-user", "root"),
]  # fmt: skip
# Forwarded as the client sent them: no decision reads them, and no expert may take them for the proxy's own.
FORWARDED = {
    "x-forwarded-host", "forwarded", "x-real-ip", "x-original-url", "x-rewrite-url", "x-http-method-override", "x-user",
}  # fmt: skip


@pytest.mark.parametrize("headers", [*([h] for h in WIDER), WIDER], ids=[*(name for name, _ in WIDER), "all of them"])
def test_cve_2026_47101_callers_do_not_widen_their_own_rights(world: World, headers: list[Header]) -> None:
    """LiteLLM stored the routes that a key might use as the key's owner stated them, and went by them from then on."""
    free = bearer(tokens.sign(tokens.claims(tier="high", roles=["admin"], experts=["C"])))
    assert world.outcome(ask("/x", free, *headers, experts="C")) == TIER_TOO_LOW
    assert world.outcome(ask("/admin", free, *headers, experts="Shut")) == NOT_ALLOWED
    for _ in range(3):  # decided, and then leased unless a header is part of the decision
        answer, seen = world.send(ask("/x", free, *headers))
        assert (answer.status, reason(answer), answer.headers["x-srp-expert"]) == (200, "permitted", "A")
        ((name, request),) = seen
        assert (name, request.method, request.raw_path) == ("LOW", "GET", "/x")
        ours = [("x-srp-decision-id", answer.id), ISSUED, ("x-srp-subject", "ada"), ("x-srp-tier", "low")]
        assert received(request, "x-srp-", "x-target-", "x-requested-", "authorization") == ours
        assert {h for h in headers if h in received(request, "")} == {h for h in headers if h[0] in FORWARDED}


ISSUED = ("x-srp-issuer", tokens.ISSUER)
SUBJECT, TIER = ("x-srp-subject", "root"), ("x-srp-tier", "high")
HEAD = b"POST /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-expert-names: A\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"

FORGED: list[tuple[str, bytes]] = [
    ("plain", ask("/x", SUBJECT, TIER)),
    ("with capitals", ask("/x", ("X-SRP-SUBJECT", "root"), ("X-Srp-Tier", "high"))),
    ("repeated", ask("/x", SUBJECT, TIER, ("x-srp-subject", "toor"), ("X-SRP-TIER", "high"))),
    ("empty first", ask("/x", ("x-srp-tier", ""), TIER, ("x-srp-subject", ""), SUBJECT)),
    ("named in `connection`", ask("/x", ("connection", "x-srp-tier, x-srp-subject"), TIER, SUBJECT)),
    ("in a folded line", HEAD + b"x-a: b\r\n x-srp-tier: high\r\ncontent-length: 0\r\n\r\n"),
    ("after a lone CR", HEAD + b"x-a: b\rx-srp-tier: high\r\ncontent-length: 0\r\n\r\n"),
    ("after a lone LF", HEAD + b"x-a: b\nx-srp-tier: high\ncontent-length: 0\r\n\r\n"),
    ("in trailers", CHUNKED + b"x-srp-tier: high\r\nx-srp-subject: root\r\n\r\n"),
]


@pytest.mark.parametrize("data", [c[1] for c in FORGED], ids=[c[0] for c in FORGED])
def test_forged_identity_headers_do_not_reach_the_expert(world: World, data: bytes) -> None:
    """Gateways that add their identity headers beside the client's own (with other capitals, repeated, named in
    `connection`) leave it to chance which of the two an upstream believes."""
    answer, seen = world.send(data)
    assert (answer.status, reason(answer)) == (200, "permitted")
    ours = [("x-srp-decision-id", answer.id), ("x-srp-tier", "low")]
    assert [(name, received(request, "x-srp-")) for name, request in seen] == [("LOW", ours)]


def test_forged_identity_headers_give_way_to_the_verified_ones(world: World) -> None:
    """The same flaw for a caller with a token, by decisions and by leases."""
    asked = ask("/x", SUBJECT, ("X-SRP-Tier", "low"), bearer(tokens.sign(premium(sub="grace"))), SUBJECT, experts="C")
    ids = set()
    for _ in range(4):
        answer, seen = world.send(asked)
        assert (answer.status, reason(answer)) == (200, "permitted")
        ours = [("x-srp-decision-id", answer.id), ISSUED, ("x-srp-subject", "grace"), ("x-srp-tier", "high")]
        assert [(name, received(request, "x-srp-", "authorization")) for name, request in seen] == [("HIGH", ours)]
        ids.add(answer.id)
    assert len(ids) < 4


AMBIGUOUS = [
    ("underscores", ask("/x", ("x_srp_tier", "high"))),
    ("an underscore", ask("/x", ("x-srp_subject", "root"))),
    ("a space before the colon", ask("/x", ("x-srp-tier ", "high"))),
    ("a NUL in the value", ask("/x", ("x-srp-tier", "high\0"))),
]


@pytest.mark.parametrize("data", [c[1] for c in AMBIGUOUS], ids=[c[0] for c in AMBIGUOUS])
def test_forged_identity_headers_that_could_be_read_as_ours_are_refused(world: World, data: bytes) -> None:
    """The same flaw by names that some upstreams do not tell apart: to CGI and WSGI `x_srp_tier` is `x-srp-tier`."""
    assert world.outcome(data) == BAD_REQUEST
