"""Key sets as issuers publish them, good and bad."""

from __future__ import annotations

import base64
import json
import re
from base64 import urlsafe_b64decode
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from ext_authz.core.jwk import MAX_BYTES, MAX_KEYS, Key, KeySet, key_of_text, key_text, parse_jwks, secret_key
from tests.harness import tokens

RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
ES256 = tokens.jwk("ES256")
OTHER = tokens.jwk("ES384")  # put beside the entry under test, so that the set has a usable key


def parse(*entries: Any) -> tuple[Key, ...]:
    return parse_jwks(json.dumps({"keys": entries}).encode()).keys


def skipped(*entries: Any) -> tuple[str, ...]:
    return parse_jwks(json.dumps({"keys": entries}).encode()).skipped


def outcome_of(data: bytes) -> KeySet | str:
    """The set, or the message of the ValueError."""
    try:
        return parse_jwks(data)
    except ValueError as e:
        return str(e)


def small_rsa(bits: int = 1024) -> dict[str, Any]:
    public = rsa.generate_private_key(65537, bits).public_key()
    return {**RSAAlgorithm.to_jwk(public, as_dict=True), "kid": "small", "key_ops": ["verify"]}


@pytest.mark.parametrize("alg", tokens.ALGORITHMS)
def test_a_key_verifies_what_its_owner_signed(alg: str) -> None:
    """And nothing else; `material` is what PyJWS.decode takes."""
    (key,) = parse(tokens.jwk(alg))
    assert key.kid == alg
    assert key.algorithms == {alg}
    jws = jwt.PyJWS()
    assert jws.decode(tokens.sign({"sub": "ada"}, alg), key.material, algorithms=[alg]) == b'{"sub": "ada"}'
    with pytest.raises(jwt.InvalidSignatureError):
        jws.decode(tokens.sign({"sub": "ada"}, alg, name="other"), key.material, algorithms=[alg])


@pytest.mark.parametrize(
    ("alg", "algorithms"),
    [
        ("RS256", RSA_ALGORITHMS),
        ("ES256", {"ES256"}),
        ("ES384", {"ES384"}),
        ("ES512", {"ES512"}),
        ("EdDSA", {"EdDSA"}),
    ],
)
def test_a_key_without_alg_has_the_algorithms_of_its_type_and_curve(alg: str, algorithms: frozenset[str]) -> None:
    """`use`, `key_ops`, `kid` and `alg` may all be absent."""
    (key,) = parse(tokens.jwk(alg, alg=None, use=None, kid=None))
    assert key.kid is None
    assert key.algorithms == algorithms


