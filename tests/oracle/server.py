"""ext_authz, asked as Envoy asks it: the bytes of a CheckRequest in, the bytes of a CheckResponse out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from envoy_data_plane.envoy.service.auth.v3 import CheckRequest, CheckResponse

from ext_authz.core.jwk import Key, parse_jwks, secret_key
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.metrics import Tally
from ext_authz.policyfile.parse import parse_policy
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.wire.twin import twins
from tests.oracle.answers import Answer, Request
from tests.oracle.policies import Case

_TWINS = twins(CheckRequest, CheckResponse)
_CheckRequest: Any = _TWINS[CheckRequest]
_CheckResponse: Any = _TWINS[CheckResponse]
_ID = re.compile("[0-9a-f]{16}")
_OVERWRITE, _IF_ABSENT = 2, 1  # envoy.config.core.v3.HeaderValueOption.HeaderAppendAction
_WHO_ANSWERS = {"x-srp-decision", "x-srp-reason"}  # set by the route if an expert on standby answers


class Server:
    """Authorization for one case. Newer keys, if the case has any, are loaded when the server looks for them."""

    def __init__(self, case: Case) -> None:
        self.looked_for: str | None = None
        self.now = 0.0
        self._newer = dict(case.newer)
        self._grants = case.grants
        self._policy = parse_policy(case.text, key_files=False)
        self._keys: dict[str, tuple[Key, ...]] = {}
        self._load(case.keys)
        self._authorization = Authorization(self._epoch(), self, Tally(), lambda: self.now)

    def _load(self, keys: Mapping[str, bytes]) -> None:
        for name, data in keys.items():
            try:
                shared = self._policy.issuers[name].secret_file is not None
                self._keys[name] = (secret_key(data),) if shared else parse_jwks(data).keys
            except ValueError:
                continue  # a set that is rejected changes nothing

    def _epoch(self) -> Epoch:
        return replace(Epoch.of(Snapshot(self._policy, dict(self._keys)), "epoch"), grants=self._grants)

    async def refresh(self, issuer: str) -> bool:
        """Called by the check for a token that newer keys might verify."""
        self.looked_for = issuer
        if issuer in self._newer:
            self._load({issuer: self._newer.pop(issuer)})
            self._authorization.epoch = self._epoch()
        return True

    async def check(self, request: Request, now: float) -> bytes:
        self.now, self.looked_for = now, None
        return await self._authorization.check(asked(request))


def asked(request: Request) -> bytes:
    """The CheckRequest that Envoy makes of a request."""
    check = _CheckRequest()
    http = check.attributes.request.http
    http.method, http.path, http.raw_body = request.method, request.path, request.body
    for name, value in request.headers:
        http.header_map.headers.add(key=name, raw_value=value)
    return bytes(check.SerializeToString())


def answered(data: bytes, looked_for: str | None) -> Answer:
    """A CheckResponse, in the oracle's terms. AssertionError if its form is wrong."""
    response = _CheckResponse.FromString(data)
    if response.WhichOneof("http_response") == "denied_response":
        return _denied(response, looked_for)
    ok = response.ok_response
    assert response.status.code == 0
    expert = _headers(ok.headers)
    targets = [target.split(";") for target in expert.pop("x-target-cluster").split(",")]
    standby = [target for target in targets if target[-1] == "s"]
    client = _headers(ok.response_headers_to_add, _WHO_ANSWERS if standby else set())
    assert targets[len(targets) - len(standby) :] == standby
    assert _ID.fullmatch(client["x-srp-decision-id"])
    assert expert.pop("x-srp-decision-id") == client.pop("x-srp-decision-id")
    return Answer(
        status=200,
        client=client,
        targets=[_target(t) for t in targets if t not in standby],
        standby=[_target(t[:-1]) for t in standby],
        expert=expert,
        removed=frozenset(ok.headers_to_remove),
        fresh=looked_for,
    )


def _denied(response: Any, looked_for: str | None) -> Answer:
    denied = response.denied_response
    status = denied.status.code
    client = _headers(denied.headers)
    error = json.loads(denied.body)["error"]
    assert response.status.code == {401: 16, 503: 14}.get(status, 7)
    assert not response.ok_response.headers
    assert (client.pop("content-type"), client.pop("cache-control")) == ("application/json", "no-store")
    assert _ID.fullmatch(error["decision_id"])
    assert error.pop("decision_id") == client.pop("x-srp-decision-id")
    assert isinstance(error.pop("message"), str)
    if "www-authenticate" in client:
        described = re.sub('error_description="[^"\\\\]+"$', 'error_description="..."', client["www-authenticate"])
        client["www-authenticate"] = described
    return Answer(status, client, error=error, fresh=looked_for)


def _headers(options: Any, if_absent: set[str] = frozenset()) -> dict[str, str]:  # type: ignore[assignment]
    """Headers by name: each once, in `value`, and in place of the client's."""
    found: dict[str, str] = {}
    for option in options:
        name = option.header.key
        assert name not in found
        assert option.append_action == (_IF_ABSENT if name in if_absent else _OVERWRITE)
        assert re.fullmatch("[ -~]+", option.header.value)
        assert not option.header.raw_value
        found[name] = option.header.value
    return found


def _target(parts: list[str]) -> str:
    """A cluster without its suffix, its weight and its limit."""
    return ";".join((parts[0].partition(".")[0], *parts[1:]))
