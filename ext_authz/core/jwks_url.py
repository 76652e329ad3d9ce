"""Which URLs keys may be fetched from. The only such check: the key store fetches what `srp check` accepts. Pure."""

from __future__ import annotations

import re
from ipaddress import ip_address

from yarl import URL

_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")  # RFC 3986 §2
_AUTHORITY_END = re.compile(r"[/?#]")


def jwks_url(text: str) -> URL:
    """The URL: https, or http to this host's loopback. ValueError says what is wrong, without repeating a password."""
    if "@" in _AUTHORITY_END.split(text.partition("//")[2], maxsplit=1)[0]:
        raise ValueError("a user or password in a URL is not supported")  # checked first: other messages quote the URL
    if _CHARACTERS.fullmatch(text) is None:
        raise ValueError("expected only characters that RFC 3986 allows in a URL")
    try:
        url = URL(text)
        port = url.port
    except ValueError:
        raise ValueError("expected a valid URL") from None
    if not url.host or url.fragment or url.user is not None or port == 0:
        raise ValueError("expected a URL with a host and without a fragment")
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url.host)):
        raise ValueError("expected https; http is for a loopback host only")
    return url


def shown(text: str) -> str:
    """The URL for display: without user and query, which may contain a secret."""
    try:
        return str(URL(text).with_user(None).with_query(None).with_fragment(None))
    except ValueError:
        return "the JWKS URL"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
