"""Which URLs keys may be fetched from. Judged here alone: what `srp check` accepts, the key store fetches. Pure."""

from __future__ import annotations

import re
from ipaddress import ip_address

from yarl import URL

_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")  # RFC 3986 §2
_AUTHORITY_END = re.compile(r"[/?#]")


def jwks_url(text: str) -> URL:
    """The URL: https, or http to this host's loopback. ValueError says what is wrong, and never repeats a password."""
    if "@" in _AUTHORITY_END.split(text.partition("//")[2], maxsplit=1)[0]:
        raise ValueError("a user or password in a URL is not supported")  # said first: other mistakes quote the URL
    if _CHARACTERS.fullmatch(text) is None:
        raise ValueError("expected a URL of the characters of RFC 3986")
    try:
        url = URL(text)
        port = url.port
    except ValueError:
        raise ValueError("expected a URL that can be read") from None
    if not url.host or url.fragment or url.user is not None or port == 0:
        raise ValueError("expected a URL with a host and without a fragment")
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url.host)):
        raise ValueError("expected https; http is for a loopback host only")
    return url


def shown(text: str) -> str:
    """The URL for people: without user or query, which may hold a secret."""
    try:
        return str(URL(text).with_user(None).with_query(None).with_fragment(None))
    except ValueError:
        return "the JWKS URL"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
