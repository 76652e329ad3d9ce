"""Time, tries and load: how much of an expert and of Envoy a request may take, in a real Envoy."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable

import aiohttp
import pytest

from ext_authz.demo.ports import HOST
from tests.harness.rig import Rig, rig
from tests.harness.waiting import until

HOLD = ("x-hold", "1")


async def restart(it: Rig, change: Callable[[str], str]) -> None:
    await it.stop_envoy()
    await it.start_envoy(change)


def test_without_a_timeout_an_answer_takes_as_long_as_it_takes() -> None:
    """`timeout: 0` in the policy becomes a header of 0, which overrides the route's own timeout."""
    with rig({"A": 1}) as it:

        async def play() -> None:
            await restart(it, lambda text: text.replace("timeout: 60s", "timeout: 0.2s"))
            a = it.experts["A"][0]
            patient = {"x-envoy-upstream-rq-timeout-ms": "0"}
            asked = asyncio.create_task(it.send("expert-a", headers=[HOLD], set=patient))
            assert (await it.send("expert-a", headers=[HOLD])).status == 504
            await asyncio.sleep(0.5)
            a.release.set()
            assert (await asked).status == 200

        it.run(play())


@pytest.mark.parametrize(("retries", "status"), [("0", 503), ("3", 200)])
def test_there_are_no_more_tries_than_the_policy_allows(retries: str, status: int) -> None:
    with rig({"A": 1, "B": 1}, health=None, outlier=None) as it:

        async def play() -> Counter[int]:
            await it.experts["A"][0].stop()
            target = "expert-a;w=1000,expert-b;w=1"
            answers = [await it.send(target, set={"x-envoy-max-retries": retries}) for _ in range(3)]
            return Counter(a.status for a in answers)

        assert it.run(play()) == {status: 3}


def test_a_new_replica_gets_its_share_gradually() -> None:
    with rig({"A": 2}, slow_start=3.0) as it:

        async def share(requests: int) -> float:
            new = it.experts["A"][1]
            new.seen.clear()
            for _ in range(requests):
                await it.send("expert-a")
            return len(new.seen) / requests

        async def play() -> None:
            new = it.experts["A"][1]
            await new.stop()
            await it.healthy(expert_a=1)
            await asyncio.sleep(3)  # the other one is past its slow start by now
            await new.start()
            await it.healthy(expert_a=2)
            assert await share(50) < 0.4
            await asyncio.sleep(3)
            assert await share(200) == pytest.approx(0.5, abs=0.15)

        it.run(play())


def test_an_overloaded_envoy_says_so_and_when_to_retry() -> None:
    with rig({"A": 1}) as it:

        async def play() -> None:
            await restart(it, lambda text: text.replace("threshold: {value: 0.95}", "threshold: {value: 0.0001}"))
            await asyncio.sleep(0.5)  # the heap is checked four times a second
            answer = await it.send("expert-a")
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "overloaded", "1")
            assert not it.experts["A"][0].seen

        it.run(play())


def test_envoy_accepts_no_more_connections_than_configured() -> None:
    limit = "max_active_downstream_connections: "
    with rig({"A": 1}) as it:

        async def play() -> None:
            await restart(it, lambda text: text.replace(f"{limit}20000", f"{limit}2"))
            held = [asyncio.create_task(it.send("expert-a", headers=[HOLD])) for _ in range(2)]
            await until(lambda: it.experts["A"][0].held == 2, "two requests", it)
            with pytest.raises(aiohttp.ClientError):
                await it.send("expert-a")
            it.experts["A"][0].release.set()
            assert {a.status for a in await asyncio.gather(*held)} == {200}

        it.run(play())


def test_the_access_log_has_the_ladder_the_expert_and_the_tries() -> None:
    """The ladder is `cluster`: the experts in the order in which Envoy tried them."""
    with rig({"A": 1, "B": 1}, health=None, outlier=None) as it:

        async def play() -> None:
            await it.experts["A"][0].stop()
            target = "expert-a;w=1000,expert-b;w=1"
            answer = await it.send(target, set={"x-envoy-max-retries": "3"})
            assert (answer.headers["x-srp-expert"], answer.headers["x-srp-attempts"]) == ("B", "2")

        it.run(play())
        it.run(it.stop_envoy())
        lines = [json.loads(line) for line in it.log.read_text().splitlines() if line.startswith("{")]
        (line,) = lines
        assert (line["expert"], line["attempts"], line["cluster"]) == ("B", 2, "expert-a~expert-b")
        assert line["upstream"] == f"{HOST}:{it.experts['B'][0].port}"
        assert line["srp"]["decision"] == "allow"
