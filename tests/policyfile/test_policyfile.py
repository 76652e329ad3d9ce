"""The policy file: every mistake with its place, what a good file means, its schema and its documentation."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ext_authz.core.policy import Body, Endpoint, GateRule, Header, Health, JwksSource, Outlier, Policy, Traffic
from ext_authz.policyfile import schema as policy_schema
from ext_authz.policyfile import source as policy_source
from ext_authz.policyfile import values as policy_values
from ext_authz.policyfile.parse import load_policy, parse_policy
from ext_authz.policyfile.schema import json_schema
from ext_authz.policyfile.source import PolicyError
from ext_authz.policyfile.warnings import dropped, key_warnings, warnings
from tests.harness import ROOT, tokens
from tests.harness.policies import BROKEN_KEYS, DEMO, SMALL, policy, text, write_keys

FIXTURES = Path(__file__).parent / "broken"
ODD_BOOLEAN = "is a boolean in YAML 1.1 and text in YAML 1.2; write `true` or `false`, or quote it"
ODD_NUMBER = "is a number that YAML readers take differently, or too long; write it plainly, or quote it"
DOCS = ROOT / "docs" / "policy.md"
ISSUER = {"issuer": "https://idp.example.com/", "audiences": ["moe"], "algorithms": ["ES256"]}


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key files that these tests' policies name."""
    directory = tmp_path_factory.mktemp("keys")
    write_keys(directory)
    (directory / "not-json.json").write_text("keys: []")
    (directory / "short-secret").write_text("0123456789")
    return directory


def mistakes(source: str | bytes, base: Path = Path()) -> list[str]:
    """The lines of the error in `source`, without the file's name; no lines if it is good."""
    try:
        parse_policy(source, base=base)
    except PolicyError as e:
        return [line.removeprefix("policy.yaml:") for line in str(e).splitlines()]
    return []


# ---- mistakes --------------------------------------------------------------------------------------------------------

