"""Leases: every rule of docs/leases.md, in a real Envoy; what Envoy repeats is what ext_authz would have decided."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gzip
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import ext_authz.serve.control
from ext_authz.demo.ports import HOST, free_ports
from ext_authz.serve.epoch import Epoch
from ext_authz.wire import check as wire
from ext_authz.wire.ads import Resources
from ext_authz.wire.clusters import TYPE_CLUSTER
from tests.conftest import demo_policy
from tests.harness import raw, tokens
from tests.harness.answer import Answer
from tests.harness.checks import check_request, response_of
from tests.harness.leased import Leased, leased, without_leases
from tests.harness.proxy import Proxy
from tests.harness.system import system
from tests.harness.waiting import wait_for

PREMIUM = tokens.sign(tokens.claims(plan="premium"))
FREE = tokens.sign(tokens.claims(plan="free"))

LEEWAY = 1.0  # of the policy, in seconds
OWN = {"x-srp-decision-id", "x-request-id", "date", "content-length"}  # differ from answer to answer


@pytest.fixture(scope="module")
def it() -> Iterator[Leased]:
    """ext_authz, a first Envoy with leases and a second one without."""
    with leased() as made:
        made.add_proxy()
        made.add_proxy(without_leases)
        made.wait_for_leases()
        yield made


@pytest.fixture
def proxy(it: Leased) -> Proxy:
    """The Envoy with leases, at the start of an epoch."""
    it.swap(f"{it.text}# {time.time()}\n")
    it.wait_for_leases()
    return it.proxies[0]


# ---- what is leased ----

LEASED: list[tuple[str, dict[str, Any]]] = [
    ("a token and a header gate", {"token": PREMIUM, "experts": "C"}),
    ("anonymous", {"experts": "A,B"}),
    ("the default list", {}),
    ("a gate without header", {"path": "/always/a"}),
    ("a downgrade", {"experts": "C", "token": FREE}),
    ("a downgrade to what was asked for", {"experts": "A,D", "token": FREE}),
    ("an unknown name beside a known one", {"experts": "A,nobody"}),
    ("a cluster asked for by x-target-cluster", {"path": "/asked/a", "headers": [("x-target-cluster", "expert-a")]}),
    ("the other token header", {"headers": [("x-expert-access-token", PREMIUM)], "experts": "C"}),
    ("no downgrade wanted, none needed", {"headers": [("x-srp-downgrade", "never")], "experts": "A"}),
    ("a body of known length", {"method": "POST", "body": b"x" * 65_000, "experts": "A"}),
]


@pytest.mark.parametrize(("name", "request_"), LEASED, ids=[n for n, _ in LEASED])
def test_a_repeated_answer_is_the_first_one(proxy: Proxy, name: str, request_: dict[str, Any]) -> None:
    """The same headers for the client and the expert, and the id of the decision that granted the lease."""
    first, second = proxy.send(**request_), proxy.send(**request_)
    assert first.status == second.status == 200
    assert second.id == first.id != ""
    ours = {k: v for k, v in first.headers.items() if k.startswith("x-srp-")}
    assert {k: v for k, v in second.headers.items() if k.startswith("x-srp-")} == ours
    assert expert_view(second) == expert_view(first)
    counters = proxy.counters()
    assert (counters["misses"], counters["stores"], counters["hits"], counters["errors"]) == (1, 1, 1, 0)


NOT_LEASED: list[tuple[str, dict[str, Any]]] = [
    ("a body gate", {"path": "/route", "method": "POST", "body": b'{"expert_names": ["A"]}'}),
    ("a body gate without a body", {"path": "/route", "method": "POST"}),
    ("a denial", {"experts": "D"}),
    ("a downgrade refused", {"experts": "C", "headers": [("x-srp-downgrade", "never")]}),
    ("an unknown expert", {"experts": "nobody"}),
    ("a bad token", {"token": "a.b.c", "experts": "A"}),
    ("an expert whose allow reads the request", {"experts": "R", "method": "POST"}),
    ("such an expert beside another", {"experts": "A,R", "method": "POST"}),
    ("such an expert among those to downgrade to", {"experts": "S"}),
    ("an expert with `lease: 0`", {"experts": "O"}),
    ("such an expert beside another", {"experts": "A,O"}),
    ("a repeated gate header", {"headers": [("x-expert-names", "A"), ("X-Expert-Names", "A")]}),
    ("a repeated token header", {"headers": [("x-expert-access-token", PREMIUM)] * 2}),
    ("both token headers", {"token": PREMIUM, "headers": [("x-expert-access-token", PREMIUM)]}),
    ("a repeated downgrade header", {"experts": "A", "headers": [("x-srp-downgrade", "allow")] * 2}),
    ("a key over 4 KiB", {"experts": ",".join(["A", *(f"{n:064d}" for n in range(63))])}),
]


@pytest.mark.parametrize(("name", "request_"), NOT_LEASED, ids=[n for n, _ in NOT_LEASED])
def test_some_requests_are_never_leased(proxy: Proxy, name: str, request_: dict[str, Any]) -> None:
    """Each is decided anew, and nothing is stored."""
    assert not proxy.leased(**request_)
    assert proxy.counters()["stores"] == 0


DIFFERENT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("another token", {"token": PREMIUM, "experts": "A"}, {"token": FREE, "experts": "A"}),
    ("no token", {"token": PREMIUM, "experts": "A"}, {"experts": "A"}),
    ("other experts", {"experts": "A"}, {"experts": "B"}),
    ("another order", {"experts": "A,B"}, {"experts": "B,A"}),
    ("an empty header", {}, {"experts": ""}),
    ("another path", {"path": "/a", "experts": "A"}, {"path": "/b", "experts": "A"}),
    ("another gate", {"path": "/asked/a"}, {"path": "/always"}),
    ("a wish for a target", {}, {"headers": [("x-target-cluster", "expert-b")]}),
    ("no downgrade", {"experts": "C"}, {"experts": "C", "headers": [("x-srp-downgrade", "never")]}),
    ("a header twice", {"experts": "A,B"}, {"experts": "A", "headers": [("x-expert-names", "B")]}),
    ("the token in the other header", {"token": PREMIUM}, {"headers": [("x-expert-access-token", PREMIUM)]}),
]


@pytest.mark.parametrize(("name", "first", "other"), DIFFERENT, ids=[n for n, _, _ in DIFFERENT])
def test_a_lease_is_for_its_own_key(proxy: Proxy, name: str, first: dict[str, Any], other: dict[str, Any]) -> None:
    """A request that differs in anything that a decision reads does not match the lease."""
    assert proxy.leased(**first)
    assert proxy.send(**other).id != proxy.send(**first).id


SAME: list[tuple[str, dict[str, Any]]] = [
    ("a query", {"path": "/x?a=b", "experts": "A"}),
    ("a header that no decision reads", {"experts": "A", "headers": [("x-team", "red")]}),
    ("a name in other letters", {"headers": [("X-EXPERT-NAMES", "A")]}),
    ("another method", {"experts": "A", "method": "POST", "body": b"{}"}),
    ("what only we may write", {"experts": "A", "headers": [("x-srp-subject", "root"), ("x-srp-tier", "high")]}),
    ("another issuer", {"experts": "A", "headers": [("x-srp-issuer", "https://evil.example/"), ("x-srp-foo", "1")]}),
    ("limits of Envoy's", {"experts": "A", "headers": [("x-envoy-max-retries", "9"), ("x-envoy-retry-on", "5xx")]}),
]


@pytest.mark.parametrize(("name", "request_"), SAME, ids=[n for n, _ in SAME])
def test_what_no_decision_reads_does_not_matter_to_a_lease(proxy: Proxy, name: str, request_: dict[str, Any]) -> None:
    """And a client's own values of our headers do not reach the expert, as without a lease."""
    first = proxy.send(experts="A")
    other = proxy.send(**request_)
    assert other.id == first.id
    assert first.upstream is not None
    assert other.upstream is not None
    names = {n for n in {**first.upstream, **other.upstream} if n.startswith("x-srp-")}
    for name in (*names, "x-envoy-max-retries", "x-envoy-retry-on", "x-target-cluster"):
        assert other.upstream.get(name) == first.upstream.get(name)


