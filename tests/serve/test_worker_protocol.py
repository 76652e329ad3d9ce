"""What an owner and a worker send to each other, and what they make of anything else."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import pytest

from ext_authz.core.jwk import key_text, parse_jwks
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.counts import CacheUsage, Counts
from ext_authz.policyfile.parse import parse_policy
from ext_authz.serve import frames, worker_process, workers
from ext_authz.serve.authorization import SERVICE
from ext_authz.serve.epoch import Epoch
from ext_authz.serve.frames import BadFrame, frame, read_to_owner, read_to_worker
from ext_authz.serve.worker_process import Slot, WorkerProcess
from ext_authz.serve.workers import Workers
from ext_authz.settings import Settings
from tests.harness import tokens
from tests.harness.authorization import POLICY
from tests.harness.checks import check_request, client_headers
from tests.harness.waiting import until

DIGEST = parse_policy(POLICY, key_files=False).digest
COUNTS = Counts(
    (("allow", "permitted", 2),), {"A": 2}, {}, 0, 1, (2, *[0] * 10), 0.5, {"tokens": CacheUsage(1, 2, 3, 4)}
)

T = TypeVar("T")

TO_WORKER: list[frames.ToWorker] = [
    frames.Start(1, "unix:/x.1", 10, 20, 30, "info"),
    frames.PolicyText("d1", 'experts: "é" # \U0001f600\n', "/etc/policy.yaml"),
    frames.Install(3, 2, "d1", {tokens.ISSUER: ("k1", "k2")}, "e1", True),
    frames.Listen(),
    frames.Poll(7),
    frames.Refreshed(tokens.ISSUER),
    frames.Stop(0.5),
]
TO_OWNER: list[frames.ToOwner] = [
    frames.Compiled("d1"),
    frames.Installed(3, 2),
    frames.Listening(),
    frames.Counted(7, COUNTS),
    frames.Counted(8, None),
    frames.Refresh(tokens.ISSUER),
]


def received(read: Callable[[asyncio.StreamReader], Awaitable[T]], data: bytes, times: int = 1) -> list[T]:
    """What `read` returns for `data` and the end of the stream."""

    async def play() -> list[T]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return [await read(reader) for _ in range(times)]

    return asyncio.run(play())


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


# ---- messages ----


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: m.kind)
def test_a_worker_receives_what_was_sent(message: frames.ToWorker) -> None:
    assert received(read_to_worker, frame(message) * 2, 3) == [message, message, None]


@pytest.mark.parametrize("message", TO_OWNER, ids=lambda m: m.kind)
def test_an_owner_receives_what_was_sent(message: frames.ToOwner) -> None:
    assert received(read_to_owner, frame(message)) == [message]


BAD = [
    ("no JSON", framed(b"\xff"), "not a message"),
    ("empty", framed(b""), "not a message"),
    ("no object", framed(b"[]"), "not a message"),
    ("no kind", framed(b'{"order": 1}'), "not a message"),
    ("another kind", framed(b'{"kind": "pickle"}'), "not a message"),
    ("a part is missing", framed(b'{"kind": "stop"}'), "not a message"),
    ("another type", framed(b'{"kind": "stop", "drain": "1"}'), "not a message"),
    ("of the other side", frame(frames.Listening()), "not a message"),
    ("too long", (frames.MAX_FRAME + 1).to_bytes(4, "big") + b"{", "at most 67108864 are allowed"),
]


@pytest.mark.parametrize(("data", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_anything_but_a_message_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadFrame, match=message):
        received(read_to_worker, data)


@pytest.mark.parametrize("cut", [b"", b"\0\0", framed(b"{}")[:-1]])
def test_an_incomplete_frame_is_the_end(cut: bytes) -> None:
    assert received(read_to_owner, cut) == [None]


def test_no_frame_is_sent_that_is_too_long_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME", 100)
    with pytest.raises(BadFrame, match="at most 100 are allowed"):
        frame(frames.Compiled("d" * 100))


def test_counts_with_other_buckets_are_refused() -> None:
    text = json.loads(frame(frames.Counted(1, COUNTS))[4:])
    text["counts"]["latency"] = [1]
    with pytest.raises(BadFrame):
        received(read_to_owner, framed(json.dumps(text).encode()))


# ---- a worker's process ----


class Owner:
    """The other end of a worker's standard input."""

    def __init__(self, listen: Path) -> None:
        self.listen = listen
        self.process, self.link = worker_process.spawn(listen)
        self.link.settimeout(20)
        self._file = self.link.makefile("rb")

    def send(self, *messages: frames.ToWorker) -> None:
        self.link.sendall(b"".join(map(frame, messages)))

    def receive(self) -> frames.ToOwner:
        length = int.from_bytes(self._file.read(4), "big")
        return frames.TO_OWNER.validate_json(self._file.read(length))

    def close(self) -> None:
        self._file.close()
        self.link.close()

    def ended(self) -> int:
        return self.process.wait(20)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    it = Owner(tmp_path / "s.1")
    try:
        yield it
    finally:
        it.close()
        it.process.kill()
        it.process.wait()