ENDPOINT = "expected `host:port`: an IP address ([v6] in brackets) or a DNS name, and a port from 1 to 65535"
ALGORITHM = (
    "expected `RS256`, `RS384`, `RS512`, `PS256`, `PS384`, "
    "`PS512`, `ES256`, `ES384`, `ES512`, `EdDSA`, `HS256`, `HS384` or `HS512`"
)
BROKEN = {
    "algorithm_es_with_secret": "4:5: issuers[0]: algorithm `ES256` needs `jwks`",
    "algorithm_hs_with_jwks": "4:5: issuers[0]: algorithm `HS256` needs `secret_file`",
    "algorithm_none": f"6:25: issuers[0].algorithms[1]: found `none`, which is not a signature, {ALGORITHM}",
    "algorithm_twice": "6:25: issuers[0].algorithms[1]: `ES256` is listed twice",
    "algorithm_unknown": f"6:18: issuers[0].algorithms[0]: found `ES255`, {ALGORITHM}",
    "alias": (
        "4:6: experts.A: anchor `&a` is not supported; remove it\n"
        "5:6: experts.B: alias `*a` is not supported; write the value out"
    ),
    "allow_boolean": "4:53: experts.A.allow: found the boolean `true`, expected text; quote it",
    "allow_empty": "4:46: experts.A.allow: found nothing, expected text",
    "anchor": "3:12: anonymous: anchor `&lowest` is not supported; remove it",
    "boolean_key": f"5:3: experts: `on` {ODD_BOOLEAN}",
    "byte_order_mark": "1:1: a byte order mark is not allowed",
    "clearance_reads_request": (
        "4:11: clearance[0].when: not a condition: `request` cannot be read here; this condition reads `claims`"
    ),
    "cluster_bad_name": (
        "4:27: experts.A.cluster: found `Expert_A`, expected a cluster's name: lower-case letters, digits "
        "and `-` between them"
    ),
    "cluster_not_derivable": (
        "4:3: experts.llama3:8b.cluster: required key is missing: the name `llama3:8b` cannot become a cluster name"
    ),
    "cluster_of_other_name": "4:3: experts.A.cluster: cluster `a` is the name of another expert",
    "cluster_reserved": "4:27: experts.A.cluster: found `none`, which is reserved, expected another name",
    "cluster_twice": "5:27: experts.B.cluster: cluster `expert-a` already belongs to expert `A`",
    "colon_without_quotes": "3:15: not valid YAML: mapping values are not allowed in this context",
    "condition_syntax": (
        "4:12: clearance[0].when: not a condition: cannot read `=` (at character 13)"
    ),
    "condition_unknown_function": "4:12: clearance[0].when: not a condition: unknown function `lower`",
    "condition_unknown_variable": (
        "4:12: clearance[0].when: not a condition: unknown variable `claim`; a condition reads `claims`"
    ),
    "control_character": "3:12: the character U+0007 is not allowed",
    "directive": "1:1: a YAML directive is not supported",
    "downgrade_to_itself": "4:61: experts.A.downgrade_to[0]: expert `A` cannot stand in for itself",
    "downgrade_twice": "5:64: experts.B.downgrade_to[1]: `A` is listed twice",
    "downgrade_upwards": "4:61: experts.A.downgrade_to[0]: expert `C` needs tier `high`, above `low`",
    "duplicate_expert": "6:3: experts.A: duplicate key; the first is in line 4",
    "duplicate_key": "4:1: anonymous: duplicate key; the first is in line 3",
    "duration_too_long": "3:9: leeway: found `10m`, expected a duration from 0 to 5m",
    "duration_without_unit": "3:9: leeway: found the number `30`, expected a duration such as `30s` (ms, s, m, h)",
    "empty_file": "1:1: the file is empty, expected a mapping",
    "endpoint_bad_address": f"4:30: experts.A.endpoints[0]: found `10.0.0.256:8001`, {ENDPOINT}",
    "endpoint_bare_v6": f"4:30: experts.A.endpoints[0]: found `::1:8001`, {ENDPOINT}",
    "endpoint_port_too_high": f"4:30: experts.A.endpoints[0]: found `expert-a:65536`, {ENDPOINT}",
    "endpoint_twice": "4:61: experts.A.endpoints[2]: `[::1]:8001` is listed twice",
    "endpoint_url": f"4:30: experts.A.endpoints[0]: found `http://expert-a:8001`, {ENDPOINT}",
    "endpoint_without_port": f"4:30: experts.A.endpoints[0]: found `expert-a`, {ENDPOINT}",
    "expert_name_too_long": (
        "4:3: experts.xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...: found 65 "
        "characters, expected at most 64"
    ),
    "expert_name_with_comma": (
        "4:3: experts.A,B: found `A,B`, expected an expert's name: letters, digits and `_.:/-`, a letter "
        "or digit first"
    ),
    "experts_as_list": "3:1: experts: found a list, expected a mapping",
    "experts_empty_value": "3:1: experts: found nothing, expected a mapping",
    "forward_token_text": "3:16: forward_token: found `yes`, expected `true` or `false`",
    "gate_bad_pointer": "4:23: gate[0].json: found `model`, expected a JSON pointer (RFC 6901) such as `/model`",
    "gate_bad_pointer_escape": "4:23: gate[0].json: found `/a~2b`, expected a JSON pointer (RFC 6901) such as `/model`",
    "gate_default_empty": "4:41: gate[0].default: found 0 items, expected at least 1",
    "gate_default_twice": "4:30: gate[0].default[1]: `A` is listed twice",
    "gate_identity_header": (
        "4:25: gate[0].header: found `x-srp-tier`, which cannot name experts, expected a header such as "
        "`x-expert-names`"
    ),
    "gate_json_and_header": "4:5: gate[0]: at most one of `json` and `header` is allowed, found both",
    "gate_names_nobody": "4:5: gate[0]: names no expert: `json`, `header` or `default` is needed",
    "gate_path_and_prefix": "4:5: gate[0]: exactly one of `path` and `prefix` is needed, found both",
    "gate_path_not_normalized": (
        "4:14: gate[0].prefix: found `/v1//chat`, expected a path as Envoy normalizes it, without `//`, "
        "`/./` and `/../`"
    ),
    "gate_path_with_query": (
        "4:12: gate[0].path: found `/route?x=1`, expected a path that starts with `/`, without query"
    ),
    "gate_pseudo_header": "4:25: gate[0].header: found `:path`, expected a header's name in lower case, without `_`",
    "gate_relative_path": "4:12: gate[0].path: found `route`, expected a path that starts with `/`, without query",
    "gate_requested_cluster": (
        "4:25: gate[0].header: found `x-requested-cluster`, expected `x-target-cluster`, as the client sends it"
    ),
    "gate_token_header": (
        "4:25: gate[0].header: found `authorization`, which cannot name experts, expected a header such as "
        "`x-expert-names`"
    ),
    "gate_unsent_header": (
        "4:25: gate[0].header: found `traceparent`, which cannot name experts, expected a header such as "
        "`x-expert-names`"
    ),
    "gate_unknown_default": "4:30: gate[0].default[1]: unknown expert `B`; expected `A`",
    "gate_unreachable": "5:5: gate[1]: never reached: gate[0] covers `/v1/chat` before it",
    "gate_upper_case_header": (
        "4:25: gate[0].header: found `X-Expert-Names`, expected a header's name in lower case, without `_`"
    ),
    "gate_without_path": "4:5: gate[0]: exactly one of `path` and `prefix` is needed, found neither",
    "health_true": "4:54: experts.A.health: found the boolean `true`, expected a mapping or `false`",
    "issued_before_date": (
        "3:26: revoked.issued_before: found `2030-01-31`, expected an RFC 3339 time such as "
        "`2030-01-31T12:00:00Z`, or `null`"
    ),
    "issuer_empty": "4:5: issuers[0].issuer: found nothing, expected text without control characters",
    "issuer_twice": "8:13: issuers[1].issuer: issuer `https://idp.example.com/` is defined twice",
    "issuer_with_both_keys": "4:5: issuers[0]: exactly one of `jwks` and `secret_file` is needed, found both",
    "issuer_without_audience": "5:5: issuers[0].audiences: found 0 items, expected at least 1",
    "issuer_without_keys": "4:5: issuers[0]: exactly one of `jwks` and `secret_file` is needed, found neither",
    "jwks_as_text": "7:11: issuers[0].jwks: found `jwks.json`, expected a mapping",
    "jwks_empty": "7:5: issuers[0].jwks: exactly one of `url` and `file` is needed, found neither",
    "jwks_file_is_a_folder": "7:18: issuers[0].jwks.file: `.`: is not a file",
    "jwks_file_missing": "7:18: issuers[0].jwks.file: `no-such-file.json`: no such file",
    "jwks_file_not_json": "7:18: issuers[0].jwks.file: `not-json.json`: is not JSON: Expecting value at character 0",
    "jwks_file_other_algorithm": "7:18: issuers[0].jwks.file: `jwks.json`: holds no key for `PS256` or `RS256`",
    "jwks_file_private": (
        "7:18: issuers[0].jwks.file: `private.json`: keys[0] (kid 'test'): holds the private member d: "
        "publish public keys only, and replace this one"
    ),
    "jwks_file_with_refresh": "7:5: issuers[0].jwks: `refresh` is for a `url`, found a `file`",
    "jwks_plain_http": (
        "7:17: issuers[0].jwks.url: found `http://idp.example.com/jwks.json`, expected https; http is for "
        "a loopback host only"
    ),
    "jwks_refresh_too_short": "7:61: issuers[0].jwks.refresh: found `1s`, expected a duration from 10s to 24h",
    "jwks_url_and_file": "7:5: issuers[0].jwks: exactly one of `url` and `file` is needed, found both",
    "jwks_url_with_user": "7:17: issuers[0].jwks.url: a user or password in a URL is not supported",
    "jwks_url_without_scheme": (
        "7:17: issuers[0].jwks.url: found `idp.example.com/jwks.json`, expected a URL such as "
        "`https://idp.example.com/jwks.json`"
    ),
    "line_separator": "3:4: the character U+2028 is not allowed",
    "list_as_key": "3:3: found a list as a key, expected text",
    "log_claims_twice": "3:24: log_claims[2]: `org` is listed twice",
    "many_mistakes": (
        f"2:20: tiers[2]: `no` {ODD_BOOLEAN}\n"
        "3:12: anonymous: unknown tier `lo`; did you mean `low`?\n"
        "5:5: clearance[0].tier: required key is missing\n"
        "5:40: clearance[0].tire: unknown key; did you mean `tier`?\n"
        "6:12: clearance[1].when: not a condition: ends too early (at character 15)\n"
        "6:36: clearance[1].tier: unknown tier `highest`; did you mean `high`?\n"
        "8:61: experts.A.wieght: unknown key; did you mean `weight`?\n"
        f"9:30: experts.B.endpoints[0]: found `expert-b`, {ENDPOINT}\n"
        "10:65: experts.C.downgrade_to[1]: unknown expert `Z`; expected `A`, `B` or `C`\n"
        "10:76: experts.C.allow: not a condition: unknown variable `clams`; a condition reads `claims` and "
        "`request`\n"
        "12:54: gate[0].default[1]: unknown expert `D`; expected `A`, `B` or `C`\n"
        "13:5: gate[1]: never reached: gate[0] covers `/route` before it"
    ),
    "merge_key": "5:5: experts.A: merge key `<<` is not supported; write the keys out",
    "missing_tier_of_expert": "4:3: experts.A.tier: required key is missing",
    "missing_tiers": "1:1: tiers: required key is missing",
    "missing_version": "1:1: version: required key is missing",
    "no_endpoints": "4:18: experts.A.endpoints: found 0 items, expected at least 1",
    "no_experts": "3:1: experts: found 0 items, expected at least 1",
    "no_tiers": "2:1: tiers: found 0 items, expected at least 1",
    "not_a_mapping": "1:1: found a list, expected a mapping",
    "not_utf8": "3:20: byte 0xfc is not UTF-8",
    "not_yaml": "4:43: not valid YAML: did not find expected ',' or ']', while parsing a flow sequence",
    "number_key": "4:3: experts: found the number `7` as a key, expected text; quote it",
    "python_tag": "3:12: anonymous: tag `!!python/object/apply:os.system` is not supported; remove it",
    "retry_on_unknown": "4:56: experts.A.retry_on: found `always`, expected `safe` or `5xx`",
    "revoked_sub_number": "3:24: revoked.sub[1]: found the number `4711`, expected text; quote it",
    "scalar_document": "1:1: found `allow everything`, expected a mapping",
    "secret_file_is_a_key": (
        "7:18: issuers[0].secret_file: `jwks.json`: is a public key, certificate or JWK, not a secret"
    ),
    "secret_file_missing": "7:18: issuers[0].secret_file: `no-such-file`: no such file",
    "secret_file_short": (
        "7:18: issuers[0].secret_file: `short-secret`: the secret has 10 bytes, at least 32 are needed"
    ),
    "secret_too_short_for_hs512": "7:18: issuers[0].secret_file: `secret`: the secret is too short for `HS512`",
    "tab_before_token": (
        "3:13: not valid YAML: found character that cannot start any token, while scanning for the next token"
    ),
    "tab_indentation": "4:1: a tab in the indentation; use spaces",
    "tag": "3:12: anonymous: tag `!!str` is not supported; remove it",
    "tier_boolean": f"2:9: tiers[0]: `no` {ODD_BOOLEAN}",
    "tier_named_deny": "2:14: tiers[1]: found `deny`, which is reserved, expected another name",
    "tier_twice": "2:20: tiers[2]: `low` is listed twice",
    "tier_with_space": (
        "2:14: tiers[1]: found `very high`, expected a tier's name: letters, digits and `_.-`, a letter or "
        "digit first"
    ),
    "tiers_as_text": "2:8: tiers: found `low, high`, expected a list",
    "too_deep": "3:27: nested more than 16 deep",
    "too_many_tiers": "2:1: tiers: found 33 items, expected at most 32",
    "two_documents": "5:1: a second document; a policy is one document",
    "unknown_downgrade": "5:67: experts.writer.downgrade_to[0]: unknown expert `codr`; did you mean `coder`?",
    "unknown_expert_key": "5:5: experts.A.teir: unknown key; did you mean `tier`?",
    "unknown_health_key": "7:14: experts.A.health.url: unknown key; expected `path` or `interval`",
    "unknown_key": "3:1: clearence: unknown key; did you mean `clearance`?",
    "unknown_tier": "4:13: experts.A.tier: unknown tier `hihg`; did you mean `high`?",
    "unknown_tier_of_anonymous": "3:12: anonymous: unknown tier `lowest`; did you mean `low`?",
    "unknown_tier_of_clearance": "4:46: clearance[0].tier: unknown tier `gold`; expected `low` or `high`",
    "utf16": "1:1: byte 0xff is not UTF-8",
    "version_text": "1:10: version: found `1`, expected the number 1",
    "version_two": "1:10: version: found the number `2`, expected the number 1",
    "weight_fraction": "4:54: experts.A.weight: found the number `1.5`, expected a whole number",
    "weight_too_high": "4:54: experts.A.weight: found the number `1001`, expected at most 1000",
    "weight_zero": "4:54: experts.A.weight: found the number `0`, expected at least 1",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_mistake_is_reported_with_its_place(name: str, keys: Path) -> None:
    """Each fixture contains the mistake of its name; the message says what was found and what was expected."""
    assert mistakes((FIXTURES / f"{name}.yaml").read_bytes(), keys) == BROKEN[name].splitlines()


def test_every_fixture_is_in_the_table() -> None:
    """Otherwise nothing would test it."""
    assert {path.stem for path in FIXTURES.iterdir()} == set(BROKEN)


def test_without_key_files_a_policy_has_only_its_own_mistakes(keys: Path) -> None:
    """As the server reads it: it gets the keys elsewhere, and a revocation must not wait for a key file."""
    accepted = set()
    for name in BROKEN:
        with contextlib.suppress(PolicyError):
            parse_policy((FIXTURES / f"{name}.yaml").read_bytes(), base=keys, key_files=False)
            accepted.add(name)
    assert accepted == BROKEN_KEYS


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_messages_follow_one_style(name: str) -> None:
    """Lower case, no final period, one line."""
    for line in BROKEN[name].splitlines():
        _, _, message = line.split(": ", 1)[1].rpartition(": ") if line.count(": ") > 1 else ("", "", line)
        assert not message.endswith(".")
        assert not re.match(r"(\d+:\d+: )?[A-Z]", line)


HOSTILE: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "oversize": (lambda: b"#" * (policy_source.MAX_BYTES + 1), "1:1: the file is over 8388608 bytes long"),
    "values": (lambda: "[" + "a," * 600_000 + "]", "1:1000000: over 500000 values in one file"),
    "lists": (lambda: "[" * 100_000, "1:17: nested more than 16 deep"),
    "mappings": (lambda: "{a: " * 100_000, "1:65: nested more than 16 deep"),
    "blocks": (lambda: "- " * 100_000, "1:33: nested more than 16 deep"),
    "keys": (lambda: "? " * 100_000, "1:33: nested more than 16 deep"),
    "billion laughs": (
        lambda: (
            "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        ),
        "1:4: a: anchor `&a` is not supported; remove it",
    ),
    "long number": (
        lambda: text(leeway="@").replace('"@"', "9" * 100_000),
        f"37:12: leeway: `{'9' * 64}...` {ODD_NUMBER}",
    ),
    "long word": (
        lambda: text(**{"x" * 1000: 1}),
        f"37:2: {'x' * 64}...: unknown key",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str) -> None:
    """Too big, too deep, too clever: each is a mistake like any other, without RecursionError or long work."""
    make, expected = HOSTILE[name]
    assert expected in mistakes(make())


def test_a_flood_of_mistakes_is_shortened() -> None:
    """Of many, a hundred are listed; the last line says that there are more."""
    experts = {f"E{i}": {"tier": "lwo", "endpoints": ["e:1"], "downgrade_to": ["nobody"]} for i in range(5000)}
    found = mistakes(text(experts=experts))
    assert len(found) == policy_source.MAX_MISTAKES + 1
    assert found[0].endswith("experts.E0.tier: unknown tier `lwo`; did you mean `low`?")
    assert found[-1].endswith(": too many mistakes to list them all")


def test_a_file_that_cannot_be_read_is_a_policy_error(tmp_path: Path) -> None:
    missing = tmp_path / "policy.yaml"
    with pytest.raises(PolicyError, match=re.escape(f"{missing}:1:1: cannot be read: No such file or directory")):
        load_policy(missing)
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        load_policy(tmp_path)


def test_input_in_a_message_cannot_break_its_line() -> None:
    """A log shows one line per mistake, whatever is in the file."""
    [line] = mistakes(text(**{"a\nb\u202e\u0007": 1}))
    assert line == "37:2: a\\nb\\u202e\\x07: unknown key"


# ---- good files ------------------------------------------------------------------------------------------------------


def test_the_demo_policy_loads(keys: Path) -> None:
    """With every part of the file."""
    source = DEMO.format(
        issuer="https://idp.example.com/",
        audience="moe",
        jwks="jwks.json",
        a="127.0.0.1:1",
        b="b:2, '[::1]:3'",
        c="c:4",
    )
    found = parse_policy(source, base=keys)
    assert found.tiers == ("low", "high")
    assert found.anonymous == 0
    [issuer] = found.issuers.values()
    assert issuer.audiences == {"moe"}
    assert issuer.algorithms == {"ES256", "RS256"}
    assert issuer.jwks == JwksSource(file=str(keys / "jwks.json"))
    [rule] = found.clearance
    assert (rule.tier, rule.when.where, rule.when.line) == (1, "clearance[0].when", 10)
    assert list(found.experts) == ["A", "B", "C"]
    assert [e.tier for e in found.experts.values()] == [0, 0, 1]
    assert [e.line for e in found.experts.values()] == [12, 13, 14]
    assert found.experts["B"].endpoints == (Endpoint("b", 2), Endpoint("::1", 3))
    assert found.experts["A"].traffic == Traffic()
    assert found.clusters == {"expert-a": "A", "expert-b": "B", "expert-c": "C"}
    assert found.gate == (
        GateRule("/route", exact=True, source=Body(("expert_names",)), default=("A", "B"), line=16),
        GateRule("/v1/", exact=False, source=Body(("model",)), line=17),
        GateRule("/", exact=False, source=Header("x-expert-names"), line=18),
    )
    assert not found.reads_request
    assert warnings(found) == []


def test_the_smallest_policy_loads() -> None:
    """And what is left out is closed by default."""
    found = parse_policy("version: 1\ntiers: [only]\nexperts:\n  My_Expert: {tier: only, endpoints: [e:1]}\n")
    assert found.anonymous is None
    assert found.gate == (GateRule("/", exact=False, source=Header("x-expert-names")),)
    assert found.experts["My_Expert"].cluster == "my-expert"
    assert (found.leeway, found.forward_token, found.log_claims) == (30.0, False, ())
    assert (found.lease, found.experts["My_Expert"].lease) == (30.0, None)
    assert not found.issuers
    assert not found.clearance


@pytest.mark.parametrize(
    ("allow", "header"),
    [
        ('!("content-length" in request.headers)', "content-length"),
        ("!has(request.headers.traceparent)", "traceparent"),
        ('request.headers["x-request-id"] != ""', "x-request-id"),
        ('request["headers"]["authorization"] != ""', "authorization"),
        ("request.headers['x-b3-traceid'] == 'x'", "x-b3-traceid"),
        ('request.method == "GET" && "baggage" in claims.scopes', None),
        ('request.headers["x-team"] == "traceparent"', None),
    ],
)
def test_a_condition_on_a_header_that_is_never_there_is_refused(allow: str, header: str | None) -> None:
    """It would be true, or false, whatever the client sends."""
    experts = {"A": {"tier": "low", "endpoints": ["a:1"], "allow": allow}}
    if header is None:
        assert policy(experts=experts).reads_request
        return
    with pytest.raises(PolicyError, match=f"reads header `{header}`, which conditions never see"):
        policy(experts=experts)


@pytest.mark.parametrize(
    ("when", "allow", "read"),
    [
        ('claims.plan == "x"', 'claims.org == "y" && request.method == "GET"', {"plan", "org"}),
        ("true", None, set()),
        ("size(claims) > 3", 'claims.org == "y"', None),
        ('claims.plan == "x"', 'claims[request.method] == "y"', None),
    ],
)
def test_a_policy_knows_the_claims_that_its_conditions_read(
    when: str, allow: str | None, read: set[str] | None
) -> None:
    """Together; None, for any claim, if a single condition may read any."""
    entry = {"tier": "low", "endpoints": ["a:1"], **({"allow": allow} if allow else {})}
    assert policy(experts={"A": entry}, clearance=[{"when": when, "tier": "low"}]).claims_read == read


def test_every_key_of_an_expert_has_its_effect() -> None:
    """The traffic keys are keys of the expert itself."""
    entry = {
        "tier": "high", "cluster": "c1", "endpoints": ["c:1"], "weight": 1000, "downgrade_to": ["A"],
        "allow": 'request.method == "GET"', "max_requests": 1, "max_pending": 2, "timeout": 0,
        "connect_timeout": "200ms", "retries": 0, "retry_on": "5xx", "health": False,
        "outlier": {"consecutive_5xx": 3, "base_ejection": "1m"}, "slow_start": "1h",
        "lease": 0,
    }  # fmt: skip
    found = policy(experts={**SMALL["experts"], "C": entry}, lease="5m")
    expert = found.experts["C"]
    assert expert.traffic == Traffic(1, 2, 0.0, 0.2, 0, "5xx", None, Outlier(3, 60.0), 3600.0)
    assert (expert.weight, expert.downgrade_to, expert.cluster) == (1000, ("A",), "c1")
    assert (found.lease, expert.lease, found.experts["A"].lease) == (300.0, 0.0, None)
    assert expert.allow is not None
    assert expert.allow.where == "experts.C.allow"
    assert found.reads_request
    checked = policy(
        experts={"A": {"tier": "low", "endpoints": ["a:1"], "health": {"interval": "2s"}, "outlier": False}}
    )
    assert checked.experts["A"].traffic == Traffic(health=Health("/healthz", 2.0), outlier=None)


def test_every_key_of_an_issuer_has_its_effect(keys: Path) -> None:
    """Keys by URL, by file and as a secret; relative paths start at the policy's folder."""
    remote = {"url": "https://idp.example.com/j", "refresh": "10s", "ca_file": "/etc/ca.pem", "bearer_token_file": "t"}
    found = policy(
        base=keys,
        issuers=[
            ISSUER | {"jwks": remote},
            ISSUER | {"issuer": "local", "jwks": {"url": "http://127.0.0.1:8080/jwks"}},
            ISSUER | {"issuer": "shared", "algorithms": ["HS256"], "secret_file": "secret"},
        ],
    )
    assert found.issuers["https://idp.example.com/"].jwks == JwksSource(
        url="https://idp.example.com/j", refresh=10.0, ca_file="/etc/ca.pem", bearer_token_file=str(keys / "t")
    )
    assert found.issuers["local"].jwks == JwksSource(url="http://127.0.0.1:8080/jwks")
    assert found.issuers["shared"].secret_file == str(keys / "secret")
    assert found.issuers["shared"].jwks is None


def test_revocations_and_logged_claims_are_read() -> None:
    """A time may be unquoted, though YAML has a type for it."""
    found = parse_policy(
        text(log_claims=["org"])[:-2] + ',\n "revoked": {jti: [j1], sub: [s1], issued_before: 2030-01-31T12:00:00Z}}'
    )
    assert found.revoked.jti == {"j1"}
    assert found.revoked.sub == {"s1"}
    assert found.revoked.issued_before == 1896091200.0
    assert found.log_claims == ("org",)
    assert policy(revoked={"issued_before": None}).revoked.issued_before is None


def test_a_gate_on_x_target_cluster_reads_where_envoy_keeps_it() -> None:
    """Envoy moves the client's own `x-target-cluster` to `x-requested-cluster`."""
    [rule] = policy(gate=[{"prefix": "/", "header": "x-target-cluster"}]).gate
    assert rule.source == Header("x-requested-cluster")


def test_a_gate_may_go_from_special_rules_to_general_ones() -> None:
    """An exact path, a longer prefix, then the rest; an exact path covers only itself."""
    rules = [{"path": "/v1"}, {"prefix": "/v1/chat"}, {"prefix": "/v1"}, {"prefix": "/"}]
    assert len(policy(gate=[rule | {"default": ["A"]} for rule in rules]).gate) == 4


def test_a_policy_cannot_be_changed() -> None:
    """Nor can its mappings: one snapshot serves many requests."""
    found = policy()
    for mapping in (found.experts, found.clusters, found.issuers):
        with pytest.raises(TypeError):
            mapping["Z"] = None  # type: ignore[index]


def test_the_digest_is_that_of_sha256sum() -> None:
    """So an operator can compare the policy in force with a file."""
    source = b"version: 1\ntiers: [low]\nexperts: {A: {tier: low, endpoints: [a:1]}}\n"
    assert parse_policy(source).digest == parse_policy(source.decode()).digest == "9e33020516ef"


def test_windows_line_ends_and_comments_do_not_change_the_meaning() -> None:
    """Nor the line numbers."""
    source = "# policy\nversion: 1\ntiers: [low]\n\nexperts:\n  A: {tier: low, endpoints: [a:1]}  # the one\n"
    assert parse_policy(source.replace("\n", "\r\n")).experts["A"].line == parse_policy(source).experts["A"].line == 6


def test_ten_thousand_experts_load() -> None:
    """And one more is a mistake; line numbers are right to the last line."""
    lines = ["version: 1", "tiers: [low, high]", "clearance:"]
    lines += [f"  - {{when: 'claims.plan == \"p{i}\"', tier: high}}" for i in range(1000)]
    lines += ["experts:"]
    lines += [f"  E{i}: {{tier: high, endpoints: ['e{i}:8001'], allow: 'claims.n == {i}'}}" for i in range(10_000)]
    found = parse_policy("\n".join(lines))
    assert len(found.experts) == policy_schema.MAX_EXPERTS
    assert len(found.clearance) == policy_schema.MAX_CLEARANCE
    assert found.experts["E9999"].line == len(lines)
    assert mistakes("\n".join([*lines, "  more: {tier: low, endpoints: [e:1]}"])) == [
        "1004:1: experts: found 10001 items, expected at most 10000"
    ]


# ---- single values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("0", 0.0), (0, 0.0), ("200ms", 0.2), ("0s", 0.0), ("30s", 30.0), ("5m", 300.0), ("1h", 3600.0)],
)
def test_a_duration_is_a_number_and_a_unit_or_0(written: object, seconds: float) -> None:
    assert policy_values.duration(written, 0, 3600) == seconds


@pytest.mark.parametrize(
    "written", ["", "s", "1", "-1s", "1.5s", "1m30s", "1d", " 1s", "1s\n", "1 s", "\u0661s", 1, 0.0, False, None]
)
def test_any_other_duration_is_refused(written: object) -> None:
    """A missing unit, a sign, a fraction, a sum."""
    with pytest.raises(ValueError, match="expected a duration"):
        policy_values.duration(written, 0, 3600)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.2, 1.0, 90.0, 300.0, 3600.0, 5400.0, 86400.0])
