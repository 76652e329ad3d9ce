"""What an owner and its workers say to each other: JSON messages, each after its length in four bytes.

Both sides read in order, so a worker has taken over every epoch that was sent before what it answers to. Whoever gets
what is no message ends the conversation: there is no telling what the other side meant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from ext_authz.observe.counts import Counts

MAX_FRAME = 64 * 1024 * 1024  # bytes; a policy has up to 8 MiB, and its 64 issuers up to 100 keys each
_LENGTH = 4  # bytes

M = TypeVar("M")


class BadFrame(Exception):
    """Not a message. The text never holds a byte of it: it may have held keys."""


@dataclass(frozen=True, slots=True)
class Start:
    """Who the worker is to be. The first message that it gets."""

    number: int
    listen: str
    max_concurrent: int
    cached_tokens: int
    cached_decisions: int
    log_level: str
    kind: Literal["start"] = "start"


@dataclass(frozen=True, slots=True)
class PolicyText:
    """A policy that epochs may be of from now on, as it stands in the file at `path`. The answer is Compiled."""

    digest: str
    text: str
    path: str
    kind: Literal["policy"] = "policy"


@dataclass(frozen=True, slots=True)
class EpochOf:
    """Decide by this: the policy of this digest and these keys (`jwk.key_text`), by issuer. The answer is Installed.

    `order` grows with each one sent. `epoch`, `lease_epoch` and `grants` are the owner's own.
    """

    order: int
    epoch: int
    policy: str
    keys: Mapping[str, tuple[str, ...]]
    lease_epoch: str
    grants: bool
    kind: Literal["epoch"] = "epoch"


@dataclass(frozen=True, slots=True)
class Listen:
    """Take checks from now on. The answer is Listening."""

    kind: Literal["listen"] = "listen"


@dataclass(frozen=True, slots=True)
class Ask:
    """The answer is Told, with the same `order`."""

    order: int
    kind: Literal["ask"] = "ask"


@dataclass(frozen=True, slots=True)
class Refreshed:
    """The keys of `issuer` are as new as can be; if they changed, the epoch came before this."""

    issuer: str
    kind: Literal["refreshed"] = "refreshed"


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish the checks that run, in `drain` seconds at most, and end."""

    drain: float
    kind: Literal["stop"] = "stop"


@dataclass(frozen=True, slots=True)
class Compiled:
    digest: str
    kind: Literal["compiled"] = "compiled"


@dataclass(frozen=True, slots=True)
class Installed:
    order: int
    epoch: int
    kind: Literal["installed"] = "installed"


@dataclass(frozen=True, slots=True)
class Listening:
    kind: Literal["listening"] = "listening"


@dataclass(frozen=True, slots=True)
class Told:
    """All that the worker has counted so far; None: what it told last still holds."""

    order: int
    counts: Counts | None
    kind: Literal["told"] = "told"


@dataclass(frozen=True, slots=True)
class Refresh:
    """A token names a key of `issuer` that the worker does not know. The answer is Refreshed."""

    issuer: str
    kind: Literal["refresh"] = "refresh"


ToWorker = Start | PolicyText | EpochOf | Listen | Ask | Refreshed | Stop
ToOwner = Compiled | Installed | Listening | Told | Refresh
Message = ToWorker | ToOwner

TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(Annotated[ToWorker, Field(discriminator="kind")])
TO_OWNER: TypeAdapter[ToOwner] = TypeAdapter(Annotated[ToOwner, Field(discriminator="kind")])
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def frame(message: Message) -> bytes:
    """The message as it is sent."""
    data = _ANY.dump_json(message)
    if len(data) > MAX_FRAME:
        raise BadFrame(f"a message of {len(data)} bytes, at most {MAX_FRAME} are allowed")
    return len(data).to_bytes(_LENGTH, "big") + data


async def read_to_worker(reader: asyncio.StreamReader) -> ToWorker | None:
    """The owner's next message, None if it is gone; BadFrame for anything else."""
    return await _message(reader, TO_WORKER, "a worker")


async def read_to_owner(reader: asyncio.StreamReader) -> ToOwner | None:
    """A worker's next message, None if it is gone; BadFrame for anything else."""
    return await _message(reader, TO_OWNER, "an owner")


async def _message(reader: asyncio.StreamReader, known: TypeAdapter[M], to: str) -> M | None:
    data = await _read(reader)
    try:
        return None if data is None else known.validate_json(data, strict=True)
    except ValidationError:
        raise BadFrame(f"not a message to {to}") from None


async def _read(reader: asyncio.StreamReader) -> bytes | None:
    """One frame; None at the end, also in the middle of a frame: who is killed finishes no sentence."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH), "big")
        if length > MAX_FRAME:
            raise BadFrame(f"a message of {length} bytes, at most {MAX_FRAME} are allowed")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None
