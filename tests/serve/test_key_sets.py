"""Key sets that are empty, broken or in part unusable, in a running `srp serve`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.harness import tokens
from tests.harness.authorization import POLICY
from tests.harness.server import Served, served
from tests.harness.waiting import wait_for

EMPTY = b'{"keys": []}'
FAR = "https://far.example.com/"
WEAK = {"kty": "RSA", "kid": "weak", "use": "sig", "n": "u" * 171, "e": "AQAB"}  # 1024 bits


@pytest.fixture
def url() -> Iterator[str]:
    """Where an issuer publishes an empty set."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(EMPTY)))
            self.end_headers()
            self.wfile.write(EMPTY)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/jwks.json"
    server.shutdown()
    thread.join()
    server.server_close()


def premium(**claims: object) -> str:
    return tokens.sign(tokens.claims(plan="premium", **claims))


def until_reason(it: Served, wanted: str, caller: str) -> None:
    wait_for(lambda: it.reason("C", caller=caller) == wanted, f"`{wanted}`", it)


def test_an_empty_key_set_refuses_every_token_of_its_issuer(tmp_path: Path, url: str) -> None:
    """From a file or a URL: 401, not 503; status, metrics and log say why. A key set with a key ends it, by itself."""
    far = f'  - {{issuer: "{FAR}", audiences: [{tokens.AUDIENCE}], algorithms: [ES256], jwks: {{url: "{url}"}}}}\n'
    (tmp_path / "policy.yaml").write_text(POLICY.replace("anonymous:", far + "anonymous:"))
    (tmp_path / "jwks.json").write_bytes(EMPTY)
    with served(tmp_path) as it:
        for issuer in (tokens.ISSUER, FAR):
            assert it.reason("A", caller=premium(iss=issuer)) == "invalid_token"
            assert f"keys of {issuer}: " in it.log
            assert f"! {issuer}: there is no usable key, so its tokens are refused" in it.text()
            assert f'srp_keys{{issuer="{issuer}"}} 0.0' in it.metrics()
        assert it.log.count("holds no usable key; its tokens are refused") == 2
        assert it.reason("A") == "permitted"
        it.replace("jwks.json", tokens.jwks("ES256"))
        until_reason(it, "permitted", premium())
        assert f'srp_keys{{issuer="{tokens.ISSUER}"}} 1.0' in it.metrics()
        it.replace("jwks.json", EMPTY)  # the last key is distrusted
        until_reason(it, "invalid_token", premium())


@pytest.mark.parametrize("harm", ["broken", "missing", "private"])
def test_a_revocation_does_not_wait_for_a_key_file(tmp_path: Path, harm: str) -> None:
    """The good keys stay meanwhile, and the file takes effect when it is mended, without an edit of the policy."""
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "jwks.json").write_bytes(tokens.jwks("ES256"))
    with served(tmp_path) as it:
        assert it.reason("C", caller=premium(jti="stolen")) == "permitted"
        if harm == "missing":
            (tmp_path / "jwks.json").unlink()
        else:
            it.replace("jwks.json", "{" if harm == "broken" else json.dumps({"keys": [tokens.jwk("ES256", d="AA")]}))
        it.replace("policy.yaml", POLICY + "revoked: {jti: [stolen]}\n")
        until_reason(it, "invalid_token", premium(jti="stolen"))
        assert it.reason("C", caller=premium(jti="fine")) == "permitted"
        assert it.status()["policy"]["error"] is None
        wait_for(lambda: it.status()["keys"][0]["last_error"] is not None, "the key file's error", it)
        new = tokens.sign(tokens.claims(plan="premium"), name="new")
        digest = it.status()["policy"]["digest"]
        it.replace("jwks.json", tokens.jwks("ES256", name="new"))
        until_reason(it, "permitted", new)
        assert it.reason("C", caller=premium()) == "invalid_token"
        assert it.status()["policy"]["digest"] == digest
        assert it.status()["keys"][0]["last_error"] is None


def test_an_unusable_key_among_good_ones_is_skipped_by_name(tmp_path: Path) -> None:
    """The good ones verify, and status, metrics and log name the other."""
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [WEAK, tokens.jwk("ES256"), {"kty": "?"}, 7]}))
    with served(tmp_path) as it:
        assert it.reason("C", caller=premium()) == "permitted"
        weak = "skipped keys[0] (kid 'weak'): is an RSA key of "
        assert weak in it.log
        assert weak in it.text()
        assert it.metrics() >= {
            f'srp_keys{{issuer="{tokens.ISSUER}"}} 1.0',
            f'srp_keys_skipped{{issuer="{tokens.ISSUER}"}} 2.0',
        }


def test_a_policy_file_that_is_gone_is_one_failure(tmp_path: Path) -> None:
    """However often it is looked for."""
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "jwks.json").write_bytes(tokens.jwks("ES256"))
    with served(tmp_path) as it:
        it.policy.unlink()
        wait_for(lambda: it.status()["policy"]["failures"], "the failure", it)
        for n in range(5):
            it.replace(f"..{n}", "")  # may concern the policy, so it is looked for again
            time.sleep(0.2)
        it.replace("policy.yaml", "version: 2\n")
        wait_for(lambda: "version" in it.status()["policy"]["error"], "the next failure", it)
        assert it.status()["policy"]["failures"] == 2
        it.replace("policy.yaml", POLICY + "# back\n")
        wait_for(lambda: it.status()["policy"]["error"] is None, "the policy", it)