def test_a_spelled_duration_reads_back(seconds: float) -> None:
    """What a message suggests is accepted in a file."""
    assert policy_values.duration(policy_values.spelled(seconds), 0, 86400) == seconds


@pytest.mark.parametrize(
    ("written", "host", "port"),
    [
        ("expert-a:8001", "expert-a", 8001),
        ("10.0.0.1:1", "10.0.0.1", 1),
        ("[::1]:65535", "::1", 65535),
        ("[2001:DB8:0:0::1]:443", "2001:db8::1", 443),
        ("Expert-A.ns.svc.cluster.local:80", "expert-a.ns.svc.cluster.local", 80),
        ("a:08001", "a", 8001),
    ],
)
def test_an_endpoint_is_an_address_or_a_name_and_a_port(written: str, host: str, port: int) -> None:
    """As Envoy takes it."""
    assert policy_values.endpoint(written) == Endpoint(host, port)
    assert policy_values.endpoint(policy_values.address(Endpoint(host, port))) == Endpoint(host, port)


@pytest.mark.parametrize(
    "written",
    [
        "", "a", ":1", "a:", "a:0", "a:65536", "a:1:2", "::1:80", "[a]:1", "[10.0.0.1]:1", "[::1%eth0]:1", "1.2.3:1",
        "256.0.0.1:1", "01.2.3.4:1", "1.2.3.4.5:1", "a_b:1", "-a:1", "a-:1", "a..b:1", ".a:1", "a b:1", "a:1\n",
        "http://a:1", "a" * 64 + ":1", "a." * 127 + "b:1", "a:\u0661", 8001, None,
    ],
)  # fmt: skip
def test_any_other_endpoint_is_refused(written: object) -> None:
    """What Envoy would look up in vain, and what could be read in two ways."""
    with pytest.raises(ValueError, match="expected `host:port`"):
        policy_values.endpoint(written)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("1970-01-01t00:00:01.5z", 1.5),
        ("1970-01-01T02:00:00+02:00", 0.0),
        ("1969-12-31T23:59:59-00:00", -1.0),
        (None, None),
    ],
)
def test_a_time_is_rfc_3339_with_an_offset(written: str | None, seconds: float | None) -> None:
    assert policy_values.instant(written) == seconds


