"""The sample experts over real loopback connections: one server per test, on a free port."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import BytesIO
from random import Random
from subprocess import PIPE, Popen, run
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from experts.capacity import Capacity
from experts.delay import Exponential, Uniform, parse_delay, parse_service
from experts.seen import OTHER, Seen
from experts.service import BODY_LIMIT, Profile, make_app
from tests.harness import ROOT

Client = TestClient[web.Request, web.Application]

AT_ONCE = Uniform(0, 0)


@asynccontextmanager
async def serving(profile: Profile) -> AsyncIterator[Client]:
    async with TestClient(TestServer(make_app(profile)), cookie_jar=None) as client:
        yield client


async def load(client: Client) -> dict[str, Any]:
    loaded: dict[str, Any] = await (await client.get("/load")).json()
    return loaded


# ---- /process --------------------------------------------------------------------------------------------------------


BODIES = [
    # name, body, status, error code or token
    ("token", b'{"token_id": 101}', 200, 101),
    ("further fields", b'{"token_id": 7, "expert_names": ["A"], "x": null}', 200, 7),
    ("negative", b'{"token_id": -1}', 200, -1),
    ("above 2^53", b'{"token_id": 9007199254740993}', 200, 9007199254740993),
    ("empty", b"", 400, "bad_json"),
    ("cut short", b'{"token_id": 10', 400, "bad_json"),
    ("not UTF-8", b'{"token_id": "\xff"}', 400, "bad_json"),
    ("NaN", b'{"token_id": 1, "x": NaN}', 400, "bad_json"),
    ("too deep", b"[" * 200_000, 400, "bad_json"),
    ("5000 digits", b'{"token_id": ' + b"9" * 5000 + b"}", 400, "bad_json"),
    ("array", b"[101]", 400, "not_an_object"),
    ("null", b"null", 400, "not_an_object"),
    ("missing", b'{"token": 101}', 400, "missing_token_id"),
    ("string", b'{"token_id": "101"}', 400, "bad_token_id"),
    ("boolean", b'{"token_id": true}', 400, "bad_token_id"),
    ("fraction", b'{"token_id": 101.0}', 400, "bad_token_id"),
    ("null token", b'{"token_id": null}', 400, "bad_token_id"),
    ("at the limit", b'{"token_id": 5}'.ljust(BODY_LIMIT), 200, 5),
    ("over the limit", b'{"token_id": 5}'.ljust(BODY_LIMIT + 1), 413, "request_entity_too_large"),
]


@pytest.mark.parametrize(("body", "status", "expected"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_process_accepts_one_integer_token(body: bytes, status: int, expected: int | str) -> None:
    """Anything else gets a JSON error. Both name the expert."""

    async def scenario() -> None:
        async with serving(Profile("Expert_A", delay=AT_ONCE)) as client:
            response = await client.post("/process", data=BytesIO(body))
            answer = await response.json()
            assert response.status == status
            assert response.headers["x-expert"] == "Expert_A"
            if status == 200:
                latency = answer.pop("latency_ms")
                assert answer == {"expert": "Expert_A", "input_token_id": expected, "status": "processed"}
                assert 0 <= latency < 5000
            else:
                assert answer["error"]["code"] == expected
                assert answer["error"]["message"]

    asyncio.run(scenario())


def test_a_body_that_does_not_match_its_content_encoding_is_refused() -> None:
    """As the client's mistake, not the expert's."""

    async def scenario() -> None:
        async with serving(Profile("A", delay=AT_ONCE)) as client:
            response = await client.post("/process", data=b"no gzip", headers={"content-encoding": "gzip"})
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "unreadable_body"
            assert (await client.get("/healthz")).status == 200

    asyncio.run(scenario())


def test_latency_is_milliseconds_and_includes_the_wait_for_a_slot() -> None:
    """With one slot, the second of two requests waits for the first."""

    async def scenario() -> None:
        async with serving(Profile("A", delay=Uniform(0.1, 0.1), concurrency=1)) as client:
            responses = await asyncio.gather(*(client.post("/process", json={"token_id": n}) for n in (1, 2)))
            first, second = sorted([(await response.json())["latency_ms"] for response in responses])
            assert first >= 99
            assert second >= 195

    asyncio.run(scenario())


# ---- any other path --------------------------------------------------------------------------------------------------


OTHERS = [
    # name, method, path, body, status, answer
    (
        "model",
        "POST",
        "/v1/chat/completions?key=secret",
        b'{"model": "C", "messages": []}',
        200,
        {"expert": "C", "path": "/v1/chat/completions", "model": "C", "status": "processed"},
    ),
    ("no model", "POST", "/x", b"{}", 200, {"expert": "C", "path": "/x", "status": "processed"}),
    ("GET elsewhere", "GET", "/v1/models", None, 405, None),
    ("not JSON", "POST", "/x", b"hello", 200, {"expert": "C", "path": "/x", "status": "processed"}),
    ("model not a string", "POST", "/", b'{"model": 1}', 200, {"expert": "C", "path": "/", "status": "processed"}),
    ("health", "GET", "/healthz", None, 200, {"status": "ok"}),
    ("wrong method", "PUT", "/process", b"{}", 405, None),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "expected"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS]
)
def test_any_other_path_is_answered_by_name_or_refused_in_json(
    method: str, path: str, body: bytes | None, status: int, expected: dict[str, str] | None
) -> None:
    """The path without the query; a refusal is a JSON error."""

    async def scenario() -> None:
        async with serving(Profile("C", delay=AT_ONCE)) as client:
            response = await client.request(method, path, data=body)
            answer = await response.json()
            assert response.status == status
            assert response.headers["x-expert"] == "C"
            if expected is None:
                assert answer == {"error": {"code": "method_not_allowed", "message": "Method Not Allowed"}}
                assert "POST" in response.headers["allow"]
            else:
                assert answer == expected

    asyncio.run(scenario())


def test_stream_true_is_answered_with_server_sent_events() -> None:
    """One event per word, spread over the delay, and the closing event of an LLM."""

    async def scenario() -> None:
        async with serving(Profile("C", delay=Uniform(0.15, 0.15))) as client:
            started = time.perf_counter()
            response = await client.post("/v1/chat/completions", json={"model": "C", "stream": True})
            *events, last, end = (await response.text()).split("\n\n")
            assert response.content_type == "text/event-stream"
            assert (last, end) == ("data: [DONE]", "")
            chunks = [json.loads(event.removeprefix("data: ")) for event in events]
            assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["routed", " and", " processed"]
            assert {(chunk["expert"], chunk["model"]) for chunk in chunks} == {("C", "C")}
            assert time.perf_counter() - started >= 0.149

    asyncio.run(scenario())


# ---- capacity --------------------------------------------------------------------------------------------------------


def test_requests_beyond_the_queue_are_refused_at_once_and_the_rest_are_served() -> None:
    """With 1 slot and a queue of 2, 3 of 5 requests are served, and 2 get 503 with Retry-After; /load shows it."""

    async def scenario() -> None:
        profile = Profile("A", security_level="high", delay=Uniform(0.3, 0.3), concurrency=1, queue=2)
        async with serving(profile) as client:
            requests = [asyncio.create_task(client.post("/process", json={"token_id": n})) for n in range(5)]

            async with asyncio.timeout(5):
                while (await load(client))["failed"] < 2:
                    pass
            assert await load(client) == {
                "in_flight": 1,
                "queued": 2,
                "served": 0,
                "failed": 2,
                "concurrency": 1,
                "security_level": "high",
            }
            responses = await asyncio.gather(*requests)
            assert sorted(response.status for response in responses) == [200, 200, 200, 503, 503]
            for response in responses:
                if response.status == 503:
                    assert response.headers["retry-after"] == "1"
                    assert (await response.json())["error"]["code"] == "queue_full"
            after = await load(client)
            assert (after["in_flight"], after["queued"], after["served"], after["failed"]) == (0, 0, 3, 2)

    asyncio.run(scenario())


def test_capacity_survives_cancelled_waiters_and_holders() -> None:
    """They leave no slot taken and no place in the queue."""

    async def scenario() -> None:
        capacity = Capacity(concurrency=2, queue=50)
        random = Random(1)
        most = 0

        async def hold() -> None:
            nonlocal most
            async with capacity.slot() as granted:
                assert granted
                most = max(most, capacity.in_flight)
                await asyncio.sleep(random.random() / 100)

        tasks = [asyncio.create_task(hold()) for _ in range(50)]
        for _ in range(100):
            await asyncio.sleep(0.0005)
            random.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (most, capacity.in_flight, capacity.queued) == (2, 0, 0)
        async with capacity.slot() as one, capacity.slot() as two:
            assert one
            assert two

    asyncio.run(scenario())


def test_capacity_is_first_come_first_served() -> None:
    """A newcomer neither overtakes a waiter that is about to get its slot nor makes the queue too long."""

    async def scenario() -> None:
        capacity = Capacity(concurrency=1, queue=1)
        order: list[str] = []

        async def hold(name: str) -> None:
            async with capacity.slot() as granted:
                order.append(name if granted else f"{name} refused")
                await asyncio.sleep(0)

        async with capacity.slot():
            waiter = asyncio.create_task(hold("waiter"))
            await asyncio.sleep(0)
            assert capacity.queued == 1
        # The slot is free; the waiter has been woken but has not run yet.
        await hold("newcomer")
        await waiter
        assert order == ["newcomer refused", "waiter"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("rate", "status"), [(0.0, 200), (1.0, 503)])
def test_the_fail_rate_is_a_probability(rate: float, status: int) -> None:
    """0 never fails, 1 always does."""

    async def scenario() -> None:
        async with serving(Profile("A", delay=AT_ONCE, fail_rate=rate)) as client:
            responses = [await client.post("/process", json={"token_id": 1}) for _ in range(20)]
            assert {response.status for response in responses} == {status}
            assert (await load(client))["failed"] == (20 if rate else 0)

    asyncio.run(scenario())


# ---- /seen -----------------------------------------------------------------------------------------------------------


def test_seen_counts_requests_by_tier_and_subject_but_not_its_own_pages() -> None:
    """Refused requests count, too; a repeated header is shown as such."""

    async def scenario() -> None:
        async with serving(Profile("A", delay=AT_ONCE)) as client:
            await client.get("/healthz")
            for headers in (
                [("x-srp-tier", "low"), ("x-srp-subject", "lou")],
                [("x-srp-tier", "low"), ("x-srp-subject", "lou")],
                [("x-srp-tier", "low"), ("x-srp-tier", "high")],
                [],
            ):
                await client.post("/process", data=b"no JSON", headers=headers)
            assert await (await client.get("/seen")).json() == {"low|lou": 2, "low,high|": 1, "|": 1}

    asyncio.run(scenario())


def test_experts_in_one_process_share_nothing() -> None:
    """Each has its own counts."""

    async def scenario() -> None:
        async with serving(Profile("A", delay=AT_ONCE)) as a, serving(Profile("B", delay=AT_ONCE)) as b:
            answer = await (await a.post("/process", json={"token_id": 1})).json()
            assert answer["expert"] == "A"
            assert [(await load(client))["served"] for client in (a, b)] == [1, 0]

    asyncio.run(scenario())


def test_seen_is_bounded_in_requests_and_in_keys() -> None:
    """Old requests are dropped; identities beyond the last key are counted together."""
    seen = Seen(requests=4, keys=2)
    for subject in "aabcd":
        seen.record("low", subject)
    assert seen.counts() == {"low|a": 1, "low|b": 1, OTHER: 2}
    for _ in range(4):
        seen.record("high", "z")
    assert seen.counts() == {OTHER: 2, "high|z": 2}


# ---- settings --------------------------------------------------------------------------------------------------------


def test_delays_follow_their_distribution() -> None:
    """Uniform delays stay within their bounds; exponential ones have their mean."""
    random = Random(7)
    assert parse_delay("0.25") == Uniform(0.25, 0.25)
    assert all(0.1 <= parse_delay("0.1:0.5").draw(random) <= 0.5 for _ in range(1000))
    service = parse_service("exponential:0.04")
    assert service == Exponential(0.04)
    assert sum(service.draw(random) for _ in range(20_000)) / 20_000 == pytest.approx(0.04, rel=0.05)


MISTAKES = [
    # arguments, the last line of stderr
    ("--name A", "the following arguments are required: --port"),
    ("--port 0", "the following arguments are required: --name"),
    ("--name A --port 65536", "argument --port: expected 0 to 65535, found `65536`"),
    ("--name A --port -1", "argument --port: expected 0 to 65535, found `-1`"),
    ("--name A\r\nx:y --port 0", "name must be 1 to 64 of A-Z a-z 0-9 . _ -"),
    ("--name A --port 0 --delay 1:x", "argument --delay: expected a number of seconds, found `x` in `1:x`"),
    ("--name A --port 0 --delay 2:1", "argument --delay: delay must be 0 <= LO <= HI seconds, found `2:1`"),
    ("--name A --port 0 --delay inf", "argument --delay: delay must be 0 <= LO <= HI seconds, found `inf:inf`"),
    ("--name A --port 0 --service gamma:1", "argument --service: expected exponential:MEAN, found `gamma:1`"),
    ("--name A --port 0 --service exponential:0", "mean service time must be above 0 seconds, found `0`"),
    ("--name A --port 0 --delay 1 --service exponential:1", "not allowed with argument --delay"),
    ("--name A --port 0 --concurrency 0", "concurrency must be at least 1, found `0`"),
    ("--name A --port 0 --queue -1", "queue must be at least 0, found `-1`"),
    ("--name A --port 0 --fail-rate nan", "fail rate must be between 0 and 1, found `nan`"),
]


@pytest.mark.parametrize(("arguments", "complaint"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_bad_arguments_exit_2(arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And one line says what was found."""
    from experts.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(arguments.split(" "))
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err.split("experts: error: ")[-1]


