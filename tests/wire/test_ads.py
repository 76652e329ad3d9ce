"""ADS: every step of the protocol, against a fake Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio

from ext_authz.demo.ports import HOST
from ext_authz.wire.ads import Ads, PublishResult, Resources
from tests.harness.fake_envoy import FakeEnvoy
from tests.harness.waiting import until

CLUSTERS, FILTERS = "type.googleapis.com/test.Cluster", "type.googleapis.com/test.Filter"
ONE, TWO, THREE = (Resources.of({CLUSTERS: (text,)}) for text in (b"one", b"two", b"three"))
BOTH, NEWER = (Resources.of({CLUSTERS: (b"c%d" % n,), FILTERS: (b"f%d" % n,)}) for n in (1, 2))

Play = Callable[[Ads, Callable[[], FakeEnvoy]], Awaitable[None]]


@contextlib.asynccontextmanager
async def served(ads: Ads) -> AsyncIterator[Callable[[], FakeEnvoy]]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((ads.handlers(),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            yield lambda: FakeEnvoy(channel)
    finally:
        await ads.close()
        await server.stop(0)


def play(scene: Play) -> None:
    """Run a scene. Afterwards none of its tasks may be left."""

    async def run() -> None:
        ads = Ads(settle=0)
        async with served(ads) as connect:
            await scene(ads, connect)
        await until(lambda: ads.connected == 0, "the streams to end")
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "ext_authz" in repr(t.get_coro())]
        assert not left

    asyncio.run(run())


async def publishing(ads: Ads, resources: Resources, timeout: float = 2) -> asyncio.Task[Any]:
    task = asyncio.create_task(ads.publish(resources, timeout))
    await asyncio.sleep(0)
    return task


async def connected(connect: Callable[[], FakeEnvoy], number: int) -> list[FakeEnvoy]:
    """So many Envoys, each of which has acknowledged the clusters in force."""
    envoys = [connect() for _ in range(number)]
    for envoy in envoys:
        await envoy.ask(CLUSTERS)
        await acked(envoy)
    return envoys


async def acked(envoy: FakeEnvoy) -> str:
    """Acknowledge the next response. Returns its version."""
    response = await envoy.read()
    await envoy.ack(response)
    return response.version_info


# ---- the protocol ----


def test_without_envoy_resources_are_in_force_at_once_and_sent_to_any_that_connects() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        assert (await ads.publish(ONE)).result is PublishResult.NO_ENVOY
        envoy = connect()
        await envoy.ask(CLUSTERS)
        response = await envoy.read()
        assert (response.version_info, response.type_url) == (ONE.versions[CLUSTERS], CLUSTERS)
        assert [(r.type_url, r.value) for r in response.resources] == [(CLUSTERS, b"one")]
        assert ads.acknowledged is None
        await envoy.ack(response)
        await until(lambda: ads.acknowledged == ONE.version, "the ACK to be counted")
        assert ads.connected == 1

    play(scene)


def test_fixed_resources_are_sent_once_and_on_request() -> None:
    """It needs no publication of its own, and is not sent again with the next one."""

    async def run() -> None:
        ads = Ads(settle=0, fixed={"endpoints": (b"fixed",)})
        async with served(ads) as connect:
            await ads.publish(ONE)
            envoy = connect()
            await envoy.ask("endpoints")
            response = await envoy.read()
            assert (response.type_url, [r.value for r in response.resources]) == ("endpoints", [b"fixed"])
            await envoy.ack(response)
            await envoy.ask(CLUSTERS)
            assert await acked(envoy) == ONE.versions[CLUSTERS]
            task = await publishing(ads, TWO)
            assert await acked(envoy) == TWO.versions[CLUSTERS]
            assert (await task).result is PublishResult.ACKED

    asyncio.run(run())


def test_publish_ends_when_every_envoy_has_acknowledged() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        first, second = await connected(connect, 2)
        task = await publishing(ads, TWO)
        assert await acked(first) == TWO.versions[CLUSTERS]
        response = await second.read()
        await asyncio.sleep(0.05)
        assert not task.done()
        await second.ack(response)
        assert (await task).result is PublishResult.ACKED
        assert ads.acknowledged == TWO.version
        await second.ack(response)  # a second time
        assert (await ads.publish(TWO)).result is PublishResult.ACKED  # nothing to send

    play(scene)


def test_a_nack_is_reported_in_envoys_words_and_rolled_back_everywhere() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        good, bad = await connected(connect, 2)
        task = await publishing(ads, TWO)
        assert await acked(good) == TWO.versions[CLUSTERS]
        await bad.nack(await bad.read(), "port 70000 is too large", ONE.versions[CLUSTERS])
        outcome = await task
        assert (outcome.result, outcome.message) == (PublishResult.NACKED, "port 70000 is too large")
        assert ads.last_error == "port 70000 is too large"
        assert await acked(good) == await acked(bad) == ONE.versions[CLUSTERS]
        late = connect()
        await late.ask(CLUSTERS)
        assert await acked(late) == ONE.versions[CLUSTERS]
        assert (await ads.publish(ONE)).result is PublishResult.ACKED
        assert (ads.acknowledged, ads.last_error) == (ONE.version, "port 70000 is too large")
        task = await publishing(ads, THREE)
        assert {await acked(e) for e in (good, bad, late)} == {THREE.versions[CLUSTERS]}
        assert (await task).result is PublishResult.ACKED
        assert ads.last_error is None

    play(scene)


def test_an_envoy_that_does_not_answer_costs_the_timeout_and_only_its_newest_ack_counts() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        envoy = connect()
        await envoy.ask(CLUSTERS)
        first = await envoy.read()
        outcome = await ads.publish(TWO, timeout=0.1)
        assert outcome.result is PublishResult.TIMEOUT
        await ads.publish(THREE, timeout=0.1)
        second, third = await envoy.read(), await envoy.read()
        for stale in (first, second):
            await envoy.ack(stale)
        await envoy.nack(second, "no longer of interest")
        await asyncio.sleep(0.05)
        assert (ads.acknowledged, ads.last_error) == (None, None)
        await envoy.ack(third)
        await until(lambda: ads.acknowledged == THREE.version, "the ACK of the newest")

    play(scene)


def test_an_envoy_that_disconnects_is_not_waited_for() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        stays, goes = await connected(connect, 2)
        task = await publishing(ads, TWO)
        await acked(stays)
        await goes.read()
        goes.leave()
        assert (await task).result is PublishResult.ACKED
        task = await publishing(ads, ONE)
        stays.leave()
        assert (await task).result is PublishResult.NO_ENVOY

    play(scene)


def test_an_envoy_that_reconnects_is_served_whatever_version_it_claims() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(TWO)
        for version, nonce in (("", ""), (ONE.versions[CLUSTERS], "7"), (TWO.versions[CLUSTERS], "1")):
            envoy = connect()
            await envoy.ask(CLUSTERS, version=version, nonce=nonce)
            assert await acked(envoy) == TWO.versions[CLUSTERS]
            envoy.leave()

    play(scene)


def test_types_are_sent_in_order_each_after_the_ack_of_the_one_before() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(BOTH)
        envoy = connect()
        await envoy.ask(FILTERS, names=("lease",))
        assert (await envoy.read()).type_url == FILTERS  # it has not asked for clusters yet
        await envoy.ask(CLUSTERS)
        await acked(envoy)
        task = await publishing(ads, NEWER)
        response = await envoy.read()
        assert response.type_url == CLUSTERS
        await envoy.ack(response)
        response = await envoy.read()
        assert (response.type_url, response.resources[0].value) == (FILTERS, b"f2")
        assert not task.done()
        await envoy.ack(response, names=("lease",))
        assert (await task).result is PublishResult.ACKED
        await envoy.ack(response, names=("lease", "another"))  # it asks for one more
        assert (await envoy.read()).version_info == NEWER.versions[FILTERS]

    play(scene)


def test_a_type_that_is_not_served_gets_no_answer() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        envoy = connect()
        await envoy.ask("type.googleapis.com/test.Secret", names=("x",))
        await envoy.ask(CLUSTERS)
        assert await acked(envoy) == ONE.versions[CLUSTERS]
        await until(lambda: ads.acknowledged == ONE.version, "the ACK")
        assert await envoy.silent()

    play(scene)


def test_a_malformed_stream_is_ended_and_the_others_go_on() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        [good] = await connected(connect, 1)
        flood, garbage = connect(), connect()
        for n in range(20):
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await flood.ask(f"type.googleapis.com/test.T{n}")
        await garbage._call.write(b"\xff\xff\xff")
        await until(lambda: ads.connected == 1, "the bad streams to end")
        task = await publishing(ads, TWO)
        await acked(good)
        assert (await task).result is PublishResult.ACKED

    play(scene)


def test_an_envoy_that_has_left_a_push_unanswered_is_not_waited_for_again_until_it_answers() -> None:
    """Nor does its version count."""

    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        quick, slow = await connected(connect, 2)
        task = await publishing(ads, TWO, 0.2)
        await acked(quick)
        assert (await task).result is PublishResult.TIMEOUT
        assert ads.agreed(CLUSTERS) == TWO.versions[CLUSTERS]
        assert not ads.settled
        began = time.monotonic()
        task = await publishing(ads, THREE, 60)
        await acked(quick)
        assert (await task).result is PublishResult.ACKED
        assert time.monotonic() - began < 5
        assert ads.agreed(CLUSTERS) == THREE.versions[CLUSTERS]
        assert await acked(slow) == TWO.versions[CLUSTERS]
        assert await acked(slow) == THREE.versions[CLUSTERS]
        await until(lambda: ads.settled, "the answer of the slow one")
        task = await publishing(ads, ONE, 60)
        await acked(quick)
        await asyncio.sleep(0.05)
        assert not task.done()
        await acked(slow)
        assert (await task).result is PublishResult.ACKED

    play(scene)


def test_if_no_envoy_answers_the_next_push_waits_for_none() -> None:
    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        await connected(connect, 1)
        assert (await ads.publish(TWO, 0.05)).result is PublishResult.TIMEOUT
        began = time.monotonic()
        outcome = await ads.publish(THREE, 60)
        assert (outcome.result, outcome.message) == (PublishResult.TIMEOUT, "no connected envoy answers")
        assert time.monotonic() - began < 5
        assert ads.agreed(CLUSTERS) is None

    play(scene)


def test_a_nack_after_the_timeout_is_there_to_be_seen() -> None:
    """The resources stay in force until something else is published; restoring what was there clears no error."""

    async def scene(ads: Ads, connect: Callable[[], FakeEnvoy]) -> None:
        await ads.publish(ONE)
        [envoy] = await connected(connect, 1)
        assert (await ads.publish(TWO, 0.05)).result is PublishResult.TIMEOUT
        assert ads.refused is None
        changes = []
        ads.on_change = lambda: changes.append(ads.refused)
        await envoy.nack(await envoy.read(), "no")
        await until(lambda: changes == ["no"], "the NACK")
        await ads.publish(ONE, 0.05, restoring=True)
        assert ads.refused is None
        await acked(envoy)
        await until(lambda: ads.settled, "the ACK")
        assert ads.last_error == "no"
        task = await publishing(ads, THREE)
        await acked(envoy)
        await task
        assert ads.last_error is None

    play(scene)
