"""Test cases for a policy: each has a caller, what it asks for, and the expected decision.

Format: docs/changing-policy.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ext_authz.core import gate
from ext_authz.core.headers import DOWNGRADE
from ext_authz.core.model import Reason, Request
from ext_authz.core.policy import Policy
from ext_authz.policyfile import schema, values
from ext_authz.policyfile import source as yaml_source
from ext_authz.policyfile.parse import load_policy
from ext_authz.policyfile.source import Mistakes, Source, quoted, suggestion

MAX_CASES = 10_000
PATTERN = "*_test.yaml"

_REASONS = [reason.value for reason in Reason if reason is not Reason.INTERNAL]


def _reason(value: str) -> str:
    if value not in _REASONS:
        raise ValueError("expected a reason code" + suggestion(value, _REASONS))
    return value


def _claims(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("expected claims that JSON can represent, without `.inf` and `.nan`") from None
    return value


def _true(value: bool) -> bool:
    if not value:
        raise ValueError("expected `true`, or `claims` instead")
    return value


Name = Annotated[str, Field(min_length=1, max_length=gate.MAX_NAME_LENGTH)]
Names = Annotated[list[Name], Field(max_length=gate.MAX_NAMES)]
Claims = Annotated[dict[str, Any], AfterValidator(_claims)]


class CaseRequest(schema.Form):
    """A request that goes through the gate."""

    method: Annotated[str, Field(min_length=1, max_length=64)] = "POST"
    path: values.RoutePath
    headers: Annotated[dict[str, str], Field(max_length=100)] = Field(default_factory=dict)
    body: str = ""
    payload: Annotated[Any, Field(alias="json")] = None
    """The body, as a value to serialise as JSON."""

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        if {"body", "payload"} <= self.model_fields_set:
            raise ValueError("at most one of `body` and `json` is allowed, found both")
        return self

    def as_sent(self, extra: Mapping[str, str]) -> Request:
        """The request as Envoy would pass it on, with the `extra` headers."""
        body = json.dumps(self.payload) if "payload" in self.model_fields_set else self.body
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(self.method, self.path, {**headers, **extra}, body.encode())


class Expect(schema.Form):
    """The expected decision. Keys that are left out are not checked."""

    verdict: Literal["allow", "downgrade", "deny"]
    experts: Names = Field(default_factory=list)
    """The candidates, in order."""
    reason: Annotated[str, AfterValidator(_reason)] = ""
    tier: values.TierName = ""
    """The caller's tier."""


class Case(schema.Form):
    """One caller, what it asks for, and the expected decision."""

    name: values.Text
    claims: Claims = Field(default_factory=dict)
    """The claims of the caller's token."""
    anonymous: Annotated[bool, AfterValidator(_true)] = False
    """The caller has no token."""
    experts: Names = Field(default_factory=list)
    """The experts asked for, without going through the gate."""
    request: CaseRequest | None = None
    downgrade: bool = True
    """Whether the client accepts a downgrade."""
    expect: Expect

    @model_validator(mode="after")
    def _one_caller(self) -> Self:
        self._exactly_one("claims", "anonymous")
        self._exactly_one("experts", "request")
        return self

    def gate_request(self) -> Request | None:
        """The request that goes through the gate; None if the case names its experts itself."""
        if self.request is None:
            return None
        extra = {} if self.downgrade else {DOWNGRADE: "never"}
        return self.request.as_sent(extra)


class File(schema.Form):
    """The cases of one policy."""

    policy: values.Text
    """The policy's file, relative to this one."""
    cases: Annotated[list[Case], Field(min_length=1, max_length=MAX_CASES)]


_FORMS: dict[tuple[str, ...], type[schema.Form]] = {
    (): File, ("cases",): Case, ("cases", "request"): CaseRequest, ("cases", "expect"): Expect,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Suite:
    """The cases of one file, and the policy that they test. `lines` are the line numbers of the cases."""

    path: Path
    policy_path: Path
    policy: Policy
    cases: tuple[Case, ...]
    lines: tuple[int, ...]


def find(path: Path) -> list[Path]:
    """The file itself, or all test files below a folder except hidden ones."""
    if not path.is_dir():
        return [path]
    below = (p for p in path.rglob(PATTERN) if p.is_file())
    return sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))


def load(path: Path) -> Suite:
    """The cases in the file at `path`, and their policy. PolicyError if either is invalid."""
    mistakes = Mistakes(str(path))
    source = yaml_source.read(yaml_source.file_bytes(path), mistakes)
    cases = _validated(source, mistakes)
    mistakes.finish()
    policy_path = path.parent / cases.policy
    policy = load_policy(policy_path)
    _check_names(cases, policy, source, mistakes)
    mistakes.finish()
    lines = tuple(source.at(("cases", index))[0] for index in range(len(cases.cases)))
    return Suite(path, policy_path, policy, tuple(cases.cases), lines)


def _validated(source: Source, mistakes: Mistakes) -> File:
    try:
        return File.model_validate(source.data)
    except ValidationError as e:
        errors = e.errors(include_url=False)
    for error in errors:
        path = error["loc"]
        at = source.at(path)
        if error["type"] == "extra_forbidden":
            at = source.places.keys[source.places.find(path)]
        about = path[:-1] if error["type"] == "missing" else path
        if about not in source.places.spoiled:
            mistakes.add(at, path, _explained(error, source.found(path, error["input"])))
    mistakes.finish()
    raise AssertionError("a spoiled value has already been reported")


def _explained(error: ErrorDetails, found: str) -> str:
    if error["type"] != "extra_forbidden":
        return schema.explain(error, found)
    *parent, key = error["loc"]
    form = _FORMS[tuple(str(part) for part in parent if not isinstance(part, int))]
    return "unknown key" + suggestion(str(key), [f.alias or name for name, f in form.model_fields.items()])


def _check_names(file: File, policy: Policy, source: Source, mistakes: Mistakes) -> None:
    """Report names that the policy does not have, and cases with the same name."""
    seen: set[str] = set()
    for index, case in enumerate(file.cases):
        path: yaml_source.Place = ("cases", index)
        if case.name in seen:
            at = (*path, "name")
            mistakes.add(source.at(at), at, f"{quoted(case.name)} is the name of an earlier case")
        seen.add(case.name)
        expect = case.expect
        for number, name in enumerate(expect.experts):
            if name not in policy.experts:
                at = (*path, "expect", "experts", number)
                unknown = f"unknown expert {quoted(name)}{suggestion(name, policy.experts)}"
                mistakes.add(source.at(at), at, unknown)
        if expect.tier and expect.tier not in policy.tiers:
            at = (*path, "expect", "tier")
            unknown = f"unknown tier {quoted(expect.tier)}{suggestion(expect.tier, policy.tiers)}"
            mistakes.add(source.at(at), at, unknown)
