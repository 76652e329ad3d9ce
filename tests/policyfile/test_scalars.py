"""Plain words of YAML: read where YAML 1.1 and 1.2 agree, and a mistake where they do not."""

from __future__ import annotations

from math import isfinite
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ext_authz.core.policy import Policy
from ext_authz.policyfile.parse import parse_policy
from ext_authz.policyfile.scalars import plain
from ext_authz.policyfile.source import PolicyError

POLICY = """\
version: 1
tiers: [low]
anonymous: low
experts:
  A: {tier: low, endpoints: ["127.0.0.1:9"], KEY: VALUE}
"""
AGREED: list[tuple[str, Any]] = [
    ("", None),
    ("~", None),
    ("null", None),
    ("true", True),
    ("FALSE", False),
    ("0", 0),
    ("404", 404),
    ("-7", -7),
    ("0x1f", 31),
    ("1.5", 1.5),
    ("1.0e+16", 1e16),
    ("2030-01-31T12:00:00Z", "2030-01-31T12:00:00Z"),
    ("10.0.0.1:80", "10.0.0.1:80"),
    ("expert-a", "expert-a"),
    ("y", "y"),
    ("1a", "1a"),
]
ODD = [
    "yes",
    "No",
    "ON",
    "off",
    "010",
    "+010",
    "0o17",
    "0b101",
    "1:30",
    "1:30:00.5",
    "1_000",
    "1e3",
    "1.",
    ".5",
    "9" * 19,
]
HOSTILE = [
    ("weight", ":".join(["1"] * 175) + ":1.5"),
    ("weight", "0x" + "f" * 3572),
    ("retry_on", "0x" + "f" * 3572),
    ("unavailable", "0x" + "f" * 3572),
    ("weight", "9" * 5000),
    ("weight", "1e999"),
    ("weight", "-1." + "9" * 400 + "e+308"),
    ("weight", ".inf"),
    ("weight", ".nan"),
    ("timeout", ":".join(["59"] * 500)),
]


@pytest.mark.parametrize(("text", "value"), AGREED)
def test_a_word_means_what_both_versions_agree_on(text: str, value: object) -> None:
    found = plain(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", ODD)
def test_a_word_that_the_versions_read_differently_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="quote it"):
        plain(text)


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda v: v[:24])
def test_a_number_that_python_cannot_hold_is_a_mistake_on_its_line(key: str, value: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(POLICY.replace("KEY", key).replace("VALUE", value))
    [mistake] = caught.value.errors
    assert (mistake.line, mistake.path) == (5, f"experts.A.{key}")


@given(st.from_regex(r"[-+]?[0-9._:eExXobfan~]{1,12}", fullmatch=True))
def test_a_word_is_refused_or_read_as_a_yaml_1_1_reader_reads_it(text: str) -> None:
    try:
        found = plain(text)
    except ValueError:
        return
    try:
        [other] = yaml.safe_load(f"- {text}")
    except yaml.YAMLError:  # no plain scalar at all: `policyfile.source` never asks for its meaning
        return
    if isinstance(found, float) and not isfinite(found):
        assert str(found) == str(other)
    elif not isinstance(found, str):
        assert (type(found), found) == (type(other), other)


def test_what_no_check_foresaw_is_a_policy_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps the last good policy on a PolicyError, and would end on anything else."""

    def fails(*_: object) -> Policy:
        raise OverflowError("of a kind that nobody thought of")

    monkeypatch.setattr("ext_authz.policyfile.compile.Compiler.policy", fails)
    with pytest.raises(PolicyError, match="OverflowError"):
        parse_policy(POLICY.replace("KEY", "weight").replace("VALUE", "1"))
