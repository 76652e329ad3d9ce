"""The key store against real JWKS servers on loopback, real files, and real TLS."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt.algorithms import ECAlgorithm

from ext_authz.core.jwk import MAX_BYTES
from ext_authz.core.jwks_url import jwks_url
from ext_authz.core.policy import Issuer, JwksSource
from ext_authz.sources.keys import KeyStatus, KeyStore, Pace
from ext_authz.sources.watched import WatchedFile
from tests.harness import tokens
from tests.harness.waiting import until

OLD, NEW = tokens.jwks("ES256", name="old"), tokens.jwks("ES256", name="new")
ME = "https://idp.example.com/"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def run(test: Coroutine[Any, Any, None], **options: Any) -> None:
    """Run a test. No task may be left when it ends."""

    async def main() -> None:
        await test
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(**options) as runner:
        runner.run(main())


class Idp:
    """An issuer that answers with `body`, or as `answer` says."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.answer: Answer | None = None
        self.requests: list[web.Request] = []
        self.server = TestServer(web.Application(), host="127.0.0.1")
        self.server.app.router.add_get("/{path:.*}", self._get)

    @property
    def url(self) -> str:
        return str(self.server.make_url("/jwks.json"))

    async def _get(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.answer(request) if self.answer else web.Response(body=self.body)


def delayed(go: asyncio.Event) -> Answer:
    """The new keys, once `go` is set."""

    async def answer(_: web.Request) -> web.StreamResponse:
        await go.wait()
        return web.Response(body=NEW)

    return answer


@asynccontextmanager
async def serving(body: bytes = OLD, tls: ssl.SSLContext | None = None) -> AsyncIterator[Idp]:
    idp = Idp(body)
    await idp.server.start_server(ssl=tls, shutdown_timeout=0)
    try:
        yield idp
    finally:
        await idp.server.close()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched(KeyStore):
    """A store that records the kids at each change, and whose clock is moved by the test."""

    def __init__(self, **pace: float) -> None:
        self.clock = Clock()
        self.changes: list[dict[str, list[str | None]]] = []
        super().__init__(lambda: self.changes.append(self.kids), clock=self.clock, pace=Pace(**pace))

    @property
    def kids(self) -> dict[str, list[str | None]]:
        return {issuer: [k.kid for k in keys] for issuer, keys in self.keys.items()}

    @property
    def only(self) -> KeyStatus:
        (status,) = self.status()
        return status


@asynccontextmanager
async def storing(**pace: float) -> AsyncIterator[Watched]:
    store = Watched(**pace)
    try:
        yield store
    finally:
        await store.close()


def by_url(url: str, name: str = ME, **source: Any) -> Issuer:
    return Issuer(name, frozenset({"moe-gateway"}), frozenset({"ES256"}), JwksSource(url=url, **source))


def by_file(path: Path, name: str = ME) -> Issuer:
    return Issuer(name, frozenset({"moe-gateway"}), frozenset({"ES256"}), JwksSource(file=str(path)))


def by_secret(path: Path, name: str = ME) -> Issuer:
    return Issuer(name, frozenset({"moe-gateway"}), frozenset({"HS256"}), secret_file=str(path))


def replace(path: Path, data: bytes) -> None:
    path.with_suffix(".tmp").write_bytes(data)
    path.with_suffix(".tmp").replace(path)


# --- following -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_follow_loads_urls_files_and_secrets(tmp_path: Path, loop: Any) -> None:
    """In one change: each issuer has the keys of its own source, and no others."""

    async def test() -> None:
        (tmp_path / "jwks.json").write_bytes(NEW)
        (tmp_path / "secret").write_bytes(b"s" * 48 + b"\n")
        async with serving() as idp, storing() as store:
            assert dict(store.keys) == {}
            issuers = by_url(idp.url, "u"), by_file(tmp_path / "jwks.json", "f"), by_secret(tmp_path / "secret", "s")
            await store.follow(issuers)
            assert store.kids == {"u": ["ES256-old"], "f": ["ES256-new"], "s": [None]}
            assert store.keys["s"][0].material == b"s" * 48
            assert store.version == len(store.changes) == 1
            store.clock.now += 7
            assert store.status() == tuple(KeyStatus(name, 1, 7.0, None, 1, 0) for name in ("u", "f", "s"))
            with pytest.raises(TypeError):
                store.keys["u"] = ()  # type: ignore[index]

    run(test(), loop_factory=loop)


def test_follow_fetches_in_parallel_and_does_not_wait_for_slow_issuers() -> None:
    """`first_wait` bounds the wait; a late key set is stored when it arrives."""

    async def test() -> None:
        async with serving() as slow, serving() as other, serving() as quick, storing(first_wait=0.25) as store:
            go = asyncio.Event()
            slow.answer = other.answer = delayed(go)
            began = time.monotonic()
            await store.follow([by_url(slow.url, "slow"), by_url(other.url, "other"), by_url(quick.url, "quick")])
            assert 0.2 < time.monotonic() - began < 1.0
            assert store.kids == {"quick": ["ES256-old"]}
            assert [s.age is None for s in store.status()] == [True, True, False]
            go.set()
            await until(lambda: len(store.keys) == 3, "the slow key sets")
            assert store.kids == {"slow": ["ES256-new"], "other": ["ES256-new"], "quick": ["ES256-old"]}
            assert store.changes[-1] == store.kids

    run(test())


def test_following_the_same_sources_again_changes_nothing(tmp_path: Path) -> None:
    """A new policy with the old issuers costs no fetch and no cached token."""

    async def test() -> None:
        (tmp_path / "jwks.json").write_bytes(NEW)
        async with serving() as idp, storing() as store:
            await store.follow([by_url(idp.url, "u"), by_file(tmp_path / "jwks.json", "f")])
            before = store.keys
            await store.follow([by_file(tmp_path / "jwks.json", "f"), by_url(idp.url, "u")])
            assert store.keys is before
            assert (store.version, len(idp.requests)) == (1, 1)
            assert [s.issuer for s in store.status()] == ["f", "u"]

    run(test())


def test_an_issuer_that_is_no_longer_named_is_dropped() -> None:
    """Its keys are removed, its fetches end, and a refresh does nothing."""

    async def test() -> None:
        async with serving() as idp, storing() as store:
            await store.follow([by_url(idp.url, refresh=0.02)])
            await store.follow([])
            assert store.changes == [{ME: ["ES256-old"]}, {}]
            fetched = len(idp.requests)
            assert await store.refresh(ME) is False
            await asyncio.sleep(0.1)
            assert (len(idp.requests), store.status()) == (fetched, ())

    run(test())


def test_keys_do_not_outlive_a_change_of_their_source() -> None:
    """They stay until the new source has answered; if it fails, there are none."""

    async def test() -> None:
        async with serving(OLD) as old, serving(NEW) as new, storing() as store:
            await store.follow([by_url(old.url)])
            seen = []

            async def answer(_: web.Request) -> web.StreamResponse:
                seen.append(store.kids)
                return web.Response(body=NEW)

            new.answer = answer
            await store.follow([by_url(new.url)])
            assert seen == [{ME: ["ES256-old"]}]
            assert store.changes == [{ME: ["ES256-old"]}, {ME: ["ES256-new"]}]
            new.answer = plain(b"", status=500)
            await store.follow([by_url(new.url + "?v=2")])
            assert store.kids == {}
            assert store.only.failures == 1

    run(test())


def test_keys_outlive_a_change_of_how_their_source_is_read() -> None:
    """A new refresh interval while the issuer is down must not lock its users out."""

    async def test() -> None:
        async with serving() as idp, storing() as store:
            await store.follow([by_url(idp.url)])
            idp.answer = plain(b"", status=500)
            await store.follow([by_url(idp.url, refresh=60.0)])
            assert store.kids == {ME: ["ES256-old"]}
            assert (store.version, store.only.fetches, store.only.failures) == (1, 2, 1)

    run(test())


def test_a_key_file_that_becomes_a_secret_is_not_taken_for_one(tmp_path: Path) -> None:
    """The same bytes mean something else then."""

    async def test() -> None:
        path = tmp_path / "keys"
        path.write_bytes(OLD)
        async with storing() as store:
            await store.follow([by_file(path)])
            await store.follow([by_secret(path)])
            assert store.kids == {}
            assert "not a secret" in str(store.only.last_error)

    run(test())


# --- rotation ------------------------------------------------------------------------------------------------------


def test_a_url_is_fetched_again_and_again() -> None:
    async def test() -> None:
        async with serving() as idp, storing() as store:
            await store.follow([by_url(idp.url, refresh=0.02)])
            await until(lambda: len(idp.requests) > 3, "more fetches")
            assert store.version == 1
            idp.body = NEW
            await until(lambda: store.version == 2, "the new keys")
            assert store.changes == [{ME: ["ES256-old"]}, {ME: ["ES256-new"]}]

    run(test())


def test_a_file_that_rotates_is_read_again(tmp_path: Path) -> None:
    """As Kubernetes does it: the link to the folder is swapped. A bad file changes nothing."""

    async def test() -> None:
        for name, content in (("one", OLD), ("two", b"{"), ("three", NEW)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "jwks.json").write_bytes(content)
        data = tmp_path / "data"

        def swap(name: str) -> None:
            (tmp_path / "link").symlink_to(name)
            (tmp_path / "link").replace(data)

        swap("one")
        async with storing() as store:
            await store.follow([by_file(data / "jwks.json")])
            swap("two")
            await until(lambda: store.only.failures, "the failure")
            assert store.kids == {ME: ["ES256-old"]}
            assert "is not JSON" in str(store.only.last_error)
            swap("three")
            await until(lambda: store.version == 2, "the new keys")
            assert store.kids == {ME: ["ES256-new"]}
            assert store.only.last_error is None

    run(test())


def test_a_secret_that_rotates_is_read_again(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "secret"
        path.write_bytes(b"a" * 32)
        async with storing() as store:
            await store.follow([by_secret(path)])
            replace(path, b"short")
            await until(lambda: store.only.failures, "the failure")
            assert store.keys[ME][0].material == b"a" * 32
            replace(path, b"b" * 32)
            await until(lambda: store.version == 2, "the new keys")
            assert store.keys[ME][0].material == b"b" * 32

    run(test())


def test_a_source_that_was_down_at_the_start_is_soon_tried_again() -> None:
    """Without waiting for the refresh interval."""

    async def test() -> None:
        async with serving(b"{}") as idp, storing(max_backoff=0.02) as store:
            await store.follow([by_url(idp.url, refresh=3600.0)])
            await until(lambda: store.only.failures > 2, "more failures")
            assert store.kids == {}
            idp.body = OLD
            await until(lambda: store.kids, "the keys")
            fetched = len(idp.requests)
            await asyncio.sleep(0.1)
            assert len(idp.requests) == fetched

    run(test())


def test_a_failing_issuer_is_not_hammered() -> None:
    """With the default pace, the next try comes after a second or more, whatever the jitter."""

    async def test() -> None:
        async with serving(b"{}") as idp, storing() as store:
            await store.follow([by_url(idp.url)])
            await asyncio.sleep(0.5)
            assert len(idp.requests) == 1

    run(test())


# --- an unknown kid ------------------------------------------------------------------------------------------------


def test_a_storm_of_unknown_kids_is_one_fetch() -> None:
    """1,000 callers share it and see the change; another storm within 10 s costs the issuer nothing."""

    async def test() -> None:
        async with serving() as idp, storing() as store:
            await store.follow([by_url(idp.url)])
            idp.body = NEW

            async def storm() -> set[bool]:
                return set(await asyncio.gather(*(store.refresh(ME) for _ in range(1000))))

            assert await storm() == {True}
            assert len(idp.requests) == 2
            assert store.kids == {ME: ["ES256-new"]}
            idp.body = OLD
            store.clock.now += 9.9
            assert await storm() == {False}
            assert len(idp.requests) == 2
            store.clock.now += 0.1
            assert await storm() == {True}
            assert len(idp.requests) == 3
            assert store.version == 3

    run(test())


def test_issuers_do_not_share_their_fetches(tmp_path: Path) -> None:
    """A refresh of one leaves the other its own; a file is read again in the same way."""

    async def test() -> None:
        path = tmp_path / "jwks.json"
        path.write_bytes(OLD)
        async with serving() as idp, storing() as store:
            await store.follow([by_url(idp.url, "u"), by_file(path, "f")])
            replace(path, NEW)
            assert await store.refresh("u") is False
            assert await store.refresh("f") is True
            assert store.kids == {"u": ["ES256-old"], "f": ["ES256-new"]}
            assert await store.refresh("nobody") is False

    run(test())


def test_a_storm_at_an_issuer_that_never_answered_is_one_fetch() -> None:
    async def test() -> None:
        async with serving(b"no keys") as idp, storing() as store:
            await store.follow([by_url(idp.url)])
            assert not any(await asyncio.gather(*(store.refresh(ME) for _ in range(1000))))
            assert len(idp.requests) == 2
            assert dict(store.keys) == {}
            assert store.version == 0
            assert store.changes == []

    run(test())


def test_a_caller_waits_for_a_limited_time_and_leaves_the_fetch_running() -> None:
    """A caller that gives up or is cancelled does not end it for the others."""

    async def test() -> None:
        async with serving() as idp, storing(refresh_wait=0.1) as store:
            await store.follow([by_url(idp.url)])
            go = asyncio.Event()
            idp.answer = delayed(go)
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(store.refresh(ME), 0.02)
            assert await store.refresh(ME) is False
            assert time.monotonic() - began < 0.5
            last = asyncio.create_task(store.refresh(ME))
            await asyncio.sleep(0)
            go.set()
            assert await last is True
            assert len(idp.requests) == 2

    run(test())


# --- bad answers ---------------------------------------------------------------------------------------------------


def plain(body: bytes, **options: Any) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, **options)

    return answer


async def endless(request: web.Request) -> web.StreamResponse:
    """Sends without end, and without a length."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 65536)


async def dripping(request: web.Request) -> web.StreamResponse:
    """A byte at a time, so that no single read times out."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


async def silent(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def cut(request: web.Request) -> web.StreamResponse:
    """Announces more than it sends."""
    response = web.StreamResponse(headers={"Content-Length": "5000"})
    await response.prepare(request)
    await response.write(NEW)
    if request.transport is not None:
        request.transport.close()
    return response


async def no_http(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.write(b"HTTP/9.9 MARKER\r\n\r\n")
        request.transport.close()
    return web.Response()


PRIVATE = ECAlgorithm.to_jwk(tokens.private_key("ES256", "new"), as_dict=True)
BAD: dict[str, tuple[Answer, str]] = {
    "server error": (plain(NEW, status=500), "expected status 200, found 500"),
    "no content": (plain(b"", status=204), "expected status 200, found 204"),
    "other success": (plain(NEW, status=203), "expected status 200, found 203"),
    "redirect": (plain(NEW, status=302, headers={"Location": "/elsewhere"}), "expected status 200, found 302"),
    "not json": (plain(b"<html>MARKER"), "is not JSON"),
    "no set": (plain(b'{"MARKER": []}'), "is not a JWK Set"),
    "private key": (plain(json.dumps({"keys": [PRIVATE]}).encode()), "holds the private member d"),
    "huge": (plain(NEW + b" " * MAX_BYTES), "holds over 262144 bytes"),
    "endless": (endless, "holds over 262144 bytes"),
    "compressed": (
        plain(gzip.compress(NEW), headers={"Content-Encoding": "gzip"}),
        "sent a compressed body though none was asked for",
    ),
    "silent": (silent, "no complete answer in time"),
    "dripping": (dripping, "no complete answer in time"),
    "cut off": (cut, "the exchange failed: ClientPayloadError"),
    "not http": (no_http, "the exchange failed: ClientResponseError"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_adds_no_keys_and_removes_none(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Good keys stay; an issuer without keys stays without; the error says exactly what is wrong."""
    answer, message = BAD[name]

    async def test() -> None:
        async with serving() as idp, serving() as fresh, storing(fetch_timeout=0.25) as store:
            fresh.answer = answer
            await store.follow([by_url(idp.url, "known"), by_url(fresh.url, "fresh")])
            before = store.keys
            assert store.kids == {"known": ["ES256-old"]}
            idp.answer = answer
            assert await store.refresh("known") is False
            assert store.keys is before
            assert (store.version, store.changes) == (1, [{"known": ["ES256-old"]}])
            known, never = store.status()
            assert known.last_error == f"{idp.url}: {message}" or message in str(known.last_error)
            assert message in str(never.last_error)
            assert (known.keys, known.fetches, known.failures) == (1, 2, 1)
            assert (never.keys, never.age, never.failures) == (0, None, 1)
            assert all(r.path == "/jwks.json" for r in idp.requests)
            idp.answer = None
            idp.body = NEW
            store.clock.now += 10
            assert await store.refresh("known") is True
            assert store.status()[0].last_error is None

    with caplog.at_level(logging.DEBUG, "srp.keys"):
        run(test())
    logged = " ".join(r.getMessage() for r in caplog.records)
    assert message in logged
    for secret in ("MARKER", str(PRIVATE["d"]), str(PRIVATE["x"])):
        assert secret not in logged


def test_a_dead_port_gives_no_keys() -> None:
    async def test() -> None:
        async with serving() as idp:
            url = idp.url
        async with storing() as store:
            await store.follow([by_url(url)])
            assert "cannot connect" in str(store.only.last_error)

    run(test())


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing", lambda p: None, "No such file or directory"),
        ("a folder", lambda p: p.mkdir(), "is not a regular file"),
        ("a pipe nobody writes to", lambda p: os.mkfifo(p), "is not a regular file"),
        ("too big", lambda p: p.write_bytes(b" " * (MAX_BYTES + 1)), "holds over 262144 bytes"),
        ("empty", lambda p: p.write_bytes(b""), "is not JSON"),
    ],
)
def test_a_bad_file_gives_no_keys(tmp_path: Path, name: str, make: Callable[[Path], Any], message: str) -> None:
    async def test() -> None:
        path = tmp_path / "jwks.json"
        make(path)
        async with storing() as store:
            await store.follow([by_file(path)])
            assert dict(store.keys) == {}
            assert message in str(store.only.last_error)
            assert str(path) in str(store.only.last_error)

    run(test())


def test_an_issuer_without_a_source_has_no_keys() -> None:
    async def test() -> None:
        async with storing() as store:
            await store.follow([Issuer(ME, frozenset(), frozenset())])
            assert dict(store.keys) == {}
            assert store.only.failures == 1

    run(test())


# --- the connection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://idp.example.com/jwks.json", True),
        ("https://idp.example.com:8443/jwks.json?v=1", True),
        ("http://127.0.0.1:8080/jwks", True),
        ("http://127.9.9.9/jwks", True),
        ("http://[::1]:8080/jwks", True),
        ("http://localhost/jwks", True),
        ("HTTPS://idp.example.com/", True),
        ("http://idp.example.com/jwks", False),
        ("http://10.0.0.1/jwks", False),
        ("http://0.0.0.0/jwks", False),
        ("http://169.254.169.254/latest", False),
        ("http://127.0.0.1.example.com/jwks", False),
        ("http://localhost.example.com/jwks", False),
        ("http://127.0.0.1@idp.example.com/jwks", False),
        ("https://user:password@idp.example.com/", False),
        ("https://user@idp.example.com/", False),
        ("https://user:pass\\password@idp.example.com/", False),
        ("https://a\\b/jwks", False),  # URL parsers disagree about its host
        ("https://idp.example.com/#jwks", False),
        ("file:///etc/passwd", False),
        ("ftp://127.0.0.1/", False),
        ("unix:///run/x", False),
        ("/jwks.json", False),
        ("https:///jwks", False),
        ("https://idp.example.com:99999/", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_keys_are_fetched_only_by_https_or_from_loopback(url: str, good: bool) -> None:
    if good:
        assert jwks_url(url).host
        return
    with pytest.raises(ValueError, match=r"expected|not supported") as caught:
        jwks_url(url)
    assert "password" not in str(caught.value).replace("a user or password", "")

    async def test() -> None:
        async with storing() as store:
            await store.follow([by_url(url)])
            assert "user:" not in str(store.only.last_error)
            assert store.only.failures == 1

    run(test())


def test_a_fetch_carries_nothing_but_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cookie, and no proxy or password from the environment; the bearer token is read again each time."""
    (tmp_path / "netrc").write_text("machine localhost login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    token = tmp_path / "token"

    async def test() -> None:
        async with serving() as idp, storing() as store:
            idp.answer = plain(OLD, headers={"Set-Cookie": "a=b; Path=/"})
            url = idp.url.replace("127.0.0.1", "localhost")  # a cookie jar keeps no cookie of an IP address
            await store.follow([by_url(url)])
            token.write_text("first\n")
            await store.follow([by_url(url, bearer_token_file=str(token))])
            token.write_text("second")
            await store.refresh(ME)
            assert [r.headers.get("Authorization") for r in idp.requests] == [None, "Bearer first", "Bearer second"]
            assert not any("Cookie" in r.headers for r in idp.requests)
            assert {r.headers["Accept-Encoding"] for r in idp.requests} == {"identity"}
            for bad in ("", "two words", "line\r\nX-Injected: 1", "h\u00e9"):
                token.write_text(bad)
                store.clock.now += 10
                assert await store.refresh(ME) is False
                assert store.only.last_error == f"{url}: found no bearer token in {token}"
            token.unlink()
            store.clock.now += 10
            assert await store.refresh(ME) is False
            assert len(idp.requests) == 3
            assert store.kids == {ME: ["ES256-old"]}

    run(test())


def test_errors_do_not_show_the_query_of_a_url() -> None:
    """Some issuers expect an API key there."""

    async def test() -> None:
        async with serving(b"{}") as idp, storing() as store:
            await store.follow([by_url(idp.url + "?key=hunter2")])
            assert idp.requests[0].query_string == "key=hunter2"
            assert "hunter2" not in str(store.only.last_error)

    run(test())


def certificate(directory: Path, address: str) -> ssl.SSLContext:
    """A server's TLS context, with a self-signed certificate for `address` in `directory/ca.pem`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(datetime.now(UTC) + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (directory / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "ca.pem", directory / "key.pem")
    return tls


@pytest.mark.parametrize(
    ("name", "address", "ca", "message"),
    [
        ("its own CA", "127.0.0.1", "ca.pem", None),
        ("the system's CAs", "127.0.0.1", None, "CERTIFICATE_VERIFY_FAILED"),
        ("certificate of another host", "127.0.0.2", "ca.pem", "CERTIFICATE_VERIFY_FAILED"),
        ("missing CA file", "127.0.0.1", "none.pem", "cannot read CA certificates from"),
        ("CA file without certificates", "127.0.0.1", "key.pem", "cannot read CA certificates from"),
    ],
)
def test_tls_is_verified(tmp_path: Path, name: str, address: str, ca: str | None, message: str | None) -> None:
    async def test() -> None:
        async with serving(OLD, certificate(tmp_path, address)) as idp, storing() as store:
            await store.follow([by_url(idp.url, ca_file=str(tmp_path / ca) if ca else None)])
            if message is None:
                assert store.kids == {ME: ["ES256-old"]}
            else:
                assert message in str(store.only.last_error)
                assert idp.requests == []

    run(test())


# --- the end -------------------------------------------------------------------------------------------------------


def test_close_ends_running_fetches_and_releases_their_waiters() -> None:
    """`run` checks that no task is left; keys stay readable; a second close does nothing."""

    async def test() -> None:
        async with serving() as idp, storing() as store:
            await store.follow([by_url(idp.url)])
            idp.answer = silent
            waiting = [asyncio.create_task(store.refresh(ME)) for _ in range(10)]
            await until(lambda: len(idp.requests) == 2, "the fetch")
            began = time.monotonic()
            await store.close()
            assert await asyncio.gather(*waiting) == [False] * 10
            assert time.monotonic() - began < 0.5
            await store.close()
            assert store.kids == {ME: ["ES256-old"]}
            assert await store.refresh(ME) is False

    run(test())


def test_a_cancelled_follow_changes_nothing() -> None:
    async def test() -> None:
        async with serving() as idp, serving() as other, storing() as store:
            await store.follow([by_url(idp.url)])
            other.answer = silent
            following = asyncio.create_task(store.follow([by_url(other.url)]))
            await until(lambda: other.requests, "the fetch")
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following
            assert store.kids == {ME: ["ES256-old"]}
            idp.body = NEW
            assert await store.refresh(ME) is True

    run(test())


# --- the log -------------------------------------------------------------------------------------------------------


def test_the_log_is_bounded_and_shows_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated failures are logged once a minute; a change is one line with the kids."""
    path = tmp_path / "jwks.json"
    path.write_bytes(OLD)

    async def silent_changes(_: WatchedFile) -> AsyncIterator[None]:
        await asyncio.sleep(3600)
        yield

    monkeypatch.setattr(WatchedFile, "changes", silent_changes)  # only `refresh` reads the file

    async def test() -> None:
        async with storing() as store:
            await store.follow([by_file(path)])
            replace(path, b'{"MARKER": 1}')
            for _ in range(13):
                store.clock.now += 10
                assert await store.refresh(ME) is False
            replace(path, NEW)
            store.clock.now += 10
            assert await store.refresh(ME) is True

    with caplog.at_level(logging.DEBUG, "srp.keys"):
        run(test())
    error = f"keys of {ME}: {path}: is not a JWK Set: expected an object with a list `keys`; the good keys (1) stay"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"keys of {ME}: 1 from {path} (kid 'ES256-old')"),
        *[("WARNING", error)] * 3,
        ("INFO", f"keys of {ME}: readable again after 13 failures"),
        ("INFO", f"keys of {ME}: 1 from {path} (kid 'ES256-new')"),
    ]
