"""envoy/least_request.lua in a real Envoy: which of the candidates gets a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.harness.answer import Answer
from tests.harness.rig import Rig, rig
from tests.harness.waiting import until

AB = "expert-a,expert-b"
HOLD = ("x-hold", "1")


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    with rig({"A": 1, "B": 1, "C": 1}) as it:
        yield it


async def hold(it: Rig, target: str, times: int) -> list[asyncio.Task[Answer]]:
    """So many requests for `target`, one after another, each in flight before the next is sent."""
    tasks = []
    for _ in range(times):
        before = in_flight(it).total()
        tasks.append(asyncio.create_task(it.send(target, headers=[HOLD])))
        await until(lambda: in_flight(it).total() > before, "a request to reach an expert", it)  # noqa: B023
    return tasks


async def let_go(it: Rig, tasks: list[asyncio.Task[Answer]]) -> list[Answer]:
    for upstreams in it.experts.values():
        for upstream in upstreams:
            upstream.release.set()
    answers = await asyncio.gather(*tasks)
    for upstreams in it.experts.values():
        for upstream in upstreams:
            upstream.release.clear()
    return answers


def in_flight(it: Rig) -> Counter[str]:
    return Counter({name: sum(u.held for u in upstreams) for name, upstreams in it.experts.items()})


PLACES = [
    # already in flight, target, further requests, where all must be then
    ({"A": 3}, AB, 3, {"A": 3, "B": 3}),
    ({"A": 1, "B": 4}, AB, 3, {"A": 4, "B": 4}),
    ({}, "expert-a,expert-b,expert-c", 9, {"A": 3, "B": 3, "C": 3}),
    ({}, "expert-a;w=2,expert-b;w=1", 9, {"A": 6, "B": 3}),
    ({"A": 2}, "expert-a;w=5,expert-b;w=1", 2, {"A": 4}),
    ({"A": 1, "B": 2}, "expert-a;w=9;m=1,expert-b;w=1;m=9", 2, {"A": 1, "B": 4}),
    ({"A": 2, "B": 1}, "expert-a;m=1,expert-b;m=1", 1, {"A": 2, "B": 2}),  # all are full: Envoy's own limits decide
    ({"A": 5}, "expert-a", 2, {"A": 7}),
    ({"A": 5}, "expert-a,expert-b;s", 2, {"A": 7}),
    ({"A": 5}, "expert-a;m=5,expert-b;w=1;m=9;s", 2, {"A": 5, "B": 2}),
    ({"A": 1, "B": 1}, "expert-a;m=1,expert-b;m=1;s", 1, {"A": 2, "B": 1}),
    ({"A": 1}, "expert-nowhere.0123456789abcdef,expert-a", 1, {"A": 2}),
]


@pytest.mark.parametrize(("before", "target", "more", "after"), PLACES)
def test_the_idlest_candidate_by_weight_gets_the_request(
    running: Rig, before: dict[str, int], target: str, more: int, after: dict[str, int]
) -> None:
    async def play() -> None:
        tasks = [t for name, n in before.items() for t in await hold(running, f"expert-{name.lower()}", n)]
        tasks += await hold(running, target, more)
        found = +in_flight(running)
        answers = await let_go(running, tasks)
        assert found == after
        assert {a.status for a in answers} == {200}

    running.run(play())


def test_ties_are_broken_at_random(running: Rig) -> None:
    async def play() -> Counter[str]:
        return Counter([(await running.send("expert-a,expert-b,expert-c")).text for _ in range(60)])

    served = running.run(play())
    assert set(served) == {"A", "B", "C"}
    assert min(served.values()) >= 6  # 20 expected; below 6 once in 100,000 runs


ODD = [
    "",
    ",",
    ";",
    "expert-a,",
    "expert-a, expert-b",
    "expert-a;w=0",
    "expert-a;w=nan",
    "expert-a;w=-1",
    "expert-a;w=1e9",
    "expert-a;w=99999",
    "expert-a;w=1;w=2",
    "expert-a;m=8;w=1",
    "expert-a;x=1",
    "expert-a;s;s",
    "expert-a;s;w=1",
    "expert-a;",
    "a,b;w=0",
    "expert-a~expert-b",
    "~spare",
    "EXPERT-A",
    "expert_a",
    "expert-nowhere",
    "expert-a.",
    "expert-a.xyz",
    "expert-a.0123456789abcdef.0123456789abcdef",
    "admin",
    "ext_authz",
    "none",
    "expert-a\t",
    "../expert-a",
    "%65xpert-a",
    ",".join(["expert-a"] * 65),
]


@pytest.mark.parametrize("target", ODD)
def test_a_malformed_target_reaches_no_expert(running: Rig, target: str) -> None:
    answer = running.run(running.send(target))
    assert (answer.status, answer.code) == (503, "experts_unavailable")
    assert "x-srp-expert" not in answer.headers


def test_without_a_target_no_expert_is_reached(running: Rig) -> None:
    assert running.run(running.send()).code == "experts_unavailable"


def test_experts_see_process_for_route_and_any_other_path_normalized(running: Rig) -> None:
    async def play() -> list[str]:
        expert = running.experts["A"][0]
        expert.seen.clear()
        for path in ("/route", "/route?q=1", "/route/x", "/v1//chat/../models", "/"):
            await running.send("expert-a", path=path)
        return [request.path_qs for request in expert.seen]

    assert running.run(play()) == ["/process", "/process?q=1", "/route/x", "/v1/models", "/"]