def test_a_token_reaches_no_expert(proxy: Proxy) -> None:
    """With or without a lease; nor do the headers that only the decision reads."""
    for _ in range(2):
        answer = proxy.send(
            token=PREMIUM, experts="C", headers=[("x-srp-downgrade", "never"), ("x-target-cluster", "a")]
        )
        assert answer.upstream is not None
        assert answer.upstream["x-srp-subject"] == "ada"
        assert answer.upstream["x-srp-issuer"] == tokens.ISSUER
        assert not {"authorization", "x-srp-downgrade", "x-requested-cluster"} & set(answer.upstream)


def test_an_expert_cannot_set_our_headers_on_a_leased_answer(it: Leased, proxy: Proxy) -> None:
    """Its own x-srp headers are removed."""
    it.upstream.headers = {"x-srp-decision": "deny", "x-srp-unknown": "mine"}
    try:
        assert proxy.leased(experts="A")
        answer = proxy.send(experts="A")
        assert (answer.headers["x-srp-decision"], answer.headers.get("x-srp-unknown")) == ("allow", None)
    finally:
        it.upstream.headers = {}


def test_a_body_beyond_the_limit_finds_no_lease(proxy: Proxy) -> None:
    """It gets 413 with a lease as without, whether the body has a length or not."""
    warm = proxy.send(experts="A", method="POST", body=b"{}").id
    for chunked in (False, True):
        assert proxy.send(experts="A", method="POST", body=b"x" * 60_000, chunked=chunked).id == warm
        assert proxy.send(experts="A", method="POST", body=b"x" * 70_000, chunked=chunked).status == 413
        assert proxy.send(experts="A", method="POST", body=b"x" * 200_000, chunked=chunked).status == 413
    assert proxy.counters()["errors"] == 0