# ---- the program -----------------------------------------------------------------------------------------------------


@contextmanager
def program(*arguments: str) -> Iterator[tuple[Popen[str], str]]:
    """`python -m experts` on a free port, and its URL once it has printed one."""
    command = [sys.executable, "-m", "experts", "--name", "Expert_A", "--port", "0", *arguments]
    with Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("Expert_A listening on http://127.0.0.1:"), line
            yield process, line.split()[-1]
        finally:
            process.kill()


def fetch(url: str, body: bytes | None = None) -> dict[str, Any]:
    with urllib.request.urlopen(url, body, timeout=5) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def test_sigterm_drains_the_request_in_flight() -> None:
    """It is answered; then the program exits with 0."""
    answers: list[dict[str, Any]] = []
    with program("--delay", "0.6") as (process, url):
        client = threading.Thread(target=lambda: answers.append(fetch(f"{url}/process", b'{"token_id": 3}')))
        client.start()
        deadline = time.monotonic() + 5
        while fetch(f"{url}/load")["in_flight"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
        client.join(timeout=5)
        assert process.stderr
        assert process.stderr.read() == ""
    assert answers[0]["input_token_id"] == 3
    assert answers[0]["latency_ms"] >= 599


def test_a_client_that_leaves_frees_its_slot() -> None:
    """Its request is dropped, so that the only slot serves the next one at once."""
    with program("--delay", "60", "--concurrency", "1") as (_, url):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b'POST /process HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n{"token_id":1}')
            deadline = time.monotonic() + 5
            while fetch(f"{url}/load")["in_flight"] == 0:
                assert time.monotonic() < deadline
        while fetch(f"{url}/load")["in_flight"] == 1:
            assert time.monotonic() < deadline
        assert fetch(f"{url}/load")["failed"] == 1


def test_a_taken_port_exits_1_with_one_line() -> None:
    """It names the address; there is no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "experts", "--name", "A", "--port", port]
        result = run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"experts: cannot listen on 127.0.0.1:{port}: ")
