"""Check calls as Envoy makes them, and a server to make them to, without Envoy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.auth.v3 import (
    AttributeContext,
    AttributeContextHttpRequest,
    AttributeContextRequest,
    CheckRequest,
    CheckResponse,
)

from ext_authz.core.jwk import parse_jwks
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.metrics import Tally
from ext_authz.policyfile import parse
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.sources.keys import KeyStore
from ext_authz.wire.twin import twins
from tests.harness import tokens

_Response: Any = twins(CheckResponse)[CheckResponse]

POLICY = f"""\
version: 1
tiers: [low, high]
issuers:
  - {{issuer: "{tokens.ISSUER}", audiences: [{tokens.AUDIENCE}], algorithms: [ES256], jwks: {{file: jwks.json}}}}
anonymous: low
log_claims: [plan, org]
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: ["127.0.0.1:1"]}}
  B: {{tier: low, cluster: expert-b, endpoints: ["127.0.0.1:2"]}}
  C: {{tier: high, cluster: expert-c, endpoints: ["127.0.0.1:3"]}}
  D: {{tier: high, cluster: expert-d, endpoints: ["127.0.0.1:4"], downgrade_to: [B, A]}}
gate:
  - {{path: /route, json: /expert_names, default: [A, B]}}
  - {{prefix: /, header: x-expert-names}}
"""


def response_of(data: bytes) -> CheckResponse:
    """An answer as Envoy reads it: what comes twice in it is merged, where envoy-data-plane would keep the last."""
    return CheckResponse.parse(_Response.FromString(data).SerializeToString())


def write_policy(directory: Path, text: str = POLICY, name: str = "policy.yaml") -> Path:
    """The policy and the keys it names, in `directory`."""
    (directory / "jwks.json").write_bytes(tokens.jwks("ES256"))
    path = directory / name
    path.write_text(text)
    return path


def load_policy(directory: Path, *edits: tuple[str, str], text: str = POLICY) -> Policy:
    """The policy of `text` with each `(old, new)` replaced."""
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return parse.load_policy(write_policy(directory, text))


def snapshot(policy: Policy) -> Snapshot:
    return Snapshot(policy, {tokens.ISSUER: parse_jwks(tokens.jwks("ES256")).keys})


def authorization(policy: Policy) -> Authorization:
    return Authorization(Epoch.of(snapshot(policy)), KeyStore(), Tally())


def token(**claims: Any) -> str:
    return tokens.sign(tokens.claims(**claims))


def asks(
    *experts: str, caller: str | None = None, path: str = "/x", body: bytes = b"", method: str = "POST", **headers: str
) -> bytes:
    """A serialised CheckRequest; `caller` is its token; a header's name is written with underscores."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers |= {"x-expert-names": ",".join(experts)} if experts else {}
    headers |= {"authorization": f"Bearer {caller}"} if caller else {}
    header_map = HeaderMap(headers=[HeaderValue(key=n, raw_value=v.encode("latin-1")) for n, v in headers.items()])
    http = AttributeContextHttpRequest(method=method, path=path, header_map=header_map, raw_body=body)
    return bytes(CheckRequest(attributes=AttributeContext(request=AttributeContextRequest(http=http))))


def told(answer: bytes) -> dict[str, str]:
    """The headers that the client gets with this serialised CheckResponse."""
    response = response_of(answer)
    ok, denied = response.ok_response, response.denied_response
    options = ok.response_headers_to_add if ok else denied.headers if denied else []
    return {o.header.key: o.header.value or o.header.raw_value.decode() for o in options if o.header}


def wait_until(holds: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)