@pytest.mark.parametrize(
    "written",
    [
        "",
        "2030-01-31",
        "2030-01-31T12:00:00",
        "2030-02-30T12:00:00Z",
        "2030-01-31 12:00:00Z",
        "0000-01-01T00:00:00Z",
        0,
    ],
)
def test_any_other_time_is_refused(written: object) -> None:
    """Without an offset, a time is ambiguous."""
    with pytest.raises(ValueError, match="expected an RFC 3339 time"):
        policy_values.instant(written)


@pytest.mark.parametrize(
    ("pointer", "tokens"),
    [
        ("/model", ("model",)),
        ("/a/b", ("a", "b")),
        ("/", ("",)),
        ("//x", ("", "x")),
        ("/a~1b/m~0n", ("a/b", "m~n")),
        ("/~01", ("~1",)),
        ("/experts/0", ("experts", "0")),
    ],
)
def test_a_json_pointer_is_split_into_its_tokens(pointer: str, tokens: tuple[str, ...]) -> None:
    """By RFC 6901 §3 and §4."""
    [rule] = policy(gate=[{"prefix": "/", "json": pointer}]).gate
    assert rule.source == Body(tokens)


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https://:443/j",
        "https://[::1/j",
        "https://h:99999/j",
        "https://h/j#f",
        "http://10.0.0.1/j",
        "HTTPS://h/j",
        "ftp://h/j",
    ],
)
def test_a_jwks_url_without_https_or_a_host_is_refused(url: str) -> None:
    """Keys must come from a server that proves its identity."""
    [line] = mistakes(text(issuers=[ISSUER | {"jwks": {"url": url}}]))
    assert "issuers[0].jwks.url: found `" in line


