"""More than can be served: refused at once and closed, and served again when the crowd is gone."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import demo_policy
from tests.harness import tokens
from tests.harness.system import HOST, System, get_json, system
from tests.harness.waiting import wait_for

IN_FLIGHT = 384  # checks that Envoy has under way at most: the ext_authz cluster's `max_requests`
CROWD = IN_FLIGHT + 64


@pytest.fixture
def proxy() -> Iterator[System]:
    with system(demo_policy, {"A": 1, "B": 1, "C": 1, "D": 1}, {"jwks.json": tokens.jwks("ES256")}) as it:
        yield it


def test_a_crowd_is_refused_and_not_let_in(proxy: System) -> None:
    """With a server that answers nobody each of the crowd gets 503, those over the limit without a check."""
    request = b"GET / HTTP/1.1\r\nhost: x\r\nx-expert-names: A\r\nconnection: close\r\n\r\n"
    with ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection((HOST, proxy.port), 30)) for _ in range(CROWD)]
        proxy.authz.pause()
        stack.callback(proxy.authz.resume)
        for one in crowd:
            one.sendall(request)
        answers = [one.makefile("rb").read() for one in crowd]
    assert Counter(a.partition(b"\r\n")[0] for a in answers) == {b"HTTP/1.1 503 Service Unavailable": CROWD}
    assert all(b'"authz_unavailable"' in a and b"\r\nretry-after: 1\r\n" in a for a in answers)
    assert overflown(proxy) >= CROWD - IN_FLIGHT
    wait_for(lambda: proxy.send(experts=["A"]).status == 200, "the server to answer again", proxy)


def overflown(proxy: System) -> int:
    stats = get_json(proxy.admin, "/stats?format=json&filter=cluster.ext_authz.upstream_rq_active_overflow")["stats"]
    return sum(s["value"] for s in stats if "value" in s)
