"""Check calls as Envoy makes them, and their answers as Envoy reads them."""

from __future__ import annotations

from typing import Any

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.auth.v3 import (
    AttributeContext,
    AttributeContextHttpRequest,
    AttributeContextRequest,
    CheckRequest,
    CheckResponse,
)

from ext_authz.wire.twin import twins
from tests.harness import tokens

_Response: Any = twins(CheckResponse)[CheckResponse]


def check_request(
    *experts: str, caller: str | None = None, path: str = "/x", body: bytes = b"", method: str = "POST", **headers: str
) -> bytes:
    """A serialised CheckRequest. `caller` is its token; header names are written with underscores."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers |= {"x-expert-names": ",".join(experts)} if experts else {}
    headers |= {"authorization": f"Bearer {caller}"} if caller else {}
    header_map = HeaderMap(headers=[HeaderValue(key=n, raw_value=v.encode("latin-1")) for n, v in headers.items()])
    http = AttributeContextHttpRequest(method=method, path=path, header_map=header_map, raw_body=body)
    return bytes(CheckRequest(attributes=AttributeContext(request=AttributeContextRequest(http=http))))


def token(**claims: Any) -> str:
    return tokens.sign(tokens.claims(**claims))


def response_of(data: bytes) -> CheckResponse:
    """An answer as Envoy reads it: repeated messages are merged, where envoy-data-plane would keep the last one."""
    return CheckResponse.parse(_Response.FromString(data).SerializeToString())


def client_headers(answer: bytes) -> dict[str, str]:
    """The headers that a serialised CheckResponse sets for the client."""
    response = response_of(answer)
    ok, denied = response.ok_response, response.denied_response
    options = ok.response_headers_to_add if ok else denied.headers if denied else []
    return {o.header.key: o.header.value or o.header.raw_value.decode() for o in options if o.header}
