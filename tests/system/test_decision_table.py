"""Every row of the decision table through a real Envoy, with really signed tokens."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import aiohttp
import pytest

from tests.conftest import demo_policy
from tests.harness import tokens
from tests.harness.answer import Answer
from tests.harness.system import System, system
from tests.harness.waiting import wait_for

ALGORITHMS = ("RS256", "ES256", "EdDSA")
NEVER = (("x-srp-downgrade", "never"),)


def low(alg: str = "ES256", **claims: Any) -> str:
    return tokens.sign(tokens.claims(plan="free", **claims), alg=alg)


def premium(alg: str = "ES256", **claims: Any) -> str:
    return tokens.sign(tokens.claims(plan="premium", **claims), alg=alg)


def expert_of(answer: Answer) -> str:
    """The expert that answered, by its own account, which must agree with the proxy's."""
    name = str(answer.json["expert"]).removeprefix("Expert_")
    assert answer.headers["x-srp-expert"] == name
    return name


SERVED = [
    ("anonymous asks A,B", None, ["A", "B"], (), "allow", "permitted", {"A", "B"}),
    ("low asks A", "low", ["A"], (), "allow", "permitted", {"A"}),
    ("premium asks C", "premium", ["C"], (), "allow", "permitted", {"C"}),
    ("anonymous asks A,C: downgrade to A", None, ["A", "C"], (), "downgrade", "tier_too_low", {"A"}),
    ("anonymous asks D: its ladder", None, ["D"], (), "downgrade", "tier_too_low", {"A", "B"}),
    ("premium asks D", "premium", ["D"], (), "allow", "permitted", {"D"}),
    ("a string names one", None, "A", (), "allow", "permitted", {"A"}),
    ("an unknown name beside a known one is dropped", None, ["A", "X"], (), "allow", "permitted", {"A"}),
    ("never downgrade, nothing to downgrade", None, ["A"], NEVER, "allow", "permitted", {"A"}),
]


@pytest.mark.parametrize(("name", "caller", "asked", "headers", "verdict", "reason", "who"), SERVED)
def test_a_permitted_request_is_served_by_an_expected_expert(
    proxy: System, name: str, caller: str | None, asked: Any, headers: Any, verdict: str, reason: str, who: set[str]
) -> None:
    """With the verdict in the headers."""
    token = {"low": low, "premium": premium}[caller]() if caller else None
    answer = proxy.send(experts=asked, token=token, headers=headers)
    assert answer.status == 200, (name, answer)
    assert expert_of(answer) in who
    assert answer.headers["x-srp-decision"] == verdict
    assert answer.headers["x-srp-reason"] == reason
    assert len(answer.headers["x-srp-decision-id"]) == 16
    assert answer.headers["x-srp-policy"] == proxy.status()["policy"]["digest"]


REFUSED = [
    ("anonymous asks C", None, {"experts": ["C"]}, 403, "tier_too_low"),
    ("low asks C", "low", {"experts": ["C"]}, 403, "tier_too_low"),
    ("A,C, never downgrade", None, {"experts": ["A", "C"], "headers": NEVER}, 403, "downgrade_forbidden"),
    ("D, never downgrade", None, {"experts": ["D"], "headers": NEVER}, 403, "downgrade_forbidden"),
    ("only unknown", None, {"experts": ["X", "Y"]}, 404, "unknown_expert"),
    ("empty list", None, {"experts": []}, 400, "no_experts_requested"),
    ("wrong type", None, {"experts": 7}, 400, "bad_gate"),
    ("null", None, {"body": {"expert_names": None}}, 400, "bad_gate"),
    ("unreadable body", None, {"body": b"{"}, 400, "bad_gate"),
    ("duplicate name", None, {"body": b'{"expert_names": ["A"], "expert_names": ["C"]}'}, 400, "bad_gate"),
    ("not UTF-8", None, {"body": b'{"expert_names": ["\xff"]}'}, 400, "bad_gate"),
    ("compressed", None, {"experts": ["A"], "headers": [("content-encoding", "gzip")]}, 400, "bad_gate"),
    ("repeated gate header", None,
     {"path": "/x", "headers": [("x-expert-names", "A"), ("x-expert-names", "B")]}, 400, "bad_gate"),
    ("empty gate header", None, {"path": "/x", "headers": [("x-expert-names", "")]}, 400, "no_experts_requested"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "caller", "how", "status", "code"), REFUSED)