NAMES_A = {"x-expert-names": "A"}
TRAILERS = raw.frame(raw.HEADERS, raw.END_HEADERS | raw.END_STREAM, raw.literal({"x-t": "1"}))
LAST_DATA = raw.frame(raw.DATA, raw.END_STREAM, b"12345")

IN_PIECES: list[tuple[str, list[bytes]]] = [
    ("a body", raw.http1({**NAMES_A, "content-length": "10"}, b"12345", b"67890")),
    ("a body in chunks", raw.http1({**NAMES_A, "transfer-encoding": "chunked"}, b"5\r\n12345\r\n", b"0\r\n\r\n")),
    ("an empty body in chunks", raw.http1({**NAMES_A, "transfer-encoding": "chunked"}, b"0\r\n\r\n")),
    ("HTTP/2: a body", raw.http2({**NAMES_A, "content-length": "5"}, LAST_DATA)),
    ("HTTP/2: a body of unknown length", raw.http2(NAMES_A, LAST_DATA)),
    ("HTTP/2: an empty body", raw.http2(NAMES_A, raw.frame(raw.DATA, raw.END_STREAM))),
    ("HTTP/2: trailers and no body", raw.http2(NAMES_A, TRAILERS)),
    ("HTTP/2: a body and trailers", raw.http2(NAMES_A, raw.frame(raw.DATA, 0, b"12345"), TRAILERS)),
]


@pytest.mark.parametrize(("name", "pieces"), IN_PIECES, ids=[n for n, _ in IN_PIECES])
def test_a_slow_request_finds_no_lease(it: Leased, proxy: Proxy, name: str, pieces: list[bytes]) -> None:
    """Only a request that arrives at once does. Otherwise ext_authz decides when it is complete."""
    warm, served = proxy.send(experts="A").id, it.upstream.seen

    def decided(pause: float) -> str:
        before = len(served)
        with raw.sent(proxy.port, pieces, pause):
            wait_for(lambda: len(served) > before, "an answer")
        return served[-1].headers["x-srp-decision-id"]

    wait_for(lambda: decided(0) == warm, "a hit")
    with raw.sent(proxy.port, pieces[:-1]):
        before = len(served)
        time.sleep(0.05)
        assert len(served) == before
    assert decided(0.05) != warm
    assert proxy.counters()["errors"] == 0


def test_a_body_of_another_length_than_announced_reaches_no_expert(it: Leased, proxy: Proxy) -> None:
    """HTTP/2 frames of another length, with or without a lease."""
    assert proxy.leased(experts="A")
    served = len(it.upstream.seen)
    for length in ("3", "8"):
        with raw.sent(proxy.port, raw.http2({**NAMES_A, "content-length": length}, LAST_DATA)):
            time.sleep(0.05)
    assert len(it.upstream.seen) == served


@pytest.mark.parametrize(
    "headers",
    [
        [("x-many", "1")] * 90,
        [("x-many", "1")] * 94,
        [(f"x-{n}", "a" * 7000) for n in range(8)],
    ],
    ids=["90", "94", "56 KiB"],
)
def test_headers_that_leave_no_room_for_the_decision_are_rejected(
    it: Leased, proxy: Proxy, headers: list[tuple[str, str]]
) -> None:
    """431 before Envoy would fail to add the decision's own: with a warm lease as without."""
    assert proxy.leased(experts="A")
    for answer in (p.send(experts="A", headers=headers) for p in it.proxies):
        assert (answer.status, answer.code) == (431, "headers_too_large")