def start(owner: Owner) -> frames.Start:
    return frames.Start(1, f"unix:{owner.listen}", 10, 10, 10, "info")


def policy_text(directory: Path) -> frames.PolicyText:
    return frames.PolicyText(DIGEST, POLICY, str(directory / "policy.yaml"))


def install(order: int, *names: str, epoch: int = 1, grants: bool = False) -> frames.Install:
    """An epoch with the ES256 keys of `names`."""
    keys = tuple(key_text(k) for name in names for k in parse_jwks(tokens.jwks("ES256", name=name)).keys)
    return frames.Install(order, epoch, DIGEST, {tokens.ISSUER: keys}, f"lease-{epoch}", grants)


def reason(listen: Path, caller: str | None) -> str:
    """The reason of a worker's decision on a request for C."""

    async def play() -> bytes:
        async with grpc.aio.insecure_channel(f"unix:{listen}") as channel:
            return bytes(await channel.unary_unary(f"/{SERVICE}/Check")(check_request("C", caller=caller), timeout=5))

    return client_headers(asyncio.run(play()))["x-srp-reason"]


def test_a_worker_does_what_its_owner_says(owner: Owner, tmp_path: Path) -> None:
    """It listens on command, decides by the newest epoch, asks for unknown keys, and drains."""
    caller = tokens.sign(tokens.claims(plan="premium"), name="new")
    owner.send(start(owner), install(1, "old"), policy_text(tmp_path))
    assert owner.receive() == frames.Compiled(DIGEST)  # comes before the epoch, which waits for its policy
    assert owner.receive() == frames.Installed(1, 1)
    assert not owner.listen.exists()
    owner.send(frames.Listen())
    assert owner.receive() == frames.Listening()
    assert owner.listen.stat().st_mode & 0o777 == 0o660
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(reason, owner.listen, caller)
        assert owner.receive() == frames.Refresh(tokens.ISSUER)
        owner.send(install(2, "new", epoch=2), frames.Refreshed(tokens.ISSUER))
        assert owner.receive() == frames.Installed(2, 2)
        assert answer.result() == "permitted"
    owner.send(frames.Poll(5), frames.Poll(6))
    counts = owner.receive()
    assert isinstance(counts, frames.Counted)
    assert counts.counts is not None
    assert (counts.order, counts.counts.decisions) == (5, (("allow", "permitted", 1),))
    assert owner.receive() == frames.Counted(6, None)
    owner.send(install(3, "new", epoch=2, grants=True))
    assert owner.receive() == frames.Installed(3, 2)
    assert reason(owner.listen, None) == "tier_too_low"
    owner.send(frames.Poll(7))
    counts = owner.receive()
    assert isinstance(counts, frames.Counted)
    assert counts.counts is not None
    assert counts.counts.caches["tokens"].entries == 1  # the same epoch keeps its caches
    owner.send(frames.Stop(1.0))
    assert owner.receive() == frames.Counted(0, None)
    assert owner.ended() == 0
    assert not owner.listen.exists()