def test_a_refused_request_reaches_no_expert(
    proxy: System, name: str, caller: str | None, how: dict[str, Any], status: int, code: str
) -> None:
    """With its status and reason."""
    before = sum(proxy.served(e) for e in proxy.ports)
    answer = proxy.send(token=low() if caller else None, **how)
    assert (answer.status, answer.code) == (status, code), (name, answer)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["error"]["decision_id"] == answer.headers["x-srp-decision-id"]
    assert "x-srp-expert" not in answer.headers
    assert sum(proxy.served(e) for e in proxy.ports) == before


def test_a_403_names_the_expert_its_tier_and_the_callers(proxy: System) -> None:
    error = proxy.send(experts=["C"]).json["error"]
    assert error["requested"] == ["C"]
    assert (error["required_tier"], error["caller_tier"]) == ("high", "low")
    assert "C" in error["message"]


def test_a_request_that_names_no_expert_gets_the_default_list(proxy: System) -> None:
    for how in ({"body": {"token_id": 1}}, {"path": "/x", "body": {"token_id": 1}}):
        answer = proxy.send(**how)  # type: ignore[arg-type]
        assert answer.status == 200
        assert answer.headers["x-srp-expert"] in {"A", "B"}


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_tokens_of_every_key_type_verify(proxy: System, alg: str) -> None:
    """RS256, ES256 and EdDSA."""
    assert expert_of(proxy.send(experts=["C"], token=premium(alg))) == "C"
    assert proxy.send(experts=["C"], token=low(alg)).status == 403


def bad_tokens() -> dict[str, str]:
    good = premium()
    header, claims, signature = good.split(".")
    flipped = ("B" if signature[0] != "B" else "C") + signature[1:]
    now = int(time.time())
    return {
        "garbage": "garbage",
        "tampered signature": f"{header}.{claims}.{flipped}",
        "claims of another": f"{header}.{low().split('.')[1]}.{signature}",
        "expired": premium(exp=now - 60),
        "no expiry": tokens.sign({k: v for k, v in tokens.claims(plan="premium").items() if k != "exp"}),
        "another audience": premium(aud="someone-else"),
        "another issuer": premium(iss="https://evil.example/"),
        "not yet": premium(nbf=now + 600),
        "two in one": f"{good},{good}",
        "oversize": good + "A" * 17_000,
    }


@pytest.mark.parametrize("name", sorted(bad_tokens()))
def test_a_bad_token_is_401_and_never_anonymous(proxy: System, name: str) -> None:
    """Even where an anonymous caller would be served."""
    answer = proxy.send(experts=["A"], token=bad_tokens()[name])
    assert (answer.status, answer.code) == (401, "invalid_token")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert bad_tokens()[name][:40] not in answer.body.decode()


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer {}"), ("x-expert-access-token", "{}")],
        [("authorization", "Bearer {}"), ("authorization", "Bearer {}")],
        [("authorization", "Basic e30=")],
        [("authorization", "")],
        [("x-expert-access-token", "")],
    ],
)
def test_anything_but_one_bearer_token_is_401(proxy: System, headers: list[tuple[str, str]]) -> None:
    """Two tokens, or anything else in their place."""
    token = premium()
    answer = proxy.send(experts=["A"], headers=[(n, v.format(token)) for n, v in headers])
    assert (answer.status, answer.code) == (401, "invalid_token")


def test_x_expert_access_token_carries_a_token_as_well(proxy: System) -> None:
    assert expert_of(proxy.send(experts=["C"], headers=[("x-expert-access-token", premium())])) == "C"


SPOOFS = [
    [("x-target-cluster", "expert-c")],
    [("X-Target-Cluster", "expert-c;w=1")],
    [("x-target-cluster", "expert-a"), ("x-target-cluster", "expert-c")],
    [("x-requested-cluster", "expert-c")],
    [("x-srp-tier", "high"), ("x-srp-subject", "root")],
    [("x-envoy-original-path", "/v1/x"), ("x-envoy-retry-on", "5xx"), ("x-envoy-upstream-alt-stat-name", "x")],
    [("connection", "x-target-cluster"), ("x-target-cluster", "expert-c")],
]