def test_a_password_in_a_url_is_not_repeated() -> None:
    """Messages are logged."""
    for url in ("https://me:hunter2@h/j", "http://hunter2@h/j", "https://me:hunter2@h:x/j"):
        [line] = mistakes(text(issuers=[ISSUER | {"jwks": {"url": url}}]))
        assert "hunter2" not in line


def test_a_url_that_could_not_be_fetched_is_refused() -> None:
    """Python's two URL parsers find different hosts in it, and the key store's would never load it."""
    [line] = mistakes(text(issuers=[ISSUER | {"jwks": {"url": "https://a\\b/j"}}]))
    assert "expected only characters that RFC 3986 allows in a URL" in line


@pytest.mark.parametrize("name", ["gpt-4o", "llama3:8b", "meta-llama/Llama-3.1-8B", "A_1", "0", "x" * 64])
def test_an_expert_may_have_a_models_name(name: str) -> None:
    """Names of real models among them."""
    entry = {"tier": "low", "cluster": "c", "endpoints": ["c:1"]}
    assert policy(experts={name: entry}).clusters == {"c": name}


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a,b", "a;w=2", "a~b", 'a"b', "a'b", "é", "-a", "/a", "a\n", "x" * 65]
)
def test_any_other_expert_name_is_refused(name: str) -> None:
    """What a header's list of names could confuse with something else."""
    entry = {"tier": "low", "cluster": "c", "endpoints": ["c:1"]}
    assert len(mistakes(text(experts={name: entry}))) == 1


