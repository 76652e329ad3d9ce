"""An ext_authz that decides nothing: it answers as the request itself says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from envoy_data_plane.envoy.service.auth.v3 import CheckRequest, CheckResponse

from ext_authz.wire.twin import twins

_TWINS = twins(CheckRequest, CheckResponse)


class StubAuthz:
    """`x-test` holds the answer, as JSON. `checks` are the headers of each request, as they came."""

    def __init__(self) -> None:
        self.checks: list[list[tuple[str, str]]] = []
        self.bodies: list[bytes] = []
        self.delay = 0.0

    def handlers(self) -> grpc.GenericRpcHandler:
        method = grpc.unary_unary_rpc_method_handler(self._check)
        return grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": method})

    async def _check(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        http = _TWINS[CheckRequest].FromString(data).attributes.request.http  # type: ignore[attr-defined]
        headers = [(h.key, h.raw_value.decode()) for h in http.header_map.headers]
        self.checks.append(headers)
        self.bodies.append(http.raw_body)
        if self.delay:
            await asyncio.sleep(self.delay)
        script = json.loads(dict(headers).get("x-test", "{}"))
        fields: dict[str, Any] = {}
        if deny := script.get("deny"):
            fields["status"] = {"code": 7}
            fields["denied_response"] = {
                "status": {"code": deny["status"]}, "body": deny["body"], "headers": _options(deny.get("headers", {}))
            }  # fmt: skip
        else:
            fields["ok_response"] = {
                "headers": _options(script.get("set", {})),
                "headers_to_remove": script.get("remove", ["x-requested-cluster"]),
                "response_headers_to_add": _options({"x-srp-decision": "allow"}),
            }
        fields["dynamic_metadata"] = {"fields": {"decision": {"string_value": "allow"}}}
        return bytes(_TWINS[CheckResponse](**fields).SerializeToString())


def _options(headers: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"header": {"key": k, "value": v}} for k, v in headers.items()]
