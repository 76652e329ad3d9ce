"""The protocol between an owner and its workers: JSON messages, each prefixed with its length in four bytes.

Both sides read in order, so a worker has installed every epoch that was sent before the message that it answers. On
anything that is not a message, the reader closes the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from ext_authz.observe.counts import Counts

MAX_FRAME = 64 * 1024 * 1024  # bytes; a policy is up to 8 MiB, and its 64 issuers have up to 100 keys each
_LENGTH = 4  # bytes

M = TypeVar("M")


class BadFrame(Exception):
    """Not a message. The text never contains any of the data, which may include keys."""


@dataclass(frozen=True, slots=True)
class Start:
    """The worker's number and settings. Always the first message to it."""

    number: int
    listen: str
    max_concurrent: int
    cached_tokens: int
    cached_decisions: int
    log_level: str
    kind: Literal["start"] = "start"


@dataclass(frozen=True, slots=True)
class PolicyText:
    """A policy that later epochs may use: the content of the file at `path`. The answer is Compiled."""

    digest: str
    text: str
    path: str
    kind: Literal["policy"] = "policy"


@dataclass(frozen=True, slots=True)
class Install:
    """Decide with this epoch: the policy with this digest, and the keys (`jwk.key_text`) by issuer.

    The answer is Installed. `order` increases with each message. `epoch`, `lease_epoch` and `grants` are as in the
    owner's epoch.
    """

    order: int
    epoch: int
    policy: str
    keys: Mapping[str, tuple[str, ...]]
    lease_epoch: str
    grants: bool
    kind: Literal["install"] = "install"


@dataclass(frozen=True, slots=True)
class Listen:
    """Accept checks from now on. The answer is Listening."""

    kind: Literal["listen"] = "listen"


@dataclass(frozen=True, slots=True)
class Poll:
    """A request for the counts. The answer is Counted, with the same `order`."""

    order: int
    kind: Literal["poll"] = "poll"


@dataclass(frozen=True, slots=True)
class Refreshed:
    """The keys of `issuer` have been refreshed. If they changed, the new epoch was sent before this."""

    issuer: str
    kind: Literal["refreshed"] = "refreshed"


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish running checks within `drain` seconds, then exit."""

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
class Counted:
    """The worker's counts since its start. None: unchanged since the last report."""

    order: int
    counts: Counts | None
    kind: Literal["counted"] = "counted"


@dataclass(frozen=True, slots=True)
class Refresh:
    """A token names a key of `issuer` that the worker does not know. The answer is Refreshed."""

    issuer: str
    kind: Literal["refresh"] = "refresh"


ToWorker = Start | PolicyText | Install | Listen | Poll | Refreshed | Stop
ToOwner = Compiled | Installed | Listening | Counted | Refresh
Message = ToWorker | ToOwner

TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(Annotated[ToWorker, Field(discriminator="kind")])
TO_OWNER: TypeAdapter[ToOwner] = TypeAdapter(Annotated[ToOwner, Field(discriminator="kind")])
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def frame(message: Message) -> bytes:
    """The message as bytes on the socket."""
    data = _ANY.dump_json(message)
    if len(data) > MAX_FRAME:
        raise BadFrame(f"a message of {len(data)} bytes, at most {MAX_FRAME} are allowed")
    return len(data).to_bytes(_LENGTH, "big") + data


async def read_to_worker(reader: asyncio.StreamReader) -> ToWorker | None:
    """The owner's next message; None if the owner is gone. BadFrame for anything else."""
    return await _message(reader, TO_WORKER, "a worker")


async def read_to_owner(reader: asyncio.StreamReader) -> ToOwner | None:
    """A worker's next message; None if the worker is gone. BadFrame for anything else."""
    return await _message(reader, TO_OWNER, "an owner")


async def _message(reader: asyncio.StreamReader, known: TypeAdapter[M], to: str) -> M | None:
    data = await _read(reader)
    try:
        return None if data is None else known.validate_json(data, strict=True)
    except ValidationError:
        raise BadFrame(f"not a message to {to}") from None


async def _read(reader: asyncio.StreamReader) -> bytes | None:
    """One frame; None at the end. A truncated frame is the end, too: a killed process may leave one."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH), "big")
        if length > MAX_FRAME:
            raise BadFrame(f"a message of {length} bytes, at most {MAX_FRAME} are allowed")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None