# ---- warnings and differences ----------------------------------------------------------------------------------------

REMOTE = ISSUER | {"jwks": {"url": "https://idp.example.com/j"}}
LOW, HIGH = {"tier": "low", "endpoints": ["a:1"]}, {"tier": "high", "endpoints": ["c:1"]}
PREMIUM = {"when": "claims.plan == 'premium'", "tier": "high"}
ALL, NONE = {"when": "true", "tier": "low"}, {"when": "1 / 0 == 1", "tier": "high"}

WARNINGS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("sound", {"issuers": [REMOTE]}, []),
    ("nobody", {"anonymous": "deny"}, ["nobody gets in: `anonymous` is `deny`, and there are no issuers"]),
    (
        "clearance without issuers",
        {},
        [
            "clearance: no rule is ever used, because there are no issuers",
            "line 29: experts.C: nobody can reach it: no caller gets a tier above `low`",
        ],
    ),
    ("anonymous reaches all", {"anonymous": "high", "clearance": []}, []),
    (
        "no rule gives the tier",
        {"issuers": [REMOTE], "clearance": None, "experts": {"A": LOW, "C": HIGH}},
        ["line 15: experts.C: nobody can reach it: no caller gets a tier above `low`"],
    ),
    (
        "nobody reaches anything",
        {"anonymous": "low", "clearance": [], "experts": {"C": HIGH, "D": HIGH | {"cluster": "d"}}},
        ["nobody gets in: no caller can reach any expert"],
    ),
    (
        "never allowed",
        {"anonymous": "high", "clearance": [], "experts": {"A": LOW, "C": HIGH | {"allow": "false"}}},
        ["line 16: experts.C: nobody can reach it: `allow` is never true"],
    ),
    (
        "after an always-true rule",
        {"issuers": [REMOTE], "clearance": [ALL, PREMIUM], "experts": {"A": LOW}},
        ["line 10: clearance[0].when: always true; the rules after it are never reached"],
    ),
    ("always true and last", {"issuers": [REMOTE], "clearance": [PREMIUM, ALL]}, []),
    (
        "never true",
        {"issuers": [REMOTE], "clearance": [NONE, PREMIUM]},
        ["line 10: clearance[0].when: never true"],
    ),
    (
        "the same rule again",
        {"issuers": [REMOTE], "clearance": [PREMIUM, PREMIUM | {"tier": "low"}]},
        ["line 14: clearance[1].when: never reached: clearance[0].when is the same condition"],
    ),
    ("a rule on the request", {"experts": {"A": LOW | {"allow": "request.path == '/'"}}, "clearance": []}, []),
]


