"""ADS with a real Envoy: what it does with the clusters that are pushed to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ext_authz.core.policy import Endpoint
from ext_authz.demo.ports import HOST
from ext_authz.wire.ads import PublishResult
from tests.harness.rig import FAST, Rig, policy, rig
from tests.harness.waiting import until


@pytest.fixture
def running() -> Iterator[Rig]:
    with rig({"A": 1, "B": 1}) as it:
        yield it


def test_a_pushed_expert_serves_from_the_first_request_on(running: Rig) -> None:
    async def scene() -> None:
        await running.add("C")
        for _ in range(3):
            assert (await running.publish(running.policy("AB"))).result is PublishResult.ACKED
            assert (await running.publish(running.policy())).result is PublishResult.ACKED
            assert (await running.send("expert-c")).text == "C"
        assert running.resources is not None
        assert running.ads.acknowledged == running.resources.version
        assert (await running.publish(running.policy())).result is PublishResult.ACKED

    running.run(scene())


def test_an_expert_that_answers_its_health_check_late_is_waited_for(running: Rig) -> None:
    async def scene() -> None:
        (slow,) = await running.add("S")
        slow.health_delay = 0.05
        assert (await running.publish(running.policy())).result is PublishResult.ACKED
        assert (await running.send("expert-s")).text == "S"

    running.run(scene())


def test_envoy_says_what_it_rejects_and_keeps_its_clusters(running: Rig) -> None:
    async def scene() -> None:
        good = running.policy()
        experts = dict(good.experts)
        experts["A"] = replace(experts["A"], endpoints=(Endpoint(HOST, 70_000),))
        outcome = await running.publish(replace(good, experts=experts))
        assert outcome.result is PublishResult.NACKED
        assert "expert-a" in outcome.message
        assert "65535" in outcome.message
        assert (await running.publish(good)).result is PublishResult.ACKED
        assert (await running.send("expert-a")).text == "A"
        assert running.ads.last_error == outcome.message

    running.run(scene())


def test_a_restarted_envoy_gets_the_clusters_in_force(running: Rig) -> None:
    async def scene() -> None:
        await running.stop_envoy()
        await until(lambda: running.ads.connected == 0, "the stream to end")
        assert (await running.publish(running.policy("A"))).result is PublishResult.NO_ENVOY
        await running.start_envoy()
        assert (await running.send("expert-a")).text == "A"
        assert (await running.send("expert-b")).status == 503

    running.run(scene())


def test_envoy_keeps_its_clusters_while_ext_authz_restarts(running: Rig) -> None:
    async def scene() -> None:
        await running.stop_authz()
        assert (await running.send("expert-a")).code == "authz_unavailable"
        clusters = await running.ask_admin("/clusters")
        assert f"{running.target('expert-a')}::" in clusters
        running.experts["A"][0].seen.clear()
        await running.start_authz()
        await until(lambda: running.ads.acknowledged is not None, "envoy to come back", running)
        assert (await running.send("expert-a")).text == "A"
        await running.add("C")
        assert (await running.publish(running.policy())).result is PublishResult.ACKED
        assert (await running.send("expert-c")).text == "C"

    running.run(scene())


def test_requests_are_served_while_experts_change(running: Rig) -> None:
    async def scene() -> None:
        stop = asyncio.Event()

        async def client() -> list[int]:
            statuses = []
            while not stop.is_set():
                statuses.append((await running.send("expert-a,expert-b")).status)
            return statuses

        clients = [asyncio.create_task(client()) for _ in range(4)]
        await running.add("C")
        for names in ("ABC", "AB", "ABC", "BA", "ABC"):
            assert (await running.publish(running.policy(names))).result is PublishResult.ACKED
        for n in (1, 2, 3):  # replaces the experts' own clusters
            assert (await running.publish(running.policy(max_requests=500 + n))).result is PublishResult.ACKED
        stop.set()
        statuses = [s for c in clients for s in await c]
        assert set(statuses) == {200}
        assert len(statuses) > 20

    running.run(scene())


def test_a_policy_without_experts_is_acknowledged(running: Rig) -> None:
    """Envoy drops every expert."""

    async def scene() -> None:
        empty = policy({}, FAST)
        assert (await running.publish(empty)).result is PublishResult.ACKED
        assert (await running.send("expert-a")).code == "experts_unavailable"

    running.run(scene())
