"""An Envoy that rejects a policy's clusters after the policy has come into force without its answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

import ext_authz.serve.control
from ext_authz.demo.ports import HOST
from ext_authz.policyfile.parse import parse_policy
from ext_authz.serve.control import Control
from ext_authz.serve.epoch import Epoch
from ext_authz.sources.keys import KeyStore
from ext_authz.wire.ads import Ads
from ext_authz.wire.clusters import TYPE_CLUSTER
from tests.harness import tokens
from tests.harness.authorization import POLICY
from tests.harness.fake_envoy import FakeEnvoy
from tests.harness.server import served
from tests.harness.waiting import until, wait_for

OPENED = POLICY.replace("C: {tier: high", "C: {tier: low")
OPENED_D = OPENED.replace("D: {tier: high", "D: {tier: low")


def digest(text: str) -> str:
    return parse_policy(text, key_files=False).digest


class Story:
    """A control path and an Envoy that has acknowledged POLICY."""

    def __init__(self, directory: Path, control: Control, ads: Ads, installed: list[Epoch], envoy: FakeEnvoy) -> None:
        self.directory, self.control, self.ads, self.installed, self.envoy = directory, control, ads, installed, envoy

    async def edit(self, text: str) -> None:
        """Put a policy in force, though Envoy does not answer."""
        (self.directory / "policy.yaml").write_text(text)
        assert await self.control.reload()
        assert self.deciding == self.control.status.digest == digest(text)
        assert self.control.status.error is None

    @property
    def deciding(self) -> str:
        """The digest of the policy that decides."""
        return self.installed[-1].snapshot.policy.digest

    async def settle(self, wanted: str) -> None:
        """Until the policy `wanted` decides again, and the status says why."""
        await until(lambda: self.deciding == digest(wanted) and self.control.status.error, "the return")
        assert self.control.status.digest == digest(wanted)


@contextlib.asynccontextmanager
async def story(directory: Path) -> AsyncIterator[Story]:
    (directory / "jwks.json").write_bytes(tokens.jwks("ES256"))
    (directory / "policy.yaml").write_text(POLICY)
    ads, keys, installed = Ads(settle=0), KeyStore(), list[Epoch]()
    control = Control(directory / "policy.yaml", keys, ads, installed.append)
    await control.start()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((ads.handlers(),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            envoy = FakeEnvoy(channel)
            await envoy.ask(TYPE_CLUSTER)
            await envoy.ack(await envoy.read())
            await until(lambda: ads.settled, "the first ACK")
            yield Story(directory, control, ads, installed, envoy)
    finally:
        await control.close()
        await ads.close()
        await server.stop(0)
        await keys.close()


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(ext_authz.serve.control, "ACK_TIMEOUT", 0.1)


def test_the_policy_before_is_put_back_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For decisions and for Envoy; status and log say why. The next edit is adopted as ever."""

    async def play() -> None:
        async with story(tmp_path) as it:
            await it.edit(OPENED)
            refused = await it.envoy.read()
            await it.envoy.nack(refused, "no such thing")
            await it.settle(POLICY)
            assert (
                it.control.status.error
                == f"envoy rejected the clusters of policy {digest(OPENED)}, after it was in force: no such thing"
            )
            assert it.ads.last_error == "no such thing"
            back = await it.envoy.read()
            assert back.version_info != refused.version_info
            await it.envoy.ack(back)
            await until(lambda: it.ads.settled, "the ACK")
            assert it.ads.last_error == "no such thing"
            (tmp_path / "policy.yaml").write_text(OPENED_D)
            reloading = asyncio.create_task(it.control.reload())
            await it.envoy.ack(await it.envoy.read())
            assert await reloading
            assert it.deciding == digest(OPENED_D)
            assert (it.control.status.error, it.ads.last_error) == (None, None)

    asyncio.run(play())
    assert any("after it was in force: no such thing" in r.getMessage() for r in caplog.records)


def test_a_policy_that_envoy_never_had_is_not_returned_to_if_it_is_rejected_too(tmp_path: Path) -> None:
    """Then the one before it is put back in force."""

    async def play() -> None:
        async with story(tmp_path) as it:
            await it.edit(OPENED)
            await it.edit(OPENED_D)
            await it.envoy.nack(await it.envoy.read(), "not this")
            await it.envoy.nack(await it.envoy.read(), "nor this")
            while it.deciding != digest(OPENED):
                await asyncio.sleep(0.01)
            await it.envoy.nack(await it.envoy.read(), "nor that")
            await it.settle(POLICY)

    asyncio.run(play())


def test_an_answer_that_is_only_late_changes_nothing(tmp_path: Path) -> None:
    """Nor can a rejection of something later bring back the policy before."""

    async def play() -> None:
        async with story(tmp_path) as it:
            await it.edit(OPENED)
            await it.envoy.ack(await it.envoy.read())
            await until(lambda: it.ads.settled, "the ACK")
            await asyncio.sleep(0.05)
            assert it.deciding == digest(OPENED)
            (tmp_path / "policy.yaml").write_text(OPENED_D)
            reloading = asyncio.create_task(it.control.reload())
            await it.envoy.nack(await it.envoy.read(), "no")
            assert not await reloading
            assert it.deciding == digest(OPENED)

    asyncio.run(play())


def test_workers_metrics_and_status_follow(tmp_path: Path) -> None:
    """In a running `srp serve --workers 2`."""
    (tmp_path / "jwks.json").write_bytes(tokens.jwks("ES256"))
    (tmp_path / "policy.yaml").write_text(POLICY)
    with served(tmp_path, "--workers", "2") as it:

        def reasons() -> set[str]:
            return {it.reason("C", worker=n) for n in range(2)}

        wait_for(lambda: all(w["serving"] for w in it.status()["workers"]), "the worker", it)

        async def eventually(ready: Callable[[], object], what: str) -> None:
            await asyncio.to_thread(wait_for, ready, what, it)

        async def play() -> None:
            async with grpc.aio.insecure_channel(f"unix:{it.socket}") as channel:
                envoy = FakeEnvoy(channel)
                await envoy.ask(TYPE_CLUSTER)
                await envoy.ack(await envoy.read())
                assert await asyncio.to_thread(reasons) == {"tier_too_low"}
                it.replace("policy.yaml", OPENED)
                refused = await envoy.read(10)
                await eventually(lambda: it.status()["policy"]["digest"] == digest(OPENED), "the policy")
                assert await asyncio.to_thread(reasons) == {"permitted"}
                await envoy.nack(refused, "no such thing")
                await eventually(lambda: it.status()["policy"]["digest"] == digest(POLICY), "the policy before")
                await envoy.ack(await envoy.read())

        asyncio.run(play())
        assert reasons() == {"tier_too_low"}
        assert "after it was in force: no such thing" in it.status()["policy"]["error"]
        assert "after it was in force: no such thing" in it.text()
        assert "after it was in force: no such thing" in it.log
        assert it.metrics() >= {"srp_policy_error 1.0", "srp_envoy_refused 1.0"}