@pytest.mark.parametrize(("name", "overrides", "expected"), WARNINGS, ids=[w[0] for w in WARNINGS])
def test_a_policy_that_cannot_mean_what_it_says_gets_a_warning(
    name: str, overrides: dict[str, Any], expected: list[str]
) -> None:
    """Only about what is certain."""
    assert warnings(policy(**overrides)) == expected


def test_warnings_about_many_experts_are_shortened() -> None:
    """Ten experts are named, the rest are counted."""
    experts = {"A": LOW} | {f"C{i}": HIGH | {"cluster": f"c{i}"} for i in range(500)}
    found = warnings(policy(anonymous="low", clearance=[], experts=experts))
    assert len(found) == 11
    assert found[-1] == "experts: nobody can reach 490 more"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([tokens.jwk("ES256")], []),
        ([], ["the file holds no usable key, so its tokens are refused"]),
        (
            [{"kty": "RSA", "kid": "weak"}, tokens.jwk("ES256")],
            ["keys[0] (kid 'weak'): n is not base64url; it is skipped"],
        ),
        (
            [{"kid": "odd"}],
            [
                "keys[0] (kid 'odd'): has no kty; it is skipped",
                "the file holds no usable key, so its tokens are refused",
            ],
        ),
    ],
    ids=["good", "empty", "one is skipped", "all are skipped"],
)
def test_key_files_get_a_warning_for_each_key_that_is_skipped(
    tmp_path: Path, entries: list[Any], expected: list[str]
) -> None:
    """They are no mistakes: real issuers publish such keys beside good ones, and an empty set distrusts every key."""
    (tmp_path / "keys.json").write_text(json.dumps({"keys": entries}))
    made = policy(tmp_path, issuers=[ISSUER | {"jwks": {"file": "keys.json"}}, REMOTE | {"issuer": "remote"}])
    assert [*key_warnings(made)] == [f"issuer `{ISSUER['issuer']}`: {line}" for line in expected]


def test_dropped_experts_are_named() -> None:
    """When a reload removes experts."""
    old, new = policy(), policy(experts={"A": LOW})
    assert dropped(old, new) == [
        "expert `B` is gone; a request that names it is now `unknown_expert`",
        "expert `C` is gone; a request that names it is now `unknown_expert`",
    ]
    assert dropped(new, old) == []


# ---- the format for editors, and in words ----------------------------------------------------------------------------

# What JSON Schema cannot express: how a text parses, what refers to what, and mistakes of YAML rather than of data.
BEYOND_SCHEMA = (
    "algorithm_es_with_secret", "algorithm_hs_with_jwks", "clearance_reads_request", "cluster_not_derivable",
    "cluster_of_other_name", "cluster_reserved", "cluster_twice", "condition_", "downgrade_to_itself",
    "downgrade_upwards", "duplicate_", "duration_too_long",
    "endpoint_bad_address", "endpoint_port_too_high", "endpoint_twice",
    "gate_identity_header", "gate_unsent_header", "gate_path_not_normalized", "gate_requested_cluster",
    "gate_token_header",
    "gate_unknown_default", "gate_unreachable", "issuer_twice", "jwks_file_is_a_folder",
    "jwks_file_missing", "jwks_file_not_json", "jwks_file_other_algorithm", "jwks_file_private",
    "jwks_plain_http",
    "jwks_refresh_too_short", "jwks_url_with_user", "secret_", "tier_named_deny", "unknown_downgrade", "unknown_tier",
)  # fmt: skip
YAML_ONLY = (
    "alias", "anchor", "boolean_key", "byte_order_mark", "directive", "line_separator", "merge_key", "number_key",
    "tag", "utf16",
)  # fmt: skip


def test_the_schema_is_valid_json_schema() -> None:
    """Of draft 2020-12."""
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_defaults_of_the_schema_are_valid() -> None:
    """What an editor inserts is valid."""
    schema = json_schema()
    for form in (schema, *schema["$defs"].values()):
        for entry in form["properties"].values():
            validator = jsonschema.Draft202012Validator(entry | {"$defs": schema["$defs"]})
            assert "default" not in entry or validator.is_valid(entry["default"])


def test_the_schema_accepts_what_the_parser_accepts(keys: Path) -> None:
    """So an editor does not underline a good file."""
    validator = jsonschema.Draft202012Validator(json_schema())
    demo = DEMO.format(issuer="i", audience="moe", jwks="jwks.json", a="a:1", b="b:2", c="c:4")
    for source in (text(), demo, text(leeway=0, issuers=[REMOTE], revoked={"jti": ["j", "j"], "issued_before": None})):
        validator.validate(yaml.safe_load(source))


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_the_schema_refuses_what_it_can(name: str) -> None:
    """So an editor underlines every mistake of form."""
    try:
        data = yaml.safe_load((FIXTURES / f"{name}.yaml").read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError):
        return
    if name not in YAML_ONLY:
        valid = jsonschema.Draft202012Validator(json_schema()).is_valid(data)
        assert valid == name.startswith(BEYOND_SCHEMA)


def test_the_documentation_is_right(keys: Path) -> None:
    """Its YAML loads, its messages are real ones, and its tables have every key with its default."""
    words = DOCS.read_text()
    shown = re.findall(r"```(yaml|text)\n(.*?)```", words, re.DOTALL)
    assert {language for language, _ in shown} == {"yaml", "text"}
    real = {f"policy.yaml:{line}" for lines in BROKEN.values() for line in lines.splitlines()}
    for language, block in shown:
        if language == "yaml":
            assert mistakes(block, keys) == []
        else:
            assert real.issuperset(block.splitlines())
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (?:`([^|]*)`)?", words, re.MULTILINE)
    forms = json_schema()["$defs"] | {"File": json_schema()}
    for form in forms.values():
        for key, entry in form["properties"].items():
            default = entry.get("default", "")
            written = default if isinstance(default, str) else json.dumps(default)
            assert (key, written) in rows


# ---- any text at all -------------------------------------------------------------------------------------------------

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines differ
_LINE = re.compile(r"policy\.yaml:(\d+):(\d+): (.+)")


