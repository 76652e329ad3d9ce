"""The shape of a policy file: keys, types and limits. `compile` checks references.

Every limit bounds the memory that a hostile file can use. The docstrings are the descriptions that editors show.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import ErrorDetails

from ext_authz.core import policy
from ext_authz.core.gate import MAX_NAMES
from ext_authz.policyfile.source import listed, suggestion
from ext_authz.policyfile.values import (
    EXPECTED,
    Algorithm,
    Cel,
    ClusterName,
    Endpoint,
    ExpertName,
    HeaderName,
    HealthPath,
    Instant,
    JsonPointer,
    JwksUrl,
    RoutePath,
    Text,
    TierName,
    Version,
    span,
    spelled,
)

MAX_EXPERTS = 10_000
MAX_CLEARANCE = 1_000
MAX_GATE = 256
MAX_REVOKED = 100_000


def _tier(name: str) -> str:
    if name == "deny":
        raise ValueError("which is reserved, expected another name")
    return name


def _mapping(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value


def _mapping_or_false(value: object) -> object:
    if value is not False and not isinstance(value, dict):
        raise ValueError("expected a mapping or `false`")
    return None if value is False else value


def _seconds(default: float) -> Any:
    return Field(default=default, json_schema_extra={"default": spelled(default)})


def _all_defaults(form: Any) -> Any:
    """An optional mapping. If it is left out, all its keys have their defaults."""
    return Field(default=form, json_schema_extra={"default": {}})


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


def _optional() -> Any:
    """An optional key without a default. The empty text, which no such key accepts, means that it is absent."""
    return Field(default="", json_schema_extra=_without_default)


def _list(least: int, most: int) -> Any:
    """The limits of a list without duplicates. The compiler finds those, so that it can point at the second one."""

    def refine(schema: dict[str, Any]) -> None:
        schema["uniqueItems"] = True
        if least:
            schema.pop("default", None)

    return Field(min_length=least, max_length=most, json_schema_extra=refine)


_TRAFFIC = policy.Traffic()
_HEALTH = policy.Health()
_OUTLIER = policy.Outlier()


class Form(BaseModel):
    """A mapping in the file. No unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def _exactly_one(self, *keys: str) -> None:
        given = [k for k in keys if k in self.model_fields_set]
        if len(given) != 1:
            raise ValueError(f"exactly one of {listed(keys, 'and')} is needed, found {'both' if given else 'neither'}")


class Health(Form):
    """The active health check: GET, and 200 means healthy."""

    path: HealthPath = _HEALTH.path
    interval: Annotated[float, span(0.1, 3600)] = _seconds(_HEALTH.interval)


class Outlier(Form):
    """Passive ejection of an endpoint that fails."""

    consecutive_5xx: Annotated[int, Field(ge=1, le=1000)] = _OUTLIER.consecutive_5xx
    """Failures in a row until the endpoint is ejected."""
    base_ejection: Annotated[float, span(0.1, 3600)] = _seconds(_OUTLIER.base_ejection)
    """How long the first ejection lasts."""


class Expert(Form):
    """One expert: who may reach it, where it is, and how Envoy sends requests there."""

    tier: TierName
    """The lowest tier that may reach it."""
    cluster: ClusterName = _optional()
    """Its cluster in Envoy. Default: the expert's name in lower case with `-` for `_`."""
    endpoints: Annotated[list[Endpoint], _list(1, 256)]
    """Its replicas, each `host:port`."""
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """Its capacity relative to the others."""
    downgrade_to: Annotated[list[ExpertName], _list(0, MAX_NAMES)] = []
    """The experts that may serve when none of the requested ones may. None may have a higher tier."""
    unavailable: Literal["refuse", "downgrade"] = "refuse"
    """`downgrade`: those in `downgrade_to` may also serve a request for this expert alone when it is down or full."""
    allow: Cel = _optional()
    """A CEL condition on `claims` and `request` that must hold as well."""
    max_requests: Annotated[int, Field(ge=1, le=1_000_000)] = _TRAFFIC.max_requests
    """Requests in flight at once."""
    max_pending: Annotated[int, Field(ge=1, le=1_000_000)] = _TRAFFIC.max_pending
    """Requests waiting for a connection."""
    timeout: Annotated[float, span(0, 86400)] = _seconds(_TRAFFIC.timeout)
    """Limit for the whole response; 0: none."""
    connect_timeout: Annotated[float, span(0.001, 60)] = _seconds(_TRAFFIC.connect_timeout)
    """Limit for opening a connection."""
    retries: Annotated[int, Field(ge=0, le=10)] = _TRAFFIC.retries
    """Attempts after the first one."""
    retry_on: Literal["safe", "5xx"] = _TRAFFIC.retry_on
    """`safe`: only requests that have not reached an expert; `5xx`: also those that it answered with 5xx."""
    health: Annotated[
        Health | None, BeforeValidator(_mapping_or_false, json_schema_input_type=Health | Literal[False])
    ] = _all_defaults(Health())
    """The active health check, or `false`."""
    outlier: Annotated[
        Outlier | None, BeforeValidator(_mapping_or_false, json_schema_input_type=Outlier | Literal[False])
    ] = _all_defaults(Outlier())
    """Passive ejection, or `false`."""
    slow_start: Annotated[float, span(0, 3600)] = _seconds(_TRAFFIC.slow_start)
    """How long a new endpoint takes to reach its full share of the traffic; 0: it has it at once."""
    lease: Annotated[float | None, span(0, 3600)] = Field(default=None, json_schema_extra=_without_default)
    """How long Envoy may repeat a decision that names it; 0: not at all. Default: the policy's `lease`."""