def test_an_ed448_key_is_read() -> None:
    """RFC 8037 §2 has two signature curves."""
    (key,) = parse(OKPAlgorithm.to_jwk(ed448.Ed448PrivateKey.generate().public_key(), as_dict=True))
    assert key.algorithms == {"EdDSA"}


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("encryption key by use", {**ES256, "use": "enc"}),
        ("unknown use", {**ES256, "use": "x"}),
        ("key_ops without verify", {**ES256, "key_ops": ["deriveKey"]}),
        ("key_ops empty", {**ES256, "key_ops": []}),
        ("use and key_ops at odds", {**ES256, "use": "enc", "key_ops": ["verify"]}),
        ("encryption key by alg", {**ES256, "alg": "ECDH-ES"}),
        ("alg of another type", {**ES256, "alg": "RS256"}),
        ("alg of another curve", {**ES256, "alg": "ES512"}),
        ("alg none", {**ES256, "alg": "none"}),
        ("alg HS256 on a public key", {**tokens.jwk("RS256"), "alg": "HS256"}),
        ("alg in lower case", {**ES256, "alg": "es256"}),
        ("symmetric key", {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256", "kid": "s"}),
        ("unknown type", {"kty": "AKP", "pub": "AAAA", "kid": "pq"}),
        ("type in lower case", {**ES256, "kty": "ec"}),
        ("unknown curve", {**ES256, "crv": "secp256k1"}),
        ("curve of key agreement", {"kty": "OKP", "crv": "X25519", "x": "AAAA"}),
        ("no curve", {"kty": "EC", "x": "AAAA", "y": "AAAA"}),
        ("broken encryption key", {"kty": "RSA", "use": "enc", "n": "!", "kid": "e"}),
    ],
)
def test_keys_for_another_use_are_ignored(name: str, entry: dict[str, Any]) -> None:
    """A set with no other key is a set, with which no token verifies."""
    assert [k.kid for k in parse(entry, OTHER)] == ["ES384"], name
    assert parse(entry) == ()


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("not an object", "ES256", r"keys\[1\]: is not an object"),
        ("no kty", {"kid": "a"}, r"keys\[1\] \(kid 'a'\): has no kty"),
        ("kty a number", {"kty": 1}, "kty is not a string"),
        ("kid a number", {**ES256, "kid": 7}, "kid is not a string"),
        ("kid null", {**ES256, "kid": None}, "kid is not a string"),
        ("alg a list", {**ES256, "alg": ["ES256"]}, "alg is not a string"),
        ("use a list", {**ES256, "use": ["sig"]}, "use is not a string"),
        ("crv a list", {**ES256, "crv": ["P-256"]}, "crv is not a string"),
        ("key_ops a string", {**ES256, "key_ops": "verify"}, "key_ops is not a list"),
        ("the same kid again", {**OTHER}, r"keys\[1\] \(kid 'ES384'\): another key of this type has the same kid"),
        ("rsa too short", small_rsa(), "is an RSA key of 1024 bits, expected 2048 to 16384"),
        ("rsa far too long", {**tokens.jwk("RS256"), "n": "Q" * 4000}, "is an RSA key of 23999 bits"),
        ("rsa exponent 1", {**tokens.jwk("RS256"), "e": "AQ"}, "impossible modulus or exponent"),
        ("rsa exponent 0", {**tokens.jwk("RS256"), "e": "AA"}, "impossible modulus or exponent"),
        ("rsa exponent even", {**tokens.jwk("RS256"), "e": "AQAA"}, "impossible modulus or exponent"),
        ("rsa exponent huge", {**tokens.jwk("RS256"), "e": "AQAAAAAAAAAB"}, "impossible modulus or exponent"),
        ("rsa modulus even", {**tokens.jwk("RS256"), "n": "f" + "A" * 342}, "impossible modulus or exponent"),
        ("rsa without n", {"kty": "RSA", "e": "AQAB"}, "n is not base64url"),
        ("rsa n a number", {"kty": "RSA", "n": 5, "e": "AQAB"}, "n is not a string"),
        ("point off the curve", {**ES256, "y": ES256["x"]}, "is not a valid EC public key"),
        ("point at infinity", {**ES256, "x": "A" * 43, "y": "A" * 43}, "is not a valid EC public key"),
        ("point of another curve", {**tokens.jwk("ES384", kid="x"), "crv": "P-256", "alg": "ES256"}, "not a valid EC"),
        ("short coordinate", {**ES256, "x": ES256["x"][:-3]}, "is not a valid EC public key"),
        ("padded coordinate", {**ES256, "x": ES256["x"] + "="}, "x is not base64url"),
        ("plain base64", {**ES256, "x": "+/" + ES256["x"][2:]}, "x is not base64url"),
        ("blank in a coordinate", {**ES256, "x": " " + ES256["x"]}, "x is not base64url"),
        ("impossible base64 length", {**ES256, "x": "A" * 45}, "x is not base64url"),
        ("short ed25519", {**tokens.jwk("EdDSA"), "x": "AAAA"}, "is not a valid OKP public key"),
    ],
)
def test_a_broken_or_weak_key_is_skipped_by_name_and_the_others_stay(name: str, entry: Any, message: str) -> None:
    """RFC 7517 §5. The line says which key it is."""
    assert [k.kid for k in parse(OTHER, entry)] == ["ES384"]
    [line] = skipped(OTHER, entry)
    assert re.search(message, line)


