"""Reads an issuer's keys from a URL, with aiohttp, or from a file. Bounded in size and time, and trusts nothing.

No redirect, no cookie, no proxy, no compression; https, or http to this host's loopback only.
"""

from __future__ import annotations

import asyncio
import ssl
import stat
from pathlib import Path

import aiohttp

from ext_authz.core.jwk import MAX_BYTES
from ext_authz.core.jwks_url import jwks_url
from ext_authz.core.policy import JwksSource
from ext_authz.sources.http import body_of


class SourceError(Exception):
    """A source gave no keys. The text goes to logs and `/status`, so it never contains a byte of what was read."""


async def fetch(session: aiohttp.ClientSession, source: JwksSource, text: str) -> bytes:
    """The body at the URL: status 200, at most MAX_BYTES, no redirect, no compression; otherwise SourceError."""
    try:
        url = jwks_url(text)
    except ValueError as e:
        raise SourceError(str(e)) from None
    headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
    if source.bearer_token_file is not None:
        headers["Authorization"] = f"Bearer {await asyncio.to_thread(_bearer_token, source.bearer_token_file)}"
    trust = True if source.ca_file is None else await asyncio.to_thread(_trust, source.ca_file)
    try:
        async with session.get(url, headers=headers, ssl=trust, allow_redirects=False) as response:
            if response.status != 200:
                raise SourceError(f"expected status 200, found {response.status}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise SourceError("sent a compressed body though none was asked for")
            body = await body_of(response, MAX_BYTES)
            if body is None:
                raise SourceError(f"holds over {MAX_BYTES} bytes")
            return body
    except TimeoutError:
        raise SourceError("no complete answer in time") from None
    except aiohttp.ClientConnectorError as e:
        raise SourceError(f"cannot connect: {e.os_error}") from None
    except aiohttp.ClientError as e:
        raise SourceError(f"the exchange failed: {type(e).__name__}") from None


def _trust(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as e:
        raise SourceError(f"cannot read CA certificates from {ca_file}: {e.strerror or e}") from None


def _bearer_token(file: str) -> str:
    try:
        token = read_file(file).decode("ascii").strip()
    except (SourceError, UnicodeDecodeError):
        token = ""
    if not token or not all("!" <= c <= "~" for c in token):
        raise SourceError(f"found no bearer token in {file}")
    return token


def read_file(path: str) -> bytes:
    file = Path(path)
    try:
        # A FIFO would block its thread forever.
        if not stat.S_ISREG(file.stat().st_mode):
            raise SourceError("is not a regular file")
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as e:
        raise SourceError(e.strerror or type(e).__name__) from None
    if len(data) > MAX_BYTES:
        raise SourceError(f"holds over {MAX_BYTES} bytes")
    return data