class ClearanceRule(Form):
    """Callers whose token satisfies `when` get `tier`."""

    when: Cel
    """A CEL condition on `claims`."""
    tier: TierName


class GateRule(Form):
    """Where requests to a path name their experts."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["path"]}, {"required": ["prefix"]}],
            "not": {"required": ["json", "header"]},
            "anyOf": [{"required": ["json"]}, {"required": ["header"]}, {"required": ["default"]}],
        }
    )

    path: RoutePath = _optional()
    """The exact path that the rule covers."""
    prefix: RoutePath = _optional()
    """The start of the paths that the rule covers."""
    pointer: Annotated[JsonPointer, Field(alias="json")] = _optional()
    """A JSON pointer (RFC 6901) to a name or a list of names in the body."""
    header: HeaderName = _optional()
    """The header with the names, comma-separated. `x-target-cluster` may also name clusters."""
    default: Annotated[list[ExpertName], _list(1, MAX_NAMES)] = []
    """The experts asked for if the request names none."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        self._exactly_one("path", "prefix")
        if self.pointer and self.header:
            raise ValueError("at most one of `json` and `header` is allowed, found both")
        if not (self.pointer or self.header or self.default):
            raise ValueError("names no expert: `json`, `header` or `default` is needed")
        return self


class Jwks(Form):
    """An issuer's public keys."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["url"]}, {"required": ["file"]}],
            "dependentRequired": {key: ["url"] for key in ("refresh", "ca_file", "bearer_token_file")},
        }
    )

    url: JwksUrl = _optional()
    """Where to fetch them: https, or http from a loopback host."""
    file: Text = _optional()
    """The file that holds them, relative to the policy's folder."""
    refresh: Annotated[float, span(10, 86400)] = _seconds(policy.JwksSource().refresh)
    """How often to fetch them."""
    ca_file: Text = _optional()
    """The file with the CA certificates that the URL's host is verified with."""
    bearer_token_file: Text = _optional()
    """The file with the bearer token for fetching them."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self._exactly_one("url", "file")
        if self.file and len(self.model_fields_set) > 1:
            *_, other = sorted(self.model_fields_set - {"file"})
            raise ValueError(f"`{other}` is for a `url`, found a `file`")
        return self


class Issuer(Form):
    """An identity provider whose tokens are trusted."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["jwks"]}, {"required": ["secret_file"]}]})

    issuer: Text
    """The exact `iss` of its tokens."""
    audiences: Annotated[list[Text], _list(1, 64)]
    """A token must be for one of these."""
    algorithms: Annotated[list[Algorithm], _list(1, 13)]
    """The algorithms that its tokens may be signed with."""
    jwks: Annotated[Jwks | None, BeforeValidator(_mapping, json_schema_input_type=Jwks)] = Field(
        default=None, json_schema_extra=_without_default
    )
    secret_file: Text = _optional()
    """The shared secret of the HS algorithms, relative to the policy's folder."""

    @model_validator(mode="after")
    def _fitting_key(self) -> Self:
        self._exactly_one("jwks", "secret_file")
        for algorithm in self.algorithms:
            if algorithm.startswith("HS") != bool(self.secret_file):
                needs = "jwks" if self.secret_file else "secret_file"
                raise ValueError(f"algorithm `{algorithm}` needs `{needs}`")
        return self


