"""The test cases beside a policy: each a caller, what it asks for, and the decision to expect.

Source of the format: docs/changing-policy.md.
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
        raise ValueError("expected claims as JSON can hold them, without `.inf` and `.nan`") from None
    return value


def _true(value: bool) -> bool:
    if not value:
        raise ValueError("expected `true`, or `claims` instead")
    return value


Name = Annotated[str, Field(min_length=1, max_length=gate.MAX_NAME_LENGTH)]
Names = Annotated[list[Name], Field(max_length=gate.MAX_NAMES)]
Claims = Annotated[dict[str, Any], AfterValidator(_claims)]


class Ask(schema.Form):
    """A request that goes through the gate."""

    method: Annotated[str, Field(min_length=1, max_length=64)] = "POST"
    path: values.RoutePath
    headers: Annotated[dict[str, str], Field(max_length=100)] = Field(default_factory=dict)
    body: str = ""
    payload: Annotated[Any, Field(alias="json")] = None
    """The body, as a value to be written as JSON."""

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        if {"body", "payload"} <= self.model_fields_set:
            raise ValueError("at most one of `body` and `json` is allowed, found both")
        return self

    def sent(self, more: Mapping[str, str]) -> Request:
        """As Envoy would show it, with the headers `more`."""
        body = json.dumps(self.payload) if "payload" in self.model_fields_set else self.body
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(self.method, self.path, {**headers, **more}, body.encode())


class Expect(schema.Form):
    """What must come of it; what is left out is not looked at."""

    verdict: Literal["allow", "downgrade", "deny"]
    experts: Names = Field(default_factory=list)
    """The candidates, in order."""
    reason: Annotated[str, AfterValidator(_reason)] = ""
    tier: values.TierName = ""
    """The caller's."""


class Case(schema.Form):
    """One caller, what it asks for, and what it must get."""

    name: values.Text
    claims: Claims = Field(default_factory=dict)
    """Those of the caller's token."""
    anonymous: Annotated[bool, AfterValidator(_true)] = False
    """The caller has no token."""
    experts: Names = Field(default_factory=list)
    """What is asked for, past the gate."""
    request: Ask | None = None
    downgrade: bool = True
    """Whether the client takes a lesser expert."""
    expect: Expect

    @model_validator(mode="after")
    def _one_caller(self) -> Self:
        self._exactly_one("claims", "anonymous")
        self._exactly_one("experts", "request")
        return self

    def asked(self) -> Request | None:
        """The request that goes through the gate, if there is one."""
        if self.request is None:
            return None
        told = {} if self.downgrade else {DOWNGRADE: "never"}
        return self.request.sent(told)


class File(schema.Form):
    """The cases of one policy."""

    policy: values.Text
    """The policy's file, relative to this one."""
    cases: Annotated[list[Case], Field(min_length=1, max_length=MAX_CASES)]


_FORMS: dict[tuple[str, ...], type[schema.Form]] = {
    (): File, ("cases",): Case, ("cases", "request"): Ask, ("cases", "expect"): Expect,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Suite:
    """The cases of one file, with the policy that they are for. `lines` are where the cases stand."""

    path: Path
    policy_path: Path
    policy: Policy
    cases: tuple[Case, ...]
    lines: tuple[int, ...]


def find(path: Path) -> list[Path]:
    """The file itself, or the test files below a folder, hidden ones aside."""
    if not path.is_dir():
        return [path]
    below = (p for p in path.rglob(PATTERN) if p.is_file())
    return sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))


def load(path: Path) -> Suite:
    """The cases in the file at `path`, and their policy; PolicyError if either cannot be used."""
    mistakes = Mistakes(str(path))
    source = yaml_source.read(yaml_source.file_bytes(path), mistakes)
    cases = _validated(source, mistakes)
    mistakes.finish()
    policy_path = path.parent / cases.policy
    policy = load_policy(policy_path)
    _refer(cases, policy, source, mistakes)
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
    raise AssertionError("a spoiled value is a mistake already")


def _explained(error: ErrorDetails, found: str) -> str:
    if error["type"] != "extra_forbidden":
        return schema.explain(error, found)
    *parent, key = error["loc"]
    form = _FORMS[tuple(str(part) for part in parent if not isinstance(part, int))]
    return "unknown key" + suggestion(str(key), [f.alias or name for name, f in form.model_fields.items()])


def _refer(file: File, policy: Policy, source: Source, mistakes: Mistakes) -> None:
    """Names that the policy does not have, and cases of one name."""
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