def test_a_key_that_can_be_factored_is_skipped() -> None:
    """ROCA, CVE-2017-15361: the residues of the modulus are powers of 65537 for every small prime of the test."""
    primes = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
    modulus, step = 1, 2
    for prime in primes:  # the Chinese remainder theorem, one prime at a time
        while modulus % prime != pow(65537, 3, prime):
            modulus += step
        step *= prime
    modulus += step * (((1 << 2047) // step) + 1)
    octets = base64.urlsafe_b64encode(modulus.to_bytes(256)).decode().rstrip("=")
    [line] = skipped({**tokens.jwk("RS256"), "n": octets})
    assert "ROCA" in line


def test_the_same_kid_may_name_a_key_of_another_type() -> None:
    """RFC 7517 §4.5 allows it, and the algorithm distinguishes them; keys for another use do not count."""
    twins = [tokens.jwk("ES256", kid="k"), tokens.jwk("RS256", kid="k"), tokens.jwk("ES256", "2", kid="k", use="enc")]
    assert [k.kid for k in parse(*twins)] == ["k", "k"]


@pytest.mark.parametrize("member", ["d", "p", "q", "dp", "dq", "qi", "oth", "priv"])
@pytest.mark.parametrize("alg", ["RS256", "ES256", "EdDSA"])
def test_a_private_member_makes_the_set_invalid(alg: str, member: str) -> None:
    """A private key has been published, be it for another use or with an empty value."""
    for over in ({member: "c2VjcmV0"}, {member: None}, {member: "", "use": "enc"}):
        with pytest.raises(ValueError, match=f"holds the private member {member}: publish public keys only"):
            parse(OTHER, {**tokens.jwk(alg), **over})


def test_a_private_key_is_refused_and_not_repeated() -> None:
    """Neither in the message nor in its cause."""
    private = ECAlgorithm.to_jwk(tokens.private_key("ES256"), as_dict=True)
    with pytest.raises(ValueError, match="private member d") as caught:
        parse(private)
    assert caught.value.__cause__ is None
    assert not any(str(private[m]) in str(caught.value) for m in ("d", "x", "y"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", b"", "is not JSON"),
        ("html", b"<html>", "is not JSON"),
        ("list", b"[]", "is not a JWK Set"),
        ("single key", json.dumps(ES256).encode(), "is not a JWK Set"),
        ("keys an object", b'{"keys": {}}', "is not a JWK Set"),
        ("duplicate name", b'{"keys": [], "keys": []}', "duplicate name"),
        ("byte order mark", b"\xef\xbb\xbf" + tokens.jwks("ES256"), "byte order mark"),
        ("not utf-8", b'{"keys": "\xff"}', "is not UTF-8"),
        ("deep", b'{"keys": ' + b"[" * 20 + b"]" * 20 + b"}", "nested"),
        ("very deep", b"[" * 100_000, "nested"),
        ("too big", b" " * (MAX_BYTES + 1), f"holds over {MAX_BYTES} bytes"),
        ("too many", json.dumps({"keys": [{"kty": "oct"}] * 101}).encode(), "holds 101 keys, at most 100"),
    ],
)
def test_anything_but_a_key_set_is_refused(name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_jwks(data)


def test_an_empty_set_is_a_set() -> None:
    """It distrusts every key; otherwise the last one could not be distrusted."""
    assert parse_jwks(b'{"keys": []}') == KeySet(())


def test_a_set_may_have_max_keys_keys() -> None:
    keys = parse(*({**ES256, "kid": str(n)} for n in range(MAX_KEYS)))
    assert [k.kid for k in keys] == [str(n) for n in range(MAX_KEYS)]


def test_a_hostile_kid_stays_on_one_short_line() -> None:
    """Messages are logged as they are."""
    [line] = skipped({"kty": 1, "kid": "a\n\x1b[31m\u2028\ud800" + "x" * 10_000})
    assert "kty is not a string" in line
    assert line.isprintable()
    assert len(line) < 200


@given(st.binary(max_size=200) | st.binary(max_size=50).map(lambda b: b'{"keys":[' + b + b"]}"))
def test_any_bytes_give_keys_or_a_value_error(data: bytes) -> None:
    outcome = outcome_of(data)
    assert "".join((outcome,) if isinstance(outcome, str) else outcome.skipped).isprintable()


@given(
    st.sampled_from(tokens.ALGORITHMS),
    st.sampled_from(["kty", "crv", "alg", "use", "kid", "key_ops", "n", "e", "x", "y"]),
    st.none() | st.booleans() | st.integers() | st.text(max_size=60) | st.lists(st.text(max_size=3), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip
def test_any_change_to_a_key_gives_keys_or_a_value_error(alg: str, member: str, value: Any) -> None:
    """A key that is still accepted keeps to the algorithms of its type and curve."""
    outcome = outcome_of(json.dumps({"keys": [{**tokens.jwk(alg), member: value}]}).encode())
    assert not isinstance(outcome, str)
    assert "".join(outcome.skipped).isprintable()
    for key in outcome.keys:
        assert key.algorithms <= ({alg} if alg[0] == "E" else RSA_ALGORITHMS)
        assert not isinstance(key.material, (bytes, str))


@pytest.mark.parametrize(
    ("size", "algorithms"),
    [
        (32, {"HS256"}),
        (47, {"HS256"}),
        (48, {"HS256", "HS384"}),
        (63, {"HS256", "HS384"}),
        (64, {"HS256", "HS384", "HS512"}),
        (500, {"HS256", "HS384", "HS512"}),
    ],
)
@pytest.mark.parametrize("newline", [b"", b"\n", b"\r\n"])
def test_a_secret_has_the_algorithms_that_its_length_allows(size: int, algorithms: set[str], newline: bytes) -> None:
    """RFC 7518 §3.2; one newline at the end comes from an editor."""
    key = secret_key(b"s" * size + newline)
    assert key.kid is None
    assert key.algorithms == algorithms
    assert key.material == b"s" * size


def test_a_secret_keeps_every_byte_but_one_newline() -> None:
    assert secret_key(b"\n" * 40).material == b"\n" * 39
    assert secret_key(b" " + b"s" * 32 + b"\r").material == b" " + b"s" * 32 + b"\r"


@pytest.mark.parametrize("data", [b"", b"short", b"s" * 31, b"s" * 31 + b"\n"])
def test_a_short_secret_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="at least 32 are needed") as caught:
        secret_key(data)
    assert "sss" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pem", "jwk", "jwks", "der"])
def test_a_public_key_is_refused_as_a_secret(kind: str) -> None:
    """Anyone who knows it could sign: the classic confusion of HS256 with RS256."""
    public: ec.EllipticCurvePublicKey = tokens.private_key("ES256").public_key()
    data = {
        "pem": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "jwk": json.dumps(ES256).encode(),
        "jwks": tokens.jwks("ES256"),
    }[kind]
    with pytest.raises(ValueError, match="not a secret"):
        secret_key(data)


# ---- for another process ----


@pytest.mark.parametrize("alg", [*tokens.ALGORITHMS, "HS256"])
def test_a_key_as_text_is_the_same_key(alg: str) -> None:
    """With its name, even a hostile one, its algorithms and its material."""
    kid = "\ud800\n" if alg == "ES256" else None
    published = {} if alg == "HS256" else {"keys": [tokens.jwk(alg, kid=kid)]}
    found = secret_key(bytes(range(40))) if alg == "HS256" else parse_jwks(json.dumps(published).encode()).keys[0]
    again = key_of_text(key_text(found))
    assert key_text(found).isascii()
    assert (again.kid, again.algorithms) == (found.kid, found.algorithms)
    assert again.material == found.material


@pytest.mark.parametrize("text", ["", "[]", "{}", '[null, ["ES256"], false, "x"]', '[null, ["ES256"], false, 1]'])
def test_any_other_text_is_refused_as_a_key(text: str) -> None:
    with pytest.raises(ValueError, match="is not a key"):
        key_of_text(text)


def test_the_harness_makes_tokens_as_hostile_as_it_says() -> None:
    """`tests.harness.tokens`: an unused bit changes the text of a part, not its bytes."""
    part = tokens.b64(b'{"a":1} ')
    twisted = tokens.with_unused_bit(part)
    padded = [urlsafe_b64decode(p + "=" * (-len(p) % 4)) for p in (part, twisted)]
    assert part != twisted
    assert padded[0] == padded[1]
    assert tokens.raw_token(b"\xef\xbb\xbf{}", b"NaN", "EdDSA").split(".")[:2] == ["77u_e30", "TmFO"]
    assert tokens.claims(exp=None, aud=["x"])["aud"] == ["x"]
    assert "exp" not in tokens.claims(exp=None)
