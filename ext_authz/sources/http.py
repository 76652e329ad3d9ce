"""Outgoing HTTP requests: bounded, and trusting only what the caller names."""

from __future__ import annotations

import aiohttp


def session_for(timeout: float) -> aiohttp.ClientSession:
    """No cookies, no proxy from the environment, a new connection and DNS look-up each time; `timeout` in seconds."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, use_dns_cache=False),
        timeout=aiohttp.ClientTimeout(total=timeout),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
    )


async def body_of(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    """The body; None if it has more than `most` bytes, and then the rest is not read."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(16 * 1024):
        body += chunk
        if len(body) > most:
            return None
    return bytes(body)