@pytest.mark.parametrize("headers", SPOOFS)
@pytest.mark.parametrize("path", ["/route", "/x", "/asked/x"])
def test_no_header_of_the_client_becomes_the_target(proxy: System, path: str, headers: list[tuple[str, str]]) -> None:
    """A request with a spoofed header never reaches C, and experts never see an unverified tier."""
    before = proxy.served("C")
    answer = proxy.send(path, headers=headers, body={"token_id": 1, "expert_names": ["A"]})
    assert answer.status in {200, 400, 403}
    assert proxy.served("C") == before
    for name in ("A", "B"):
        assert not any(who.startswith("high|root") for who in proxy.seen(name))


def test_a_client_may_ask_by_cluster_where_the_gate_says_so(proxy: System) -> None:
    """Its x-target-cluster is a request, decided like any other."""
    asked = [("x-target-cluster", "expert-c")]
    assert proxy.send("/asked/x", headers=asked, body={}).status == 403
    answer = proxy.send("/asked/x", headers=asked, body={}, token=premium())
    assert (answer.status, answer.headers["x-srp-expert"]) == (200, "C")


@pytest.mark.parametrize(
    ("wishes", "status", "code"),
    [
        (["expert-a", "expert-a"], 400, "bad_gate"),
        (["expert-a", "expert-c"], 400, "bad_gate"),
        (["expert-a", ""], 400, "bad_gate"),
        ([""], 400, "no_experts_requested"),
        (["", ""], 400, "no_experts_requested"),
        (["", "expert-a"], 400, "no_experts_requested"),
    ],
    ids=str,
)
def test_a_wish_that_is_repeated_or_empty_is_refused(proxy: System, wishes: list[str], status: int, code: str) -> None:
    """Neither the first value nor the default list counts, as in any other header that names experts."""
    answer = proxy.send("/asked/x", headers=[("x-target-cluster", wish) for wish in wishes], body={})
    assert (answer.status, answer.code) == (status, code)


def test_a_token_header_that_the_connection_header_nominates_is_none(proxy: System) -> None:
    """It is one hop's business by RFC 9110 §7.6.1: Envoy removes it before any filter, so the caller is anonymous."""
    for name, value in (("authorization", f"Bearer {premium()}"), ("x-expert-access-token", premium())):
        with_token = [(name, value)]
        assert proxy.send(experts=["C"], headers=with_token).status == 200
        nominated = proxy.send(experts=["C"], headers=[("connection", f"close, {name}"), *with_token])
        assert (nominated.status, nominated.code) == (403, "tier_too_low")
        assert nominated.json["error"]["caller_tier"] == "low"


def test_more_headers_than_leave_room_for_a_decisions_own_are_refused(proxy: System) -> None:
    """431, and not Envoy's 503 when it cannot add them."""
    for headers in ([(f"h{n}", "v") for n in range(90)], [(f"h{n}", "v" * 7000) for n in range(8)]):
        answer = proxy.send(experts=["A"], headers=headers, token=premium())
        assert (answer.status, answer.code) == (431, "headers_too_large")
    answer = proxy.send(experts=["A"], headers=[(f"h{n}", "v") for n in range(60)], token=premium())
    assert answer.status == 200


def test_the_expert_learns_who_calls_and_never_the_token(proxy: System) -> None:
    """Verified tier and subject are passed on; the sample experts record them."""
    subject = "caller-17"
    proxy.send(experts=["C"], token=premium(sub=subject))
    assert proxy.seen("C").get(f"high|{subject}") == 1


def test_a_body_over_the_limit_is_refused_before_it_is_read(proxy: System) -> None:
    """The limit is 64 KiB."""
    assert proxy.send(body=b'{"expert_names": ["A"], "pad": "' + b"x" * 70_000 + b'"}').status == 413