def test_a_decision_that_envoy_refuses_is_not_leased(it: Leased, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 each time, for a header that ext_authz may not set."""
    traffic = wire._traffic
    monkeypatch.setattr(wire, "_traffic", lambda experts: {**traffic(experts), "x-forbidden": "1"})
    it.swap(it.text + "# a header more\n")
    it.wait_for_leases()
    assert [proxy.send(experts="A").status for _ in range(3)] == [503] * 3
    assert proxy.counters()["stores"] == 0


def test_an_unavailable_expert_gets_the_same_answer_with_a_lease(it: Leased, proxy: Proxy) -> None:
    """503 for an expert that is down."""
    (dead,) = free_ports(1)
    it.swap(
        it.text.replace(
            f'expert-b, endpoints: ["{HOST}:{it.upstream.port}"]', f'expert-b, endpoints: ["{HOST}:{dead}"]'
        )
    )
    it.wait_for_leases()
    first, second = proxy.send(experts="B"), proxy.send(experts="B")
    assert first.status == 503
    assert first.id == second.id != ""
    assert (client_view(first), first.headers["retry-after"]) == (client_view(second), second.headers["retry-after"])


# ---- what ends a lease ----


def test_a_lease_ends_with_its_time(proxy: Proxy) -> None:
    """`lease: 400ms`, counted from the decision."""
    began = time.time()
    first = proxy.send(experts="T")
    while time.time() < began + 0.3:
        assert proxy.send(experts="T").id == first.id
    time.sleep(max(0, began + 0.45 - time.time()))
    assert proxy.send(experts="T").id != first.id


def test_a_token_is_refused_from_its_expiry_on_under_load(it: Leased, proxy: Proxy) -> None:
    """With exp in 2 s and 1 s of leeway: until then it is served, by a lease; later requests are refused."""
    ends = int(time.time()) + 3
    token = tokens.sign(tokens.claims(plan="premium", exp=ends - 1))
    answers = under_load(proxy, token, ends + 0.3)
    late = [a for began, a in answers if began >= ends]
    assert late
    assert {a.status for a in late} == {401}
    early = [a for began, a in answers if began < ends - 0.2]
    assert {a.status for a in early} == {200}
    assert len({a.id for a in early}) < len(early) / 2


def test_a_revoked_token_is_refused_from_the_ack_on_under_load(it: Leased, proxy: Proxy) -> None:
    """By its jti; another token of the same caller still works."""
    stolen = tokens.sign(tokens.claims(plan="premium", jti="stolen"))
    fine = tokens.sign(tokens.claims(plan="premium", jti="fine"))
    assert proxy.leased(token=fine, experts="C")
    acked: list[float] = []

    def revoke() -> None:
        time.sleep(0.3)
        it.swap(it.text + "revoked: {jti: [stolen]}\n")
        acked.append(time.time())

    revoking = threading.Thread(target=revoke)
    revoking.start()
    answers = under_load(proxy, stolen, time.time() + 1.2)
    revoking.join()
    late = [a for began, a in answers if began >= acked[0]]
    assert len(late) > 5
    assert {a.status for a in late} == {401}
    served = [a.id for _, a in answers if a.status == 200]
    assert len(set(served)) < len(served) / 2
    assert proxy.send(token=fine, experts="C").status == 200


def test_a_rotated_key_ends_the_leases_of_its_tokens(it: Leased, proxy: Proxy) -> None:
    """It ends all leases: the next epoch starts empty."""
    old, new = PREMIUM, tokens.sign(tokens.claims(plan="premium"), name="new")
    assert proxy.leased(token=old, experts="C")
    warm = proxy.send(experts="A").id
    it.rotate("new")
    try:
        assert proxy.send(token=old, experts="C").status == 401
        assert proxy.send(experts="A").id != warm
        it.wait_for_leases()
        assert proxy.leased(token=new, experts="C")
    finally:
        it.rotate("")


def test_every_new_epoch_starts_empty(it: Leased, proxy: Proxy) -> None:
    """Even if its policy differs only by a comment."""
    first = proxy.send(experts="A")
    assert proxy.send(experts="A").id == first.id
    it.swap(it.text + "# a comment\n")
    second = proxy.send(experts="A")
    assert (second.status, second.id == first.id) == (200, False)


def test_a_policy_without_leases_ends_them(it: Leased, proxy: Proxy) -> None:
    """`lease: 0` ends the leases of all experts without a lease of their own."""
    assert proxy.leased(experts="A")
    it.swap(it.text + "lease: 0\n")
    assert not proxy.leased(experts="A")
    assert proxy.leased(experts="T")
    it.swap(it.text.replace("lease: 400ms", "lease: 0") + "lease: 0\n")
    assert it.control.lease_epoch is None
    assert not proxy.leased(experts="T")


def test_a_request_that_is_completed_after_a_revocation_is_refused(it: Leased, proxy: Proxy) -> None:
    """Its head came while there was a lease, its end after the revocation: 401."""
    stolen = tokens.sign(tokens.claims(plan="premium", jti="stolen"))
    assert proxy.leased(token=stolen, experts="C")
    pieces = raw.http2({"x-expert-names": "C", "authorization": f"Bearer {stolen}"}, TRAILERS)
    served, hits = len(it.upstream.seen), proxy.counters()["disabled"]
    with raw.sent(proxy.port, pieces[:-1]) as connection:
        it.swap(it.text + "revoked: {jti: [stolen]}\n")
        decided = it.decided
        connection.sendall(pieces[-1])
        wait_for(lambda: it.decided > decided, "the decision")
        time.sleep(0.05)
    assert (len(it.upstream.seen), proxy.counters()["disabled"]) == (served, hits)


def test_a_check_that_runs_while_its_key_is_removed_is_not_leased(it: Leased, proxy: Proxy) -> None:
    """The old keys decide it, but the answer is not repeated."""
    decided, it.held = it.decided, asyncio.Event()
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            late = pool.submit(proxy.send, token=PREMIUM, experts="C")
            wait_for(lambda: it.decided > decided, "the decision")
            it.rotate("new")
            it.loop._loop.call_soon_threadsafe(it.held.set)
            assert late.result(10).status == 200
        it.held = None
        assert proxy.send(token=PREMIUM, experts="C").status == 401
    finally:
        it.held = None
        it.rotate("")


def test_a_policy_that_envoy_refuses_ends_no_lease(it: Leased, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old policy and its epoch stay: leases stay, and new ones are granted."""
    warm, epoch = proxy.send(experts="A").id, it.control.lease_epoch
    good = ext_authz.serve.control.cluster_resources
    broken = Resources.of({TYPE_CLUSTER: (b"\x0a\x01x\x10\x63",)})  # with a discovery type that does not exist
    answers = iter([broken])
    monkeypatch.setattr(
        ext_authz.serve.control, "cluster_resources", lambda *policies: next(answers, None) or good(*policies)
    )
    it.policy.write_text(it.text + "# refused\n")
    assert not it.run(it.control.reload())
    assert "envoy rejected" in (it.control.status.error or "")
    it.wait_for_leases()
    assert it.control.lease_epoch == epoch
    assert proxy.send(experts="A").id == warm
    assert proxy.leased(experts="B")


def test_an_envoy_that_lags_keeps_the_others_from_leases_for_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """After that no push waits for it, and the Envoys that answer get leases. It joins again when it answers."""
    monkeypatch.setattr(ext_authz.serve.control, "ACK_TIMEOUT", 2.0)
    with leased() as it:
        quick, slow = it.add_proxy(), it.add_proxy()
        it.wait_for_leases()
        warm = quick.send(experts="A").id
        assert quick.send(experts="A").id == warm
        slow.process.send_signal(signal.SIGSTOP)
        try:
            it.policy.write_text(it.text + "# while one sleeps\n")
            swapping = asyncio.run_coroutine_threadsafe(it.control.reload(), it.loop._loop)
            wait_for(lambda: it.control.lease_epoch is None, "the end of the grants")
            assert not swapping.done()
            assert it.authorization.epoch.grants is False
            assert swapping.result(10)
            it.wait_for_leases()
            assert quick.send(experts="A").id != warm
            assert quick.leased(experts="A")
            began = time.monotonic()
            it.swap(it.text + "# while it still sleeps\n")
            assert time.monotonic() - began < 1.5  # a push that waited would take 2 s
            it.wait_for_leases()
            assert quick.leased(experts="A")
        finally:
            slow.process.send_signal(signal.SIGCONT)
        wait_for(lambda: it.ads.settled, "the answer of the slow one")
        it.wait_for_leases()
        assert quick.leased(experts="A")
        assert slow.leased(experts="A")


def test_no_leases_are_granted_during_a_swap(it: Leased, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the push to the ACK, the old epoch grants no more leases and the new one none yet."""
    monkeypatch.setattr(ext_authz.serve.control, "ACK_TIMEOUT", 0.3)

    def grants() -> bool:
        return "lease" in metadata(it.run(it.authorization.check(check_request("A"))))

    assert grants()
    it.run(it.authorization.check(check_request("A")))
    process = proxy.process
    process.send_signal(signal.SIGSTOP)  # it will not answer
    try:
        it.policy.write_text(it.text + "# while envoy sleeps\n")
        swapping = asyncio.run_coroutine_threadsafe(it.control.reload(), it.loop._loop)
        wait_for(lambda: it.control.lease_epoch is None, "the end of the grants")
        while not swapping.done():
            assert not grants()
            time.sleep(0.02)
        assert not grants()  # after the timeout the policy is in force without leases
        assert it.control.status.digest == it.authorization.epoch.snapshot.policy.digest
    finally:
        process.send_signal(signal.SIGCONT)
    it.wait_for_leases()
    assert grants()


def test_a_grant_that_arrives_after_a_swap_is_ignored(it: Leased, proxy: Proxy) -> None:
    """Decided before the swap and answered after it, it is not in the new epoch's table."""
    decided, it.held = it.decided, asyncio.Event()
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            late = pool.submit(proxy.send, experts="B")
            wait_for(lambda: it.decided > decided, "the decision")
            it.swap(it.text + "# meanwhile\n")
            it.loop._loop.call_soon_threadsafe(it.held.set)
            answer = late.result(10)
    finally:
        it.held = None
    assert answer.status == 200
    assert proxy.send(experts="B").id != answer.id


def test_the_filter_ignores_grants_of_another_epoch(it: Leased, proxy: Proxy) -> None:
    """Even if ext_authz grants one."""
    true, foreign = it.authorization.epoch, Epoch.of(it.authorization.epoch.snapshot, "another")
    it.authorization.epoch = replace(foreign, grants=True)
    try:
        granted_before = it.tally.leases
        assert not proxy.leased(experts="A")
        assert it.tally.leases == granted_before + 2
        assert proxy.counters()["stores"] == 0
    finally:
        it.authorization.epoch = true
    assert proxy.leased(experts="A")


def test_changes_of_keys_within_50_ms_are_one_push(it: Leased, proxy: Proxy) -> None:
    """Each is an epoch, but only one filter is sent."""
    before = proxy.counters()["config_reload"]

    async def burst() -> None:
        epochs = {it.authorization.epoch.lease_epoch}
        for _ in range(5):
            it.keys.on_change()
            epochs.add(it.authorization.epoch.lease_epoch)
            assert not it.authorization.epoch.grants
            await asyncio.sleep(0.005)
        assert len(epochs) == 6

    it.run(burst())
    it.wait_for_leases()
    wait_for(lambda: proxy.counters()["config_reload"] > before, "the push")
    assert proxy.counters()["config_reload"] == before + 1


# ---- without Envoy's half, or without ext_authz ----


def test_without_ads_no_leases_are_granted() -> None:
    """An Envoy that does not know leases is served without them."""
    with leased() as it:
        proxy = it.add_proxy(without_leases)
        assert not proxy.leased(experts="A")
        assert it.control.lease_epoch is None
        assert it.tally.leases == 0


def test_the_table_is_bounded() -> None:
    """Two generations of 20: of 300 callers, at most the last 40 have a lease."""
    with leased(entries=20) as it:
        proxy = it.add_proxy()
        it.wait_for_leases()
        callers = [tokens.sign(tokens.claims(sub=f"caller-{n}")) for n in range(300)]
        first = [proxy.send(token=t, experts="A").id for t in callers]
        before = proxy.counters()
        assert before["stores"] == 300
        assert before["stores"] - 40 <= before["evictions"] < before["stores"]
        again = [proxy.send(token=t, experts="A").id for t in reversed(callers)]
        kept = sum(a == b for a, b in zip(first, reversed(again), strict=True))
        assert 20 <= kept <= 40
        assert first[0] != again[-1]


def test_without_ext_authz_leases_go_on_and_everything_else_is_503() -> None:
    """After kill -9, callers with a lease are served until it ends, and all others get 503."""

    token = tokens.sign(tokens.claims(plan="premium", sub="somebody"))

    def policy(ports: Any) -> str:
        return demo_policy(ports) + "lease: 1s\n"

    def send(caller: str | None, experts: str) -> Any:
        return it.send("/x", token=caller, headers=[("x-expert-names", experts)], method="POST", body=b"{}")

    with system(policy, {"A": 1, "B": 1, "C": 1, "D": 1}, {"jwks.json": tokens.jwks("ES256")}, workers=1) as it:
        wait_for(lambda: bool(it.status()["leases"]["on"]), "leases")
        began = time.time()
        first = send(token, "C")
        assert first.status == 200
        assert it.status()["leases"]["granted"] >= 1
        it.authz.kill()
        while time.time() < began + 0.8:
            answer = send(token, "C")
            assert (answer.status, answer.headers["x-srp-decision-id"]) == (200, first.headers["x-srp-decision-id"])
            assert send(FREE, "C").status == send(None, "A").status == send(token, "A").status == 503
            time.sleep(0.1)
        time.sleep(max(0, began + 1.2 - time.time()))
        assert send(token, "C").status == 503
        it.envoy.stop()
        lines = [json.loads(line) for line in it.envoy.log.read_text().splitlines() if line.startswith("{")]
        repeated = [e["srp"] for e in lines if e["srp"]["leased"]]
        assert len(repeated) >= 3
        assert {(e["decision_id"], e["decision"], e["candidates"], e["caller_tier"]) for e in repeated} == {
            (first.headers["x-srp-decision-id"], "allow", "C", "high")
        }
        assert "somebody" not in it.envoy.log.read_text()  # the log must not have the subject


# ---- with leases as without ----

CALLERS = {
    "nobody": None,
    "premium": PREMIUM,
    "free": FREE,
    "other": tokens.sign(tokens.claims(plan="premium", sub="bob", jti="j-1")),
    "new key": tokens.sign(tokens.claims(plan="premium"), name="new"),
    "expired": tokens.sign(tokens.claims(exp=int(time.time()) - 100)),
    "garbage": "a.b.c",
}

Header = tuple[str, str]

header = st.one_of(
    st.tuples(
        st.sampled_from(["x-expert-names", "X-Expert-Names"]),
        st.sampled_from(["A", "B", "A,B", "B,A", "C", "D", "A,D", "A, nobody", "R", "S", "T", "O", "", "nobody"]),
    ),
    st.tuples(st.sampled_from(["x-srp-downgrade"]), st.sampled_from(["never", "allow", "Allow"])),
    st.tuples(
        st.sampled_from(["x-target-cluster", "X-Target-Cluster", "x-requested-cluster"]),
        st.sampled_from(["expert-a", "expert-d", "A", "expert-b;w=9", "none"]),
    ),
    st.tuples(st.sampled_from(["x-srp-subject", "x-srp-tier", "x-srp-decision", "x-srp-decision-id"]), st.just("high")),
    st.tuples(
        st.sampled_from(["authorization", "x-expert-access-token"]),
        st.sampled_from([PREMIUM, f"Bearer {FREE}", "Bearer"]),
    ),
    st.tuples(st.just("x-envoy-max-retries"), st.just("9")),
)

Ask = dict[str, Any]

asked = st.fixed_dictionaries(
    {
        "token": st.sampled_from(["nobody", "premium", "free", "other", "new key", "brief", "expired", "garbage"]),
        "path": st.sampled_from(["/x", "/x?q=1", "/asked/a", "/always", "/route", "/X"]),
        "headers": st.lists(header, max_size=3),
        "method": st.sampled_from(["GET", "POST"]),
        "body": st.sampled_from([None, b'{"expert_names": ["A"]}', b'{"expert_names": ["D"]}', b"{"]),
    }
)


def renamed(change: Callable[[str], str]) -> Callable[[Ask], Ask]:
    return lambda ask: ask | {"headers": [(change(name), value) for name, value in ask["headers"]]}


def revalued(change: Callable[[str], str]) -> Callable[[Ask], Ask]:
    return lambda ask: ask | {"headers": [(name, change(value)) for name, value in ask["headers"]]}


def more(*headers: Header) -> Callable[[Ask], Ask]:
    return lambda ask: ask | {"headers": [*ask["headers"], *headers]}


def moved(change: Callable[[str], str]) -> Callable[[Ask], Ask]:
    return lambda ask: ask | {"path": change(ask["path"])}


def sent_as(**how: Any) -> Callable[[Ask], Ask]:
    return lambda ask: ask | {"method": "POST", "body": ask["body"] or b"{}"} | how


# Each changes a request, and is sent after the original, which may have a lease by then.
TWISTS: dict[str, Callable[[Ask], Ask]] = {
    "headers reversed": lambda ask: ask | {"headers": ask["headers"][::-1]},
    "a header twice": lambda ask: ask | {"headers": [*ask["headers"], *ask["headers"][:1]]},
    "the names twice": more(("x-expert-names", "A")),
    "names in capitals": renamed(str.upper),
    "values in capitals": revalued(str.upper),
    "values with space around": revalued(lambda value: f"  {value}\t"),
    "values with a comma": revalued(lambda value: f"{value},"),
    "two tokens": more(("x-expert-access-token", PREMIUM)),
    "spoofed": more(("x-srp-subject", "root"), ("x-srp-tier", "high"), ("x-srp-decision-id", "0")),
    "spoofed limits": more(("x-envoy-upstream-rq-timeout-ms", "1"), ("x-envoy-retry-on", "5xx")),
    "spoofed target": more(("x-requested-cluster", "expert-d"), ("X-Target-Cluster", "expert-d")),
    "many headers": more(*[("x-many", str(n)) for n in range(86)]),
    "another charset": more(("content-type", "application/json; charset=utf-16")),
    "compressed": lambda ask: sent_as(body=gzip.compress(b"{}"))(more(("content-encoding", "gzip"))(ask)),
    "a query": moved(lambda path: f"{path}?expert_names=D"),
    "two slashes": moved(lambda path: f"/{path}"),
    "a slash at the end": moved(lambda path: f"{path.partition('?')[0]}/"),
    "dots": moved(lambda path: f"/asked/..{path}"),
    "out of one gate": moved(lambda path: f"/asked/%2e%2e{path}"),
    "into another": moved(lambda path: f"{path.partition('?')[0]}/../asked/a"),
    "an escaped letter": moved(lambda path: path.replace("a", "%61")),
    "an escaped slash": moved(lambda path: f"/asked%2f..{path}"),
    "a parameter": moved(lambda path: f"{path.partition('?')[0]};a=b"),
    "in chunks": sent_as(chunked=True),
    "slowly": sent_as(pause=0.015),
    "slowly in chunks": sent_as(pause=0.015, chunked=True),
}

BASES: list[Ask] = [
    {"path": "/x", "headers": [("x-expert-names", "A,D"), ("x-srp-downgrade", "allow")], "method": "GET", "body": None},
    {
        "path": "/asked/a",
        "headers": [("x-target-cluster", "expert-b")],
        "method": "POST",
        "body": b"{}",
        "token": PREMIUM,
    },
    {"path": "/always", "headers": [("x-expert-access-token", FREE)], "method": "GET", "body": None},
]
PLAIN = {"token": "premium", "path": "/x", "headers": [], "method": "GET", "body": None}
BRIEF = PLAIN | {"token": "brief"}

EDITS = (
    ("", ""),
    ("A: {tier: low", "A: {tier: high"),
    ("D: {tier: high", "D: {tier: low"),
    ("anonymous: low", "anonymous: deny"),
    ("downgrade_to: [B]", "downgrade_to: [A]"),
    ("leeway: 1s", "leeway: 1s\nforward_token: true"),
    ("leeway: 1s", "leeway: 1s\nrevoked: {jti: [j-1]}"),
    ("leeway: 1s", "leeway: 1s\nrevoked: {sub: [ada]}"),
    ("leeway: 1s", "leeway: 1s\nlease: 100ms"),
    ("- {path: /route, json: /expert_names, default: [A, B]}", "- {path: /route, header: x-expert-names}"),
    ("- {prefix: /, header: x-expert-names, default: [A, B]}", "- {prefix: /, json: /expert_names, default: [A]}"),
)

changes = st.one_of(
    st.tuples(st.just("swap"), st.sampled_from(EDITS)),
    st.tuples(st.just("keys"), st.sampled_from([("",), ("new",), ("", "new")])),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.1])),
    st.tuples(st.just("expiry"), st.just(0.15)),
)