class Revoked(Form):
    """Tokens that are refused although they verify."""

    jti: Annotated[list[Text], Field(max_length=MAX_REVOKED)] = []
    """Their ids."""
    sub: Annotated[list[Text], Field(max_length=MAX_REVOKED)] = []
    """Their subjects."""
    issued_before: Instant = None
    """Every token issued before this time, and every one that does not say when."""


class File(Form):
    """The policy of a Secure Routing Proxy."""

    version: Version
    tiers: Annotated[list[Annotated[TierName, AfterValidator(_tier)]], _list(1, 32)]
    """The tiers, least privileged first."""
    issuers: Annotated[list[Issuer], Field(max_length=64)] = []
    anonymous: TierName = "deny"
    """The tier of callers without a token, or `deny`."""
    clearance: Annotated[list[ClearanceRule], Field(max_length=MAX_CLEARANCE)] = []
    """The tier of callers with a token: the first rule that holds, otherwise the lowest tier."""
    experts: Annotated[
        dict[ExpertName, Expert],
        Field(min_length=1, max_length=MAX_EXPERTS, json_schema_extra={"additionalProperties": False}),
    ]
    gate: Annotated[list[GateRule], Field(max_length=MAX_GATE)] = []
    """Where requests name their experts: the first rule that covers the path. Default: the header `x-expert-names`."""
    revoked: Revoked = _all_defaults(Revoked())
    leeway: Annotated[float, span(0, 300)] = _seconds(policy.LEEWAY)
    """How far the issuers' clocks may be off."""
    forward_token: bool = False
    """Whether experts receive the caller's token."""
    log_claims: Annotated[list[Text], _list(0, 32)] = []
    """Claims to include in the audit trail."""
    lease: Annotated[float, span(0, 3600)] = _seconds(policy.LEASE)
    """How long Envoy may repeat a decision without asking again; 0: not at all."""


_ITEMS: dict[str, type[Form]] = {"issuers": Issuer, "clearance": ClearanceRule, "experts": Expert, "gate": GateRule}
_PARTS: dict[str, type[Form]] = {"health": Health, "outlier": Outlier, "jwks": Jwks}


def keys_at(path: tuple[int | str, ...]) -> list[str]:
    """The keys that the mapping at `path` may have."""
    match path:
        case ():
            form: type[Form] = File
        case ("revoked",):
            form = Revoked
        case (str(section), _):
            form = _ITEMS[section]
        case _:
            form = _PARTS[str(path[-1])]
    return [field.alias or name for name, field in form.model_fields.items()]


def explain(error: ErrorDetails, found: str) -> str:
    """The message for a validation error at a value that the file shows as `found`."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "required key is missing"
        case "extra_forbidden":
            *parent, key = error["loc"]
            return "unknown key" + suggestion(str(key), keys_at(tuple(parent)))
        case "value_error":
            message = str(limits["error"])
            return f"found {found}, {message}" if message.startswith(("expected", "which")) else message
        case "string_type":
            quote = "; quote it" if found.startswith(("the boolean", "the number")) else ""
            return f"found {found}, expected text{quote}"
        case "string_pattern_mismatch":
            return f"found {found}, expected {EXPECTED[limits['pattern']]}"
        case "string_too_long":
            return f"found {len(error['input'])} characters, expected at most {limits['max_length']}"
        case "too_long" | "too_short" as kind:
            limit = f"at most {limits['max_length']}" if kind == "too_long" else f"at least {limits['min_length']}"
            return f"found {len(error['input'])} items, expected {limit}"
        case "greater_than_equal":
            return f"found {found}, expected at least {limits['ge']}"
        case "less_than_equal":
            return f"found {found}, expected at most {limits['le']}"
        case "literal_error":
            expected = str(limits["expected"]).replace("'", "`")
            unsigned = ", which is not a signature" if str(error["input"]).lower() == "none" else ""
            return f"found {found}{unsigned}, expected {expected}"
        case kind:
            return f"found {found}, expected {_KINDS[kind]}"


_KINDS = {
    "string_too_short": "text",
    "int_type": "a whole number",
    "bool_type": "`true` or `false`",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


def json_schema() -> dict[str, Any]:
    """The file format as a JSON Schema (2020-12), for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **File.model_json_schema()}
