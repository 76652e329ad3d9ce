"""One real Envoy in front of an ext_authz and an expert that run in this process."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ext_authz.demo.ports import HOST
from tests.harness.answer import Answer, lower
from tests.harness.system import get_json
from tests.harness.upstream import Upstream


@dataclass(repr=False)
class Proxy:
    """An Envoy with one worker thread."""

    upstream: Upstream
    port: int
    admin: int
    process: subprocess.Popen[bytes]
    log: Path

    def send(
        self,
        path: str = "/x",
        *,
        token: str | None = None,
        experts: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        method: str = "GET",
        chunked: bool = False,
        pause: float = 0.0,
    ) -> Answer:
        """One request on its own connection, with these headers; the body follows after `pause` seconds."""
        began = time.monotonic()
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        before = len(self.upstream.seen)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_accept_encoding=True)
            if token is not None:
                connection.putheader("authorization", f"Bearer {token}")
            if experts is not None:
                connection.putheader("x-expert-names", experts)
            for name, value in headers:
                connection.putheader(name, value)
            if chunked:
                connection.putheader("transfer-encoding", "chunked")
            elif body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders()
            time.sleep(pause)
            if chunked:
                connection.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")
            elif body:
                connection.send(body)
            response = connection.getresponse()
            found, content = lower(response.getheaders()), response.read()
        seen = self.upstream.seen[before:]
        upstream = lower([*seen[-1].headers.items()]) if seen else None
        return Answer(response.status, found, content, time.monotonic() - began, upstream)

    def leased(self, **request: Any) -> bool:
        """Whether the decision on the first of two such requests also answers the second."""
        first, second = self.send(**request), self.send(**request)
        assert first.status == second.status
        return first.id == second.id

    def counters(self) -> dict[str, int]:
        """The lease filter's counters of this epoch, the number of pushes, and how often ext_authz was not asked."""
        path = "/stats?format=json&filter=lua.lease|srp.lease.config_reload|ext_authz.disabled"
        stats = get_json(self.admin, path)["stats"]
        found = dict.fromkeys(("hits", "misses", "stores", "evictions"), 0)
        return found | {s["name"].rpartition(".")[2]: s["value"] for s in stats if "value" in s}