def test_a_worker_without_an_owner_ends(owner: Owner, tmp_path: Path) -> None:
    owner.send(start(owner), policy_text(tmp_path), install(1, ""), frames.Listen())
    while owner.receive() != frames.Listening():
        pass
    owner.close()
    began = time.monotonic()
    assert owner.ended() == 0
    assert time.monotonic() - began < 0.5
    assert not owner.listen.exists()


def test_a_worker_that_receives_nonsense_ends(tmp_path: Path) -> None:
    """A frame that is too long; a first message other than Start."""
    owners = [Owner(tmp_path / f"s.{n}") for n in range(2)]
    for owner, data in zip(owners, (b"\xff" * 4, frame(frames.Listen())), strict=True):
        owner.link.sendall(data)
    for owner in owners:
        assert owner.ended() == 1
        owner.close()


def test_a_worker_cannot_be_started_by_hand() -> None:
    command = [sys.executable, "-m", "ext_authz.serve.worker"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "started by `srp serve --workers`" in done.stderr


# ---- the owner ----


@asynccontextmanager
async def running_workers(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workers]:
    """Workers whose one process is a Python script, with the socket to its owner as `link`."""

    def spawn(_: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"import socket, time; link = socket.socket(fileno=0); {script}"
            return subprocess.Popen([sys.executable, "-S", "-c", code], stdin=theirs.fileno()), ours

    async def refresh(_: str) -> None:
        pass

    monkeypatch.setattr(worker_process, "spawn", spawn)
    monkeypatch.setattr(workers, "BACKOFF", 0.02)
    monkeypatch.setattr(workers, "STOP_MARGIN", 0.05)
    it = Workers(Settings(directory / "policy.yaml", f"unix:{directory}/s", workers=2), refresh)
    it.start()
    try:
        yield it
    finally:
        await it.stop(0.0)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("link.send(bytes(4)); time.sleep(60)", "not a message to an owner"),
        ("link.send(b'\\xff' * 4); time.sleep(60)", "at most"),
        ("", "it exited"),
    ],
)
def test_an_owner_replaces_a_worker_that_ends_or_sends_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str, why: str
) -> None:
    async def play() -> None:
        async with running_workers(tmp_path, script, monkeypatch) as it:
            await until(lambda: it.restarts >= 3, "three restarts")
            assert not it.serving
            assert it.report()[0]["restarts"] == it.restarts

    asyncio.run(play())
    assert [r.getMessage() for r in caplog.records if why in r.getMessage()]
    waits = [float(r.getMessage().split()[-2]) for r in caplog.records if "restarting in" in r.getMessage()]
    assert waits[:3] == [0.02, 0.04, 0.08]


def test_an_owner_waits_for_no_worker_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that decides and does not install the next epoch is dead by the time that epoch counts as settled."""
    script = f"link.send({frame(frames.Installed(1, 1))!r}); time.sleep(60)"
    monkeypatch.setattr(worker_process, "INSTALL_TIMEOUT", 0.3)
    policy = parse_policy(POLICY, key_files=False)

    async def play() -> None:
        async with running_workers(tmp_path, script, monkeypatch) as it:
            await it.prepare(policy.digest, POLICY.encode(), tmp_path / "policy.yaml")
            it.install(Epoch.of(Snapshot(policy, epoch=1)))
            await it.settled()  # no worker decides yet
            await until(lambda: it._deciding(), "the worker to decide")
            process = it._deciding()[0].process
            it.install(Epoch.of(Snapshot(policy, epoch=2)))
            assert not it._is_settled()
            await it.settled()
            assert process.returncode == -9

    asyncio.run(play())


def test_an_owner_that_stalled_blames_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers sent during the stall counts."""
    script = f"link.send({frame(frames.Installed(1, 1))!r})\nwhile True: time.sleep(0.02); link.send(COUNTED)"
    script = script.replace("COUNTED", repr(frame(frames.Counted(1, None))))
    monkeypatch.setattr(worker_process, "ANSWER_TIMEOUT", 0.2)
    for name, seconds in (("COUNTS_INTERVAL", 0.01), ("WATCH_INTERVAL", 0.01), ("STALL", 0.1)):
        monkeypatch.setattr(workers, name, seconds)

    async def play() -> None:
        async with running_workers(tmp_path, script, monkeypatch) as it:
            policy = parse_policy(POLICY, key_files=False)
            await it.prepare(policy.digest, POLICY.encode(), tmp_path / "policy.yaml")
            it.install(Epoch.of(Snapshot(policy)))
            await until(lambda: it._deciding(), "the worker to decide")
            for _ in range(3):
                time.sleep(0.3)
                await asyncio.sleep(0.05)
            assert it.restarts == 0

    asyncio.run(play())


