"""The header lists of `core.headers` against what is really written, and against the files in envoy/."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ext_authz.core import headers
from ext_authz.core.check import check
from ext_authz.core.model import Outcome, Request
from ext_authz.wire.check import Writer
from ext_authz.wire.lease_filter import settings
from tests.harness import ROOT
from tests.harness.authorization import load_policy, snapshot
from tests.harness.checks import response_of, token

MANAGER = yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())["static_resources"]["listeners"][0]["filter_chains"][
    0
]["filters"][0]["typed_config"]
CLIENTS = {headers.AUTHORIZATION, headers.ACCESS_TOKEN, headers.DOWNGRADE}  # ours that a client may send
MOVED = {headers.TARGET_CLUSTER, headers.REQUESTED_CLUSTER}


def stripped(name: str) -> bool:
    """Whether Envoy removes a client's header of this name before anything reads it."""
    for mutation in MANAGER["early_header_mutation_extensions"][0]["typed_config"]["mutations"]:
        match mutation:
            case {"remove": removed} if removed == name:
                return True
            case {"remove_on_match": {"key_matcher": {"prefix": prefix}}} if name.startswith(prefix):
                return True
            case {"remove_on_match": {"key_matcher": {"safe_regex": {"regex": regex}}}} if re.fullmatch(regex, name):
                return True
    return False


@pytest.fixture
def answer(tmp_path: Any) -> Any:
    """A response with every header: a downgrade with a subject, unknown names and retries on 5xx."""
    policy = load_policy(tmp_path, ("A: {tier: low,", "A: {tier: low, retry_on: 5xx,"))
    request = Request("POST", "/", {"authorization": f"Bearer {token(sub='ada')}", "x-expert-names": "A,nobody"})
    outcome = check(snapshot(policy), request, time.time())
    assert isinstance(outcome, Outcome)
    caller = outcome.caller
    return response_of(Writer(policy).write(outcome.decision, subject=caller.subject, issuer=caller.issuer or ""))


def test_an_answer_sets_the_experts_headers_on_the_list(answer: Any) -> None:
    assert {o.header.key for o in answer.ok_response.headers} == set(headers.TO_EXPERT)


def test_an_answer_gives_client_and_log_the_fields_on_the_list(answer: Any) -> None:
    names = {o.header.key for o in answer.ok_response.response_headers_to_add}
    assert names == {field.header for field in headers.FIELDS if field.header}
    assert set(answer.dynamic_metadata.fields) == {field.name for field in headers.FIELDS}


def test_an_answer_removes_the_headers_on_the_list(answer: Any) -> None:
    assert set(answer.ok_response.headers_to_remove) == set(headers.removed(forward_token=False))


def test_the_lease_filter_gets_the_lists(tmp_path: Any) -> None:
    text = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1])), settings(load_policy(tmp_path), "epoch"))
    for name in (*headers.TO_EXPERT, *headers.READ_BY_EVERY_DECISION, *(field.name for field in headers.FIELDS)):
        assert f'"{name}"' in text


def test_envoy_strips_from_requests_what_only_srp_may_set() -> None:
    ours = {*headers.TO_EXPERT, *(field.header for field in headers.FIELDS if field.header)}
    ours |= {headers.EXPERT, headers.ATTEMPTS, headers.REQUESTED_CLUSTER}
    assert not [name for name in ours if not stripped(name)]
    assert not [name for name in CLIENTS if stripped(name)]


@given(st.text("x-srpdownga.0", max_size=24) | st.sampled_from([headers.DOWNGRADE[:n] for n in range(16)]))
def test_envoy_strips_every_name_with_our_prefix_but_the_one_that_a_client_may_send(rest: str) -> None:
    """Even those that do not exist yet."""
    for name in (f"x-srp-{rest}", f"{headers.DOWNGRADE}{rest}", rest):
        ours = name.startswith("x-srp-") and name != headers.DOWNGRADE
        assert stripped(name) is (ours or name.startswith("x-envoy-") or name in MOVED)


def test_envoy_lets_ext_authz_change_the_headers_it_changes_and_no_others() -> None:
    [ext_authz] = [f for f in MANAGER["http_filters"] if f["name"] == "envoy.filters.http.ext_authz"]
    allowed = ext_authz["typed_config"]["decoder_header_mutation_rules"]["allow_expression"]["regex"]
    changed = {*headers.TO_EXPERT, *headers.removed(forward_token=False)}
    assert all(re.fullmatch(allowed, name) for name in changed)
    assert not any(
        re.fullmatch(allowed, name) for name in ("host", ":path", "content-length", headers.EXPERT, "cookie")
    )


def test_envoy_does_not_send_the_headers_that_neither_gates_nor_conditions_may_read() -> None:
    [ext_authz] = [f for f in MANAGER["http_filters"] if f["name"] == "envoy.filters.http.ext_authz"]
    patterns = ext_authz["typed_config"]["disallowed_headers"]["patterns"]
    expected = [*({"exact": name} for name in headers.NOT_SENT), {"prefix": ":"}, {"prefix": "x-b3-"}]
    assert sorted(map(str, patterns)) == sorted(map(str, expected))


def test_the_route_script_uses_the_names_on_the_list() -> None:
    used = set(re.findall(r'"(x-[a-z-]+)"', (ROOT / "envoy/least_request.lua").read_text()))
    assert used == {headers.TARGET_CLUSTER, headers.EXPERT, *headers.DEPENDS_ON_WHO_ANSWERS}