def test_the_access_log_has_the_decision_and_no_token(proxy: System) -> None:
    """Nor the subject or the query."""
    token = premium(sub="secret-subject")
    answer = proxy.send("/route?access_token=secret-query", experts=["C"], token=token)
    wanted = answer.headers["x-srp-decision-id"]
    wait_for(lambda: wanted in proxy.envoy.log.read_text(), "the access log", seconds=15)
    text = proxy.envoy.log.read_text() + proxy.authz.log.read_text()
    assert token not in text
    assert "secret-subject" not in text
    assert "secret-query" not in text


def test_a_thousand_mixed_requests_reach_no_forbidden_expert(proxy: System) -> None:
    """64 at a time, from callers of both tiers: none fails, and no low caller reaches C or D."""
    before = {name: proxy.seen(name) for name in ("C", "D")}
    chosen = random.Random(7)
    callers = {"low": low(sub="mixed-low"), "premium": premium(sub="mixed-high"), "none": None}
    asks = [["A"], ["A", "B"], ["A", "C"], ["D"], ["B", "D", "C"], ["C", "X"]]

    async def one(session: aiohttp.ClientSession, gate: asyncio.Semaphore) -> tuple[str, tuple[str, ...], int, str]:
        who, experts = chosen.choice(list(callers)), chosen.choice(asks)
        headers = {"authorization": f"Bearer {callers[who]}"} if callers[who] else {}
        body = {"token_id": 1, "expert_names": experts}
        url = f"http://127.0.0.1:{proxy.port}/route"
        async with gate, session.post(url, json=body, headers=headers) as response:
            await response.read()
            return who, tuple(experts), response.status, response.headers.get("x-srp-expert", "")

    async def all_of_them() -> list[tuple[str, tuple[str, ...], int, str]]:
        gate = asyncio.Semaphore(64)
        connector = aiohttp.TCPConnector(limit=64)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(one(session, gate) for _ in range(1000)))

    results = asyncio.run(all_of_them())
    for who, experts, status, expert in results:
        if who == "premium":
            assert (status, expert in experts) == (200, True), (who, experts, status, expert)
        elif experts == ("C", "X"):
            assert status == 403
        else:
            assert status == 200, (who, experts, status)
            assert expert in {"A", "B"}
    assert Counter(status for _, _, status, _ in results).keys() == {200, 403}
    for name in ("C", "D"):
        new = Counter(proxy.seen(name)) - Counter(before[name])
        assert set(new) <= {"high|mixed-high"}
        assert new


def test_without_ext_authz_every_answer_is_503_until_it_is_back() -> None:
    """Meanwhile no expert is reached; Envoy needs no restart."""
    files = {"jwks.json": tokens.jwks("RS256", "ES256", "EdDSA")}
    with system(demo_policy, {"A": 1, "B": 1, "C": 1, "D": 1}, files) as it:
        statuses: list[tuple[float, int]] = []
        down: list[float] = []

        async def load() -> None:
            url = f"http://127.0.0.1:{it.port}/route"

            async def client(session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
                while not stop.is_set():
                    began = time.monotonic()
                    async with session.post(url, json={"token_id": 1, "expert_names": ["A"]}) as response:
                        body = await response.read()
                        statuses.append((began, response.status))
                        assert response.status in {200, 503}, body
                        if response.status == 503:
                            assert b"authz_unavailable" in body

            stop = asyncio.Event()
            async with aiohttp.ClientSession() as session:
                clients = [asyncio.create_task(client(session, stop)) for _ in range(16)]
                await asyncio.sleep(0.5)
                await asyncio.to_thread(it.authz.kill)
                down.append(time.monotonic())
                reached = await asyncio.to_thread(it.served, "A")
                await asyncio.sleep(1.0)
                down.append(time.monotonic())
                assert await asyncio.to_thread(it.served, "A") == reached
                await asyncio.to_thread(it.authz.start)
                await asyncio.to_thread(wait_for, lambda: it.send(experts=["A"]).status == 200, "ext_authz", it)
                stop.set()
                await asyncio.gather(*clients)

        asyncio.run(load())
        meanwhile = [status for began, status in statuses if down[0] < began < down[1]]
        assert len(meanwhile) > 10
        assert set(meanwhile) == {503}
        assert it.send(experts=["A"]).status == 200
