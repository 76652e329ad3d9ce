"""The demo's own issuer: one ES256 key in a private directory, and tokens signed with it. Never for production."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from jwt.algorithms import ECAlgorithm

ISSUER = "https://demo.srp.invalid/"
AUDIENCE = "moe-gateway"
ALGORITHM = "ES256"
KEY_FILE = "key.pem"
JWKS_FILE = "jwks.json"


@dataclass(frozen=True, slots=True)
class DemoKeys:
    """A signing key and the key id that it is published under."""

    kid: str
    _private: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, directory: Path) -> DemoKeys:
        """Create a key in `directory` (mode 0700): `key.pem` (mode 0600), and `jwks.json` for use in a policy.

        Replaces an existing key, whose tokens then no longer verify. OSError if the key cannot be written.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = ec.generate_private_key(ec.SECP256R1())
        public = ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
        kid = f"demo-{secrets.token_hex(4)}"
        jwks = {"keys": [{**public, "kid": kid, "use": "sig", "alg": ALGORITHM}]}
        _write(directory / KEY_FILE, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
        # Written last, so that the private key of a published key always exists.
        _write(directory / JWKS_FILE, json.dumps(jwks, indent=2).encode() + b"\n", 0o644)
        return cls(kid, private)

    @classmethod
    def load(cls, directory: Path) -> DemoKeys:
        """The key that `create` made in `directory`. ValueError if it is missing or damaged."""
        try:
            private = load_pem_private_key((directory / KEY_FILE).read_bytes(), password=None)
            (published,) = json.loads((directory / JWKS_FILE).read_bytes())["keys"]
            kid = published["kid"]
            public = ECAlgorithm.from_jwk(published)
        except FileNotFoundError as e:
            raise ValueError(f"no demo key in {directory}: {e.filename} is missing; `srp demo` makes one") from None
        except OSError as e:
            raise ValueError(f"no demo key in {directory}: {e.filename}: {e.strerror}") from None
        except (ValueError, TypeError, KeyError, jwt.PyJWTError):
            raise ValueError(f"the demo key in {directory} is damaged: delete {KEY_FILE} and {JWKS_FILE}") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != public:
            raise ValueError(f"{KEY_FILE} and {JWKS_FILE} in {directory} are not one ES256 key: delete both")
        return cls(kid, private)

    def mint(
        self,
        claims: Mapping[str, Any],
        ttl: float,
        *,
        issuer: str = ISSUER,
        audience: str = AUDIENCE,
        kid: str | None = None,
    ) -> str:
        """A token that is valid from now for `ttl` seconds. `claims` may override any claim and are not checked.

        ValueError if a claim cannot be represented in JSON.
        """
        now = time.time()
        payload = {"iss": issuer, "aud": audience, "iat": int(now), "exp": ceil(now + ttl), **claims}
        try:
            data = json.dumps(payload, allow_nan=False).encode()
        except TypeError as e:
            raise ValueError(f"a claim cannot be represented in JSON: {e}") from None
        return jwt.PyJWS().encode(data, self._private, ALGORITHM, headers={"kid": kid or self.kid})


def _write(path: Path, data: bytes, mode: int) -> None:
    """Replace the file atomically: a reader sees the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