@pytest.mark.parametrize("twist", TWISTS)
def test_a_twisted_request_gets_the_same_answer_as_without_leases(it: Leased, proxy: Proxy, twist: str) -> None:
    """After the original request got a lease."""
    cold = it.proxies[1]
    for ask in BASES:
        assert proxy.leased(**ask)
        found, expected = (p.send(**TWISTS[twist](ask)) for p in (proxy, cold))
        assert client_view(found) == client_view(expected)
        assert expert_view(found) == expert_view(expected)


def test_any_history_gives_the_same_answers_as_without_leases(it: Leased) -> None:
    """Requests, policy swaps, rotations, revocations and expiries in any order: two Envoys, one with leases, agree.

    After each change the last requests are sent again, so that a lease that outlives the change would show.
    """
    warm, cold = it.proxies
    seen: Counter[str] = Counter()

    @settings(max_examples=20, deadline=None, phases=[Phase.reuse, Phase.generate])
    @given(
        st.lists(
            st.tuples(changes, st.lists(st.tuples(asked, st.sampled_from([*TWISTS])), min_size=1, max_size=3)),
            min_size=3,
            max_size=6,
        )
    )
    def agree(steps: list[tuple[Any, list[tuple[Ask, str]]]]) -> None:
        callers = {**CALLERS, "brief": CALLERS["expired"]}
        ends = 0.0

        def compare(request: Ask) -> None:
            began, hits = time.time(), it.decided
            found, expected = (p.send(**{**request, "token": callers[request["token"]]}) for p in (warm, cold))
            if not began < ends <= time.time():  # it expired between the two
                assert client_view(found) == client_view(expected)
                assert expert_view(found) == expert_view(expected)
            seen["repeated" if it.decided == hits + 1 else "decided"] += 1

        sent: list[Ask] = []
        for (kind, what), requests in steps:
            seen[kind] += 1
            if kind == "swap":
                it.swap(it.text.replace(*what) + f"# {time.time()}\n")
            elif kind == "keys":
                it.rotate(*what)
            elif kind == "expiry":
                ends = time.time() + what
                callers["brief"] = tokens.sign(tokens.claims(plan="premium", exp=ends - LEEWAY))
                compare(BRIEF)
                compare(BRIEF)
                time.sleep(max(0.0, ends - time.time()))
                compare(BRIEF)
            else:
                time.sleep(what)
            seen.update(twist for _, twist in requests)
            new = [made for ask, twist in requests for made in (ask, TWISTS[twist](ask))]
            for request in (PLAIN, *sent[-4:], *new, *new, PLAIN):
                compare(request)
            sent += new
        it.rotate("")

    agree()
    assert {"swap", "keys", "wait", "expiry"} <= set(seen), "a kind of change was never tried"
    assert seen["repeated"] > 50, "hardly any request was answered by a lease"


