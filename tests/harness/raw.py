"""A client that sends exactly the bytes it is given, at once or in pieces, over HTTP/1.1 or HTTP/2."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator, Mapping, Sequence

from ext_authz.demo.ports import HOST
from tests.harness.answer import Answer, lower

DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4


def http1(headers: Mapping[str, str], *rest: bytes) -> list[bytes]:
    """The pieces of a request: its head, and what follows."""
    lines = ["POST /x HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in headers.items())]
    return ["\r\n".join(lines).encode() + b"\r\n\r\n", *rest]


def http2(headers: Mapping[str, str], *rest: bytes) -> list[bytes]:
    """Like `http1`, where frames of stream 1 follow."""
    pseudo = {":method": "POST", ":scheme": "http", ":authority": "x", ":path": "/x"}
    head = frame(HEADERS, END_HEADERS, literal({**pseudo, **headers}))
    return [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, stream=0) + head, *rest]


def frame(kind: int, flags: int, payload: bytes = b"", stream: int = 1) -> bytes:
    """RFC 9113 §4.1."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(headers: Mapping[str, str]) -> bytes:
    """Header fields by RFC 7541 §6.2.2, without table and Huffman coding."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())


@contextlib.contextmanager
def sent(port: int, pieces: Sequence[bytes], pause: float = 0.0) -> Iterator[socket.socket]:
    """An open connection over which the pieces were sent, `pause` seconds apart."""
    with socket.create_connection((HOST, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i, piece in enumerate(pieces):
            time.sleep(pause if i else 0)
            connection.sendall(piece)
        yield connection


def exchange(port: int, data: bytes) -> Answer:
    """The answer to exactly these bytes."""
    with socket.create_connection((HOST, port), timeout=5) as connection:
        connection.sendall(data)
        # Not read to the end of the connection: after a refusal Envoy keeps it open for a second.
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            return Answer(response.status, lower(response.getheaders()), response.read())


def _text(text: str) -> bytes:
    """RFC 7541 §5.1 and §5.2."""
    data, length = text.encode(), len(text)
    if length < 127:
        return bytes([length]) + data
    length -= 127
    prefix = bytearray([127])
    while length >= 128:
        prefix.append(length % 128 + 128)
        length //= 128
    return bytes([*prefix, length]) + data
