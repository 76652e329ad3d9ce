"""The HTTP interface of a sample expert: `/process`, an imitation of an LLM API, and the state pages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from random import Random
from time import perf_counter
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from experts.capacity import Capacity
from experts.payload import Refusal, read_object, read_token_id
from experts.profile import Profile
from experts.seen import Seen

__all__ = ["BODY_LIMIT", "Profile", "make_app"]

BODY_LIMIT = 1 << 20
"""Maximum size of a request body in bytes; a larger one gets 413."""

STREAM_WORDS = ("routed", " and", " processed")
"""The content of a streamed response, one server-sent event per word."""

_STATE_PAGES = frozenset({"/healthz", "/load", "/seen"})
_QUEUE_FULL = Refusal("queue_full", "all slots are taken and the queue is full")
_UNREADABLE = Refusal("unreadable_body", "the body does not match its content-encoding")
_MADE_TO_FAIL = Refusal("made_to_fail", "this expert is configured to fail at random")


def make_app(profile: Profile) -> web.Application:
    """An application that serves one expert. Applications share no state, so a process may run many."""
    expert = _Expert(profile)

    async def name_expert(_: web.Request, response: web.StreamResponse) -> None:
        response.headers["x-expert"] = profile.name

    app = web.Application(client_max_size=BODY_LIMIT, middlewares=[_errors_as_json, _recorder(expert.seen)])
    app.on_response_prepare.append(name_expert)
    app.router.add_get("/healthz", expert.healthz)
    app.router.add_get("/load", expert.load)
    app.router.add_get("/seen", expert.seen_page)
    app.router.add_post("/process", expert.process)
    app.router.add_post("/{path:.*}", expert.complete)
    return app


class _Expert:
    def __init__(self, profile: Profile) -> None:
        self.seen = Seen()
        self._profile = profile
        self._capacity = Capacity(profile.concurrency, profile.queue)
        self._random = Random()  # noqa: S311 - draws delays, not secrets
        self._served = 0
        self._failed = 0

    async def healthz(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def load(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(
            {
                "in_flight": self._capacity.in_flight,
                "queued": self._capacity.queued,
                "served": self._served,
                "failed": self._failed,
                "concurrency": self._profile.concurrency,
                "security_level": self._profile.security_level,
            }
        )

    async def seen_page(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(self.seen.counts())

    async def process(self, request: web.Request) -> web.StreamResponse:
        """Process one token. `latency_ms` is the time since the request's headers arrived, including queueing."""
        arrived = perf_counter()
        token_id = read_token_id(await request.read())
        if isinstance(token_id, Refusal):
            return _refused(HTTPStatus.BAD_REQUEST, token_id)
        async with self._turn() as refusal:
            if refusal:
                return _unavailable(refusal)
            await asyncio.sleep(self._profile.delay.draw(self._random))
            return web.json_response(
                {
                    "expert": self._profile.name,
                    "input_token_id": token_id,
                    "status": "processed",
                    "latency_ms": round((perf_counter() - arrived) * 1000, 1),
                }
            )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer any other path, whatever its body, like a language model: at once or as a stream of events."""
        body = read_object(await request.read())
        wanted = {} if isinstance(body, Refusal) else body
        answer = {"expert": self._profile.name, "path": request.path}
        if isinstance(wanted.get("model"), str):
            answer["model"] = wanted["model"]
        async with self._turn() as refusal:
            if refusal:
                return _unavailable(refusal)
            delay = self._profile.delay.draw(self._random)
            if wanted.get("stream") is True:
                return await _stream(request, answer, delay)
            await asyncio.sleep(delay)
            return web.json_response({**answer, "status": "processed"})

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Refusal | None]:
        """Hold a slot for the block and count the outcome. A client that disconnects early counts as failed."""
        ended_well = False
        try:
            async with self._capacity.slot() as granted:
                refusal = _QUEUE_FULL if not granted else self._random_failure()
                yield refusal
                ended_well = refusal is None
        finally:
            self._served += ended_well
            self._failed += not ended_well

    def _random_failure(self) -> Refusal | None:
        return _MADE_TO_FAIL if self._random.random() < self._profile.fail_rate else None


async def _stream(request: web.Request, answer: Mapping[str, Any], delay: float) -> web.StreamResponse:
    """Send `answer` as server-sent events (WHATWG HTML §9.2), spread evenly over `delay` seconds."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
    await response.prepare(request)
    for word in STREAM_WORDS:
        await asyncio.sleep(delay / len(STREAM_WORDS))
        event = {**answer, "status": "processed", "choices": [{"index": 0, "delta": {"content": word}}]}
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _recorder(seen: Seen) -> Middleware:
    @web.middleware
    async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "GET" or request.path not in _STATE_PAGES:
            # Joined, so that a header smuggled in next to the proxy's own is visible.
            tier, subject = (",".join(request.headers.getall(h, ())) for h in ("x-srp-tier", "x-srp-subject"))
            seen.record(tier, subject)
        return await handler(request)

    return record


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give aiohttp's own errors (405, 413, an undecodable body) the same error body as all others."""
    try:
        return await handler(request)
    except web.RequestPayloadError:
        response = _refused(HTTPStatus.BAD_REQUEST, _UNREADABLE)
        response.force_close()  # aiohttp closes the connection after this, so announce it to the client
        return response
    except web.HTTPException as refused:
        status = HTTPStatus(refused.status)
        allow = {"allow": refused.headers["allow"]} if "allow" in refused.headers else None
        return _refused(status, Refusal(status.name.lower(), status.phrase), allow)


def _unavailable(refusal: Refusal) -> web.Response:
    return _refused(HTTPStatus.SERVICE_UNAVAILABLE, refusal, {"retry-after": "1"})


def _refused(status: HTTPStatus, refusal: Refusal, headers: Mapping[str, str] | None = None) -> web.Response:
    error = {"code": refusal.code, "message": refusal.message}
    return web.json_response({"error": error}, status=status, headers=headers)