def refused_or_loaded(source: str | bytes) -> Policy | None:
    """The policy; or None, after checking that each line of the error points into the text."""
    try:
        return parse_policy(source)
    except PolicyError as e:
        data = source if isinstance(source, bytes) else source.encode("utf-8", "surrogatepass")
        lines = data.decode("utf-8", "replace").split("\n")
        outside = [mistake for mistake in str(e).split("\n") if not points_inside(mistake, lines)]
    assert outside == []
    return None


def points_inside(mistake: str, lines: list[str]) -> bool:
    """Whether a line of an error is well-formed and points into the text."""
    found = _LINE.fullmatch(mistake)
    if not found or not mistake.isprintable():
        return False
    line, column = int(found[1]), int(found[2])
    return 1 <= line <= len(lines) and 1 <= column <= len(lines[line - 1]) + 1


@SLOW
@given(st.binary() | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
@example(b"\xef\xbb\xbf")
@example(b"\xed\xa0\x80")
@example(b"a: !<tag:yaml.org,2002:null> x")
@example(b"? ")
@example(b"---")
@example(b"a: 0x_")
@example(b"- - - &a\n  *a")
def test_any_bytes_load_or_are_refused(source: bytes) -> None:
    """With nothing but PolicyError, each of whose lines points into the text."""
    refused_or_loaded(source)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
_KEYS = (
    st.sampled_from([*SMALL, "gate", "issuers", "revoked", "leeway", "health", "jwks", "url", "tier", "A", "on"])
    | _SCALARS
)
_DATA = st.recursive(_SCALARS, lambda d: st.lists(d, max_size=4) | st.dictionaries(_KEYS, d, max_size=4), max_leaves=12)


@SLOW
@given(_DATA)
def test_any_yaml_loads_or_is_refused(data: object) -> None:
    """Any structure that YAML can express, as PyYAML writes it."""
    refused_or_loaded(yaml.safe_dump(data, allow_unicode=True))


RICH: dict[str, Any] = SMALL | {
    "issuers": [REMOTE],
    "gate": [{"path": "/r", "json": "/m", "default": ["A"]}, {"prefix": "/", "header": "x-target-cluster"}],
    "revoked": {"jti": ["j"], "sub": ["s"], "issued_before": "2030-01-31T12:00:00Z"},
    "leeway": "1s",
    "experts": {
        "A": LOW | {"health": {"path": "/h", "interval": "1s"}, "outlier": False},
        "C": HIGH | {"downgrade_to": ["A"]},
    },
}


@SLOW
@given(st.data())
def test_a_good_policy_with_any_part_replaced_loads_or_is_refused(data: st.DataObject) -> None:
    """A mistake in one place causes nothing but PolicyError."""
    whole = json.loads(json.dumps(RICH))
    assert refused_or_loaded(json.dumps(whole)) is not None
    inner: Any = whole
    while True:
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if not inner[key] or not isinstance(inner[key], dict | list) or data.draw(st.booleans()):
            break
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[key]
    else:
        inner[key] = data.draw(_DATA)
    refused_or_loaded(yaml.safe_dump(whole, allow_unicode=True))


@SLOW
@given(st.data())
def test_a_good_policy_with_any_text_inserted_loads_or_is_refused(data: st.DataObject) -> None:
    """A typo causes nothing but PolicyError."""
    source = DEMO.format(issuer="i", audience="m", jwks="no-such-file", a="a:1", b="b:2", c="c:4")
    start = data.draw(st.integers(0, len(source)))
    end = data.draw(st.integers(start, min(len(source), start + 5)))
    put = data.draw(
        st.text(st.sampled_from(list("{}[]:,-?&*!|>'\"%@`#\n \tab1~\\\r\x85")) | st.characters(), max_size=4)
    )
    refused_or_loaded(source[:start] + put + source[end:])


_TIERS = st.lists(
    st.from_regex(r"[a-z]{1,5}", fullmatch=True).filter(lambda t: t != "deny"), min_size=1, max_size=4, unique=True
)
_NAMES = st.lists(
    st.from_regex(r"[A-Z][a-z_]{0,5}[a-z0-9]", fullmatch=True), min_size=1, max_size=5, unique_by=str.lower
)


@st.composite
def good(draw: st.DrawFn) -> dict[str, Any]:
    """The data of a policy without mistakes."""
    tiers, names = draw(_TIERS), draw(_NAMES)
    level = {name: draw(st.integers(0, len(tiers) - 1)) for name in names}
    experts = {}
    for number, name in enumerate(names):
        lesser = [n for n in names if n != name and level[n] <= level[name]]
        experts[name] = {
            "tier": tiers[level[name]],
            "cluster": f"c{number}",
            "endpoints": draw(
                st.lists(st.sampled_from(["a:1", "b:2", "[::1]:3", "10.0.0.1:4"]), min_size=1, unique=True)
            ),
            "downgrade_to": draw(st.permutations(lesser)),
            "weight": draw(st.integers(1, 1000)),
            "timeout": draw(st.sampled_from([0, "0", "1s", "5m"])),
            "health": draw(st.sampled_from([False, {}, {"interval": "1s"}])),
        }
    return {
        "version": 1,
        "tiers": tiers,
        "anonymous": draw(st.sampled_from([*tiers, "deny"])),
        "clearance": [{"when": f"claims.a == {i}", "tier": t} for i, t in enumerate(tiers)],
        "experts": experts,
        "gate": [{"path": "/r", "json": "/x", "default": names}, {"prefix": "/", "header": "x-target-cluster"}],
        "forward_token": draw(st.booleans()),
        "leeway": draw(st.sampled_from([0, "5m", "200ms"])),
    }


@SLOW
@given(good(), st.booleans())
def test_a_generated_policy_loads(data: dict[str, Any], as_json: bool) -> None:
    """From block style and from JSON, with what was written; the schema accepts it, too."""
    found = refused_or_loaded(json.dumps(data) if as_json else yaml.dump(data, Dumper=_Plain))
    assert found is not None
    assert list(found.tiers) == data["tiers"]
    assert set(found.experts) == set(data["experts"])
    for name, entry in data["experts"].items():
        assert found.tiers[found.experts[name].tier] == entry["tier"]
        assert list(found.experts[name].downgrade_to) == entry["downgrade_to"]
        assert list(map(policy_values.address, found.experts[name].endpoints)) == entry["endpoints"]
        assert (found.experts[name].traffic.health is None) == (entry["health"] is False)
    jsonschema.Draft202012Validator(json_schema()).validate(data)


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
