"""The demo's key on disk, and the tokens that it signs."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from ext_authz.core.jwk import parse_jwks
from ext_authz.demo.keys import AUDIENCE, ISSUER, JWKS_FILE, KEY_FILE, DemoKeys
from tests.harness import tokens


def claims_of(directory: Path, token: str) -> dict[str, Any]:
    """The claims, verified with the published key."""
    (key,) = parse_jwks((directory / JWKS_FILE).read_bytes()).keys
    assert jwt.get_unverified_header(token) == {"alg": "ES256", "kid": key.kid, "typ": "JWT"}
    return jwt.decode(token, key.material, algorithms=["ES256"], audience=AUDIENCE, issuer=ISSUER)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_verifies_with_the_published_key(tmp_path: Path) -> None:
    """The key is the same whether `create` made it or `load` read it."""
    directory = tmp_path / "new" / "demo"
    made = DemoKeys.create(directory)
    before = int(time.time())
    for keys in (made, DemoKeys.load(directory)):
        claims = claims_of(directory, keys.mint({"sub": "ada", "plan": "premium", "n": 1, "list": [True]}, 60))
        assert before <= claims.pop("iat") <= time.time()
        assert before + 60 <= claims.pop("exp") <= time.time() + 61
        assert claims == {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "plan": "premium", "n": 1, "list": [True]}


def test_claims_override_the_defaults(tmp_path: Path) -> None:
    """A demo needs bad tokens, too."""
    token = DemoKeys.create(tmp_path).mint({"exp": 1, "iss": "x", "aud": []}, 60, kid="k", issuer="y")
    assert jwt.decode(token, options={"verify_signature": False}) | {"iat": 0} == {
        "iss": "x", "aud": [], "exp": 1, "iat": 0,
    }  # fmt: skip
    assert jwt.get_unverified_header(token)["kid"] == "k"


@pytest.mark.parametrize("claim", [{1, 2}, float("nan"), object()])
def test_a_claim_without_a_json_form_is_a_value_error(tmp_path: Path, claim: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        DemoKeys.create(tmp_path).mint({"x": claim}, 60)


def test_only_the_owner_can_read_the_key(tmp_path: Path) -> None:
    """The folder and the key are private, and no half-written file is left."""
    directory = tmp_path / "demo"
    keys = DemoKeys.create(directory)
    assert mode(directory) == 0o700
    assert mode(directory / KEY_FILE) == 0o600
    assert sorted(p.name for p in directory.iterdir()) == [JWKS_FILE, KEY_FILE]
    assert set(json.loads((directory / JWKS_FILE).read_bytes())["keys"][0]) == {
        "kty", "crv", "x", "y", "kid", "use", "alg",
    }  # fmt: skip
    assert "private" not in repr(keys).lower()


def test_a_new_key_replaces_the_old(tmp_path: Path) -> None:
    """Tokens of the old key no longer verify."""
    old = DemoKeys.create(tmp_path)
    new = DemoKeys.create(tmp_path)
    assert old.kid != new.kid
    (key,) = parse_jwks((tmp_path / JWKS_FILE).read_bytes()).keys
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(old.mint({}, 60), key.material, algorithms=["ES256"], audience=AUDIENCE)


def spoil(directory: Path, file: str, data: bytes | None) -> None:
    if data is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "file", "data", "message"),
    [
        ("no key", KEY_FILE, None, f"{KEY_FILE} is missing; `srp demo` makes one"),
        ("no jwks", JWKS_FILE, None, f"{JWKS_FILE} is missing; `srp demo` makes one"),
        ("not a pem", KEY_FILE, b"MARKER", "is damaged: delete"),
        ("not json", JWKS_FILE, b"MARKER", "is damaged: delete"),
        ("not a set", JWKS_FILE, b"[]", "is damaged: delete"),
        ("an empty set", JWKS_FILE, b'{"keys": []}', "is damaged: delete"),
        ("another key", JWKS_FILE, tokens.jwks("ES256"), "are not one ES256 key"),
        ("a key of another type", JWKS_FILE, tokens.jwks("RS256"), "is damaged: delete"),
    ],
)
def test_load_says_what_is_wrong_with_the_files(
    tmp_path: Path, name: str, file: str, data: bytes | None, message: str
) -> None:
    """In one line that names the folder and repeats nothing from the files."""
    DemoKeys.create(tmp_path)
    spoil(tmp_path, file, data)
    with pytest.raises(ValueError, match=message) as caught:
        DemoKeys.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "MARKER" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        DemoKeys.create(tmp_path / "file" / "demo")
