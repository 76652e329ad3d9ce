"""The values of a policy file: how a duration, an endpoint, a name or a URL is written, and what it means.

`schema` puts the text of a ValueError into its message.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator

from ext_authz.core import policy
from ext_authz.core.cel_source import MAX_LENGTH
from ext_authz.core.headers import NOT_SENT, REQUESTED_CLUSTER, TARGET_CLUSTER, TOKEN_HEADERS
from ext_authz.core.jwks_url import jwks_url

RESERVED_CLUSTERS = frozenset({"none", "ext_authz"})

EXPECTED: dict[str, str] = {}  # pattern → what it stands for in a message
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = r"^(0|[0-9]{1,9}(ms|s|m|h))$"
_ENDPOINT = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$"
_INSTANT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def duration(value: object, least: float, most: float) -> float:
    """Seconds from `200ms`, `30s`, `5m`, `1h` or `0`."""
    text = "0" if value == 0 and type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(_DURATION, text):
        raise ValueError("expected a duration such as `30s` (ms, s, m, h)")
    unit = text.lstrip("0123456789")
    seconds = int(text.removesuffix(unit)) * _UNITS[unit or "s"]
    if not least <= seconds <= most:
        raise ValueError(f"expected a duration from {spelled(least)} to {spelled(most)}")
    return seconds


def spelled(seconds: float) -> str:
    """The shortest policy text for a duration."""
    if not seconds:
        return "0"
    unit = next((u for u in ("h", "m", "s") if seconds % _UNITS[u] == 0), "ms")
    return f"{round(seconds / _UNITS[unit])}{unit}"


def endpoint(value: object) -> policy.Endpoint:
    """`host:port`; the host as Envoy expects it: an IP address without brackets, or a lower-case DNS name."""
    expected = ValueError(
        "expected `host:port`: an IP address ([v6] in brackets) or a DNS name, and a port from 1 to 65535"
    )
    if not isinstance(value, str) or not re.fullmatch(_ENDPOINT, value):
        raise expected
    host, _, port = value.lower().rpartition(":")
    try:
        if host.startswith("["):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        elif host.rpartition(".")[2].isdigit():
            host = str(ipaddress.IPv4Address(host))
        elif len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.split(".")):
            raise expected
    except ipaddress.AddressValueError:
        raise expected from None
    if not 1 <= int(port) <= 65535:
        raise expected
    return policy.Endpoint(host, int(port))


def address(at: policy.Endpoint) -> str:
    """The policy text for an endpoint."""
    return f"[{at.host}]:{at.port}" if ":" in at.host else f"{at.host}:{at.port}"


def instant(value: object) -> float | None:
    """Seconds since the epoch from a time of RFC 3339 §5.6."""
    if value is None:
        return None
    expected = "expected an RFC 3339 time such as `2030-01-31T12:00:00Z`, or `null`"
    if not isinstance(value, str) or not re.fullmatch(_INSTANT, value):
        raise ValueError(expected)
    try:
        return datetime.fromisoformat(value.upper()).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(expected) from None


def _version(value: object) -> int:
    if value != 1 or type(value) is not int:
        raise ValueError("expected the number 1")
    return 1


def _cluster(name: str) -> str:
    if not is_cluster(name):
        raise ValueError("which is reserved, expected another name")
    return name


def is_cluster(name: str) -> bool:
    return _LABEL.fullmatch(name) is not None and name not in RESERVED_CLUSTERS


def _header(name: str) -> str:
    if name in (*TOKEN_HEADERS, "host", *NOT_SENT) or name.startswith(("x-srp-", "x-envoy-", "x-b3-")):
        raise ValueError("which cannot name experts, expected a header such as `x-expert-names`")
    if name == REQUESTED_CLUSTER:
        raise ValueError(f"expected `{TARGET_CLUSTER}`, as the client sends it")
    return name


def _normalized(path: str) -> str:
    if any(part in path for part in ("//", "/./", "/../")):
        raise ValueError("expected a path as Envoy normalizes it, without `//`, `/./` and `/../`")
    return path


def _jwks_url(url: str) -> str:
    jwks_url(url)
    return url


def _text(pattern: str, expected: str, most: int) -> Any:
    EXPECTED[pattern] = expected
    return Field(pattern=pattern, max_length=most)


def span(least: float, most: float) -> Any:
    """The type of a duration within these limits, in seconds."""
    written = Annotated[str, Field(pattern=_DURATION)] | Literal[0]
    return PlainValidator(partial(duration, least=least, most=most), json_schema_input_type=written)


Version = Annotated[int, PlainValidator(_version, json_schema_input_type=Literal[1])]
ExpertName = Annotated[
    str,
    _text(
        r"^[A-Za-z0-9][A-Za-z0-9_.:/-]*$", "an expert's name: letters, digits and `_.:/-`, a letter or digit first", 64
    ),
]
TierName = Annotated[
    str, _text(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", "a tier's name: letters, digits and `_.-`, a letter or digit first", 64)
]
ClusterName = Annotated[
    str,
    _text(r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "a cluster's name: lower-case letters, digits and `-` between them", 63),
    AfterValidator(_cluster),
]
HeaderName = Annotated[
    str, _text(r"^[a-z0-9!#$%&'*+.^`|~-]+$", "a header's name in lower case, without `_`", 64), AfterValidator(_header)
]
RoutePath = Annotated[
    str, _text(r'^/[!"$->@-~]*$', "a path that starts with `/`, without query", 1024), AfterValidator(_normalized)
]
HealthPath = Annotated[str, _text(r"^/[!-~]*$", "a path that starts with `/`", 1024)]
JsonPointer = Annotated[
    str, _text(r"^(/([^~/\x00-\x1f\x7f-\x9f]|~[01])*){1,16}$", "a JSON pointer (RFC 6901) such as `/model`", 256)
]
JwksUrl = Annotated[
    str,
    _text(r"^https?://[!-~]+$", "a URL such as `https://idp.example.com/jwks.json`", 1024),
    AfterValidator(_jwks_url),
]
Text = Annotated[str, _text(r"^[^\x00-\x1f\x7f-\x9f]+$", "text without control characters", 1024)]
Cel = Annotated[str, Field(min_length=1, max_length=MAX_LENGTH)]
Endpoint = Annotated[
    policy.Endpoint, PlainValidator(endpoint, json_schema_input_type=Annotated[str, Field(pattern=_ENDPOINT)])
]
Instant = Annotated[
    float | None, PlainValidator(instant, json_schema_input_type=Annotated[str, Field(pattern=_INSTANT)] | None)
]
Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512"
]  # fmt: skip
