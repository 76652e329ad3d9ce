"""A request whose experts are down, full or failing: another *permitted* expert takes it, or none."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from ext_authz.core.policy import Endpoint, Health
from ext_authz.demo.ports import HOST
from ext_authz.wire import clusters
from tests.harness.rig import FAST, Rig, policy, rig
from tests.harness.waiting import until

ABC = "expert-a,expert-b,expert-c"
RETRIES = {"x-envoy-max-retries": "7"}
HOLD = ("x-hold", "1")


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    with rig({"A": 1, "B": 1, "C": 1, "D": 1}, health=Health(interval=0.2)) as it:
        yield it


@pytest.fixture(scope="module")
def unchecked() -> Iterator[Rig]:
    """Without health checks: only a failing connection shows that an expert is down."""
    with rig({"A": 2, "B": 1, "C": 1}, health=None, outlier=None) as it:
        yield it


async def outcomes(it: Rig, target: str, times: int = 20, **more: object) -> Counter[str]:
    """The experts that answered, or the error's codes."""
    answers = [await it.send(target, set=RETRIES, **more) for _ in range(times)]  # type: ignore[arg-type]
    return Counter(a.headers["x-srp-expert"] if a.status == 200 else a.code for a in answers)


async def stop(it: Rig, *names: str, known: bool = False) -> None:
    for name in names:
        for upstream in it.experts[name]:
            await upstream.stop()
    if known:
        await it.healthy(**{f"expert_{n.lower()}": 0 for n in names})


async def revive(it: Rig, *names: str) -> None:
    for name in names:
        for upstream in it.experts[name]:
            await upstream.start()
    await it.healthy(**{f"expert_{n.lower()}": len(it.experts[n]) for n in names})


DEAD = [
    # known to be down, target, expected outcomes
    ("A", "expert-a,expert-b", {"B"}),
    ("A", ABC, {"B", "C"}),
    ("AB", ABC, {"C"}),
    ("AC", ABC, {"B"}),
    ("AB", "expert-a,expert-b", {"experts_unavailable"}),  # C and D are up but not permitted
    ("A", "expert-a", {"experts_unavailable"}),
    ("BCD", "expert-b,expert-c,expert-d,expert-a", {"A"}),
    ("ABCD", ABC, {"experts_unavailable"}),
]


@pytest.mark.parametrize(("dead", "target", "served"), DEAD)
def test_experts_known_to_be_down_are_skipped(running: Rig, dead: str, target: str, served: set[str]) -> None:
    async def play() -> None:
        await stop(running, *dead, known=True)
        try:
            assert set(await outcomes(running, target)) == served
        finally:
            await revive(running, *dead)

    running.run(play())


def test_the_load_of_an_expert_that_is_down_goes_to_the_idlest_other(running: Rig) -> None:
    async def play() -> None:
        await stop(running, "A", known=True)
        tasks = [asyncio.create_task(running.send("expert-b", headers=[HOLD])) for _ in range(3)]
        b, c = running.experts["B"][0], running.experts["C"][0]
        await until(lambda: b.held == 3, "three requests at B", running)
        for n in range(1, 4):
            tasks.append(asyncio.create_task(running.send(ABC, headers=[HOLD])))
            await until(lambda: c.held == n, "a request at C", running)  # noqa: B023
        for upstream in (b, c):
            upstream.release.set()
        await asyncio.gather(*tasks)
        for upstream in (b, c):
            upstream.release.clear()
        await revive(running, "A")

    running.run(play())


def test_if_all_are_down_the_answer_comes_at_once_and_says_when_to_retry(running: Rig) -> None:
    async def play() -> None:
        await stop(running, "A", "B", known=True)
        answers = [await running.send("expert-a,expert-b") for _ in range(5)]
        await revive(running, "A", "B")
        for answer in answers:
            assert (answer.status, answer.code) == (503, "experts_unavailable")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-srp-decision"] == "allow"
            assert not {"x-srp-expert", "x-srp-attempts"} & set(answer.headers)
        assert min(a.seconds for a in answers) < 0.05

    running.run(play())


SUDDEN = [
    # goes down now, target, expected outcomes; in the first row, before the spare has noticed anything
    ("AB", ABC, {"C"}),
    ("A", "expert-a,expert-b", {"B"}),
    ("B", ABC, {"A", "C"}),
    ("AB", "expert-a,expert-b", {"experts_unavailable"}),
]


@pytest.mark.parametrize(("dead", "target", "served"), SUDDEN)
def test_after_a_refused_connection_the_next_expert_is_tried(
    unchecked: Rig, dead: str, target: str, served: set[str]
) -> None:
    body = b"x" * 65_000  # sent again, complete

    async def play() -> None:
        await stop(unchecked, *dead)
        try:
            assert set(await outcomes(unchecked, target, body=body)) == served
        finally:
            await revive(unchecked, *dead)
        assert {b for group in unchecked.experts.values() for u in group for b in u.bodies} <= {body}

    unchecked.run(play())


def test_a_replica_that_is_down_costs_no_request(unchecked: Rig) -> None:
    async def play() -> None:
        await unchecked.experts["A"][0].stop()
        assert set(await outcomes(unchecked, "expert-a", 10)) == {"A"}
        await unchecked.experts["A"][0].start()

    unchecked.run(play())