# ---- what is compared ----


def client_view(answer: Answer) -> dict[str, Any]:
    """What the client gets, without what differs from answer to answer."""
    ours = {k: v for k, v in answer.headers.items() if k.startswith("x-srp-") and k not in OWN | {"x-srp-expert"}}
    code = json.loads(answer.body)["error"]["code"] if answer.status != 200 else None
    return {"status": answer.status, "code": code, "www": answer.headers.get("www-authenticate"), **ours}


def expert_view(answer: Answer) -> dict[str, str] | None:
    """What the expert gets, without what differs from request to request."""
    ours = OWN | {"x-envoy-expected-rq-timeout-ms", "x-forwarded-for", "host"}
    return None if answer.upstream is None else {k: v for k, v in answer.upstream.items() if k not in ours}


def under_load(proxy: Proxy, token: str, until: float) -> list[tuple[float, Answer]]:
    """Answers to four clients that ask for C without a pause, each with the time of its request."""

    def client() -> list[tuple[float, Answer]]:
        answers = []
        while time.time() < until:
            answers.append((time.time(), proxy.send(token=token, experts="C")))
        return answers

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        return [answer for c in clients for answer in c.result()]


def metadata(answer: bytes) -> dict[str, Any]:
    response = response_of(answer)
    assert response.dynamic_metadata is not None
    return dict(response.dynamic_metadata.fields)