def test_an_owner_that_can_no_longer_watch_its_workers_ends_them_and_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the owner's own ends its tasks and its workers, and is raised from `ended`."""

    def fails(_: Workers) -> int:
        raise RuntimeError("a fault of its own")

    async def play() -> None:
        async with running_workers(tmp_path, "time.sleep(60)", monkeypatch) as it:
            await until(lambda: it._alive, "the worker")
            (worker,) = it._alive
            monkeypatch.setattr(Workers, "_poll", fails)
            with pytest.raises(ExceptionGroup) as raised:
                await asyncio.wait_for(it.ended(), 10)
            assert raised.group_contains(RuntimeError, match="a fault of its own")
            assert worker.process.returncode == -9

    asyncio.run(play())


def test_a_worker_that_starts_after_a_rejected_policy_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets what is in force first, so that a policy that never came into force does not make it forget that."""
    monkeypatch.setattr(workers, "BACKOFF", 0.02)
    policy = parse_policy(POLICY, key_files=False)
    rejected = POLICY + "# another\n" * 500_000  # takes long to arrive: the worker has compiled the first by then

    async def play() -> None:
        async def refresh(_: str) -> None:
            pass

        it = Workers(Settings(tmp_path / "policy.yaml", f"unix:{tmp_path}/s", workers=2), refresh)
        it.start()
        try:
            await it.prepare(policy.digest, POLICY.encode(), tmp_path / "policy.yaml")
            it.install(Epoch.of(Snapshot(policy)))
            await until(lambda: it.serving, "the worker", seconds=30)
            await it.prepare("rejected", rejected.encode(), tmp_path / "policy.yaml")
            (worker,) = it._alive
            worker.process.kill()
            await until(lambda: it.restarts and it.serving, "its successor", seconds=30)
        finally:
            await it.stop(0.0)

    asyncio.run(play())


def test_a_single_process_has_no_workers(tmp_path: Path) -> None:
    """Nothing is sent, waited for or reported."""

    async def play() -> None:
        async def refresh(_: str) -> None:
            pass

        it = Workers(Settings(tmp_path / "policy.yaml", f"unix:{tmp_path}/s"), refresh)
        it.start()
        await it.prepare("d", b"", tmp_path)
        it.install(Epoch.of(Snapshot(parse_policy(POLICY, key_files=False))))
        await it.settled()
        await it.refresh()
        assert (it.report(), it.restarts, it.counts().checks) == ([], 0, 0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.ended(), 0.05)
        await it.stop(0.0)

    asyncio.run(play())


def test_a_worker_is_overdue_by_the_oldest_epoch_it_has_not_installed() -> None:
    """Installing an older one in the meantime is no excuse; being always one behind is."""
    nobody: Any = None

    def late(seconds_behind: float) -> str | None:
        """Why, after five seconds of ten epochs each."""
        worker = WorkerProcess(Slot(1, Path("s.1")), nobody, nobody, began=0.0, listens=True)
        for order in range(50):
            now = order / 10
            worker.pending[order] = now
            if now >= seconds_behind:
                worker.record_installed(order - round(10 * seconds_behind), 1)
            if why := worker.overdue(now):
                return why
        return None

    assert late(0.1) is None
    assert late(1.9) is None
    assert late(2.2) == "did not install an epoch in 2 s"