ANSWERS = [
    # the expert's status, headers set by ext_authz, the client's status, attempts
    (503, {}, 503, 1),
    (500, {}, 500, 1),
    (503, {"x-envoy-retry-on": "5xx", "x-envoy-max-retries": "1"}, 200, 2),
    (429, {"x-envoy-retry-on": "5xx", "x-envoy-max-retries": "1"}, 429, 1),
    (200, {}, 200, 1),
]


@pytest.mark.parametrize(("status", "given", "seen", "attempts"), ANSWERS)
def test_an_experts_error_is_retried_only_if_the_policy_says_so(
    running: Rig, status: int, given: dict[str, str], seen: int, attempts: int
) -> None:
    async def play() -> None:
        a, b = running.experts["A"][0], running.experts["B"][0]
        a.status = status
        a.seen.clear()
        # B is busy, so A is idler.
        task = asyncio.create_task(running.send("expert-b", headers=[HOLD]))
        await until(lambda: b.held == 1, "B to be busy", running)
        answer = await running.send("expert-a,expert-b", set=given)
        b.release.set()
        await task
        b.release.clear()
        a.status = 200
        assert (answer.status, answer.headers["x-srp-attempts"]) == (seen, str(attempts))
        assert answer.headers["x-srp-expert"] == ("B" if attempts == 2 else "A")
        assert len(a.seen) == 1

    running.run(play())


def test_a_client_cannot_ask_for_retries_or_time(running: Rig) -> None:
    async def play() -> None:
        a = running.experts["A"][0]
        a.status = 503
        wishes = [("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "5"), ("x-envoy-upstream-rq-timeout-ms", "1")]
        answer = await running.send("expert-a", headers=wishes)
        a.status = 200
        assert (answer.status, answer.headers["x-srp-attempts"]) == (503, "1")

    running.run(play())


def test_the_timeout_that_ext_authz_sets_applies(running: Rig) -> None:
    async def play() -> None:
        answer = await running.send("expert-a", headers=[HOLD], set={"x-envoy-upstream-rq-timeout-ms": "100"})
        assert (answer.status, answer.code) == (504, "timeout")
        assert 0.1 <= answer.seconds < 2
        assert "x-srp-expert" not in answer.headers

    running.run(play())


def test_an_expert_cannot_set_our_headers(running: Rig) -> None:
    async def play() -> None:
        a = running.experts["A"][0]
        a.headers = {
            "x-srp-expert": "Z",
            "x-srp-decision": "deny",
            "X-SRP-Attempts": "9",
            "x-srp-new": "1",
            "x-own": "1",
        }
        answer = await running.send("expert-a")
        a.headers = {}
        ours = {k: v for k, v in answer.headers.items() if k.startswith("x-srp-")}
        assert ours == {"x-srp-expert": "A", "x-srp-attempts": "1", "x-srp-decision": "allow"}
        assert answer.headers["x-own"] == "1"

    running.run(play())


def test_a_full_expert_is_avoided_and_if_all_are_full_the_answer_comes_at_once() -> None:
    """Envoy never retries what a full cluster has refused, so the route script must know the limit (`m`)."""
    with rig({"A": 1, "B": 1}, max_requests=2) as it:

        async def play() -> None:
            tasks = []
            for name in "AABB":
                before = it.experts[name][0].held
                target = "expert-a;w=9;m=2,expert-b;w=1;m=2"
                tasks.append(asyncio.create_task(it.send(target, headers=[HOLD])))
                await until(lambda: it.experts[name][0].held > before, f"a request at {name}", it)  # noqa: B023
            answer = await it.send(target)
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "experts_unavailable", "1")
            for name in "AB":
                it.experts[name][0].release.set()
            assert {t.status for t in await asyncio.gather(*tasks)} == {200}
            assert (await it.send(target)).status == 200

        it.run(play())


def test_with_too_many_experts_for_pairs_requests_still_fail_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "MAX_PAIRED", 2)
    with rig({"A": 1, "B": 1, "C": 1}) as it:

        async def play() -> None:
            await stop(it, "A", known=True)
            assert set(await outcomes(it, "expert-a,expert-b")) == {"B"}
            assert set(await outcomes(it, ABC)) == {"B", "C"}
            await stop(it, "B", known=True)
            assert set(await outcomes(it, "expert-a,expert-b", 5)) == {"experts_unavailable"}
            assert set(await outcomes(it, ABC)) == {"C"}

        it.run(play())


def test_experts_behind_dns_names_and_without_health_checks_serve(running: Rig) -> None:
    """`localhost` stands for the name of a Service. Its endpoints replace the others, then those come back."""

    async def play(hosts: Sequence[str]) -> None:
        mixed = policy({n: [Endpoint(h, running.experts[n][0].port)] for n, h in zip("ABCD", hosts, strict=True)}, FAST)
        experts = dict(mixed.experts)
        experts["B"] = replace(experts["B"], traffic=replace(FAST, health=None))
        assert (await running.publish(replace(mixed, experts=experts))).result == "acked"
        assert set(await outcomes(running, ABC)) == {"A", "B", "C"}
        await stop(running, "A", known=True)
        assert set(await outcomes(running, ABC)) == {"B", "C"}
        await revive(running, "A")

    running.run(play(["localhost", "localhost", HOST, HOST]))
    running.run(play([HOST] * 4))
