"""Everything that is fuzzed: checks, and the readers of policies, key sets, ADS streams and decision logs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import yaml
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.message import DecodeError

from benchmarks import fuzz_corpus as corpus
from benchmarks.fuzz_checks import Bodies, CheckRequests, Tokens
from benchmarks.fuzz_target import Target, Timed, WrongAnswerError, in_short
from benchmarks.mutations import TEXTS, changed_json, changed_yaml, damaged, odd_yaml
from ext_authz.core.jwk import parse_jwks
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.decision_record import Record
from ext_authz.policyfile.parse import parse_policy
from ext_authz.policyfile.source import PolicyError
from ext_authz.policyfile.warnings import warnings
from ext_authz.serve.epoch import Epoch
from ext_authz.wire.ads import SERVICE, Ads, Resources
from ext_authz.wire.clusters import TYPE_CLUSTER, cluster_resources
from ext_authz.wire.lease_filter import TYPE_EXTENSION, filter_resource
from ext_authz.wire.twin import twins

_TWINS = twins(DiscoveryRequest, DiscoveryResponse)
_DiscoveryRequest: Any = _TWINS[DiscoveryRequest]
_DiscoveryResponse: Any = _TWINS[DiscoveryResponse]


class Policies(Timed):
    """Policies: only PolicyError, and what is accepted serves for all that is made of a policy."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = corpus.policies()

    def mutate(self, random: Random, case: bytes, other: bytes) -> bytes:
        if case[:1] != b"{" and random.random() < 0.3:
            case = _as_json(case)
        return changed_json(random, case, other, odd_yaml) if case[:1] == b"{" else changed_yaml(random, case, other)

    async def run(self, case: bytes) -> str:
        self.spent = 0.0
        try:
            with self:
                policy = parse_policy(case, key_files=False)
        except PolicyError as e:
            for mistake in e.errors:
                if not mistake.message.isprintable() or not mistake.path.isprintable():
                    raise WrongAnswerError(f"a mistake that is not one line: {mistake.message!r}") from None
                if mistake.line < 1 or mistake.column < 1 or mistake.line > case.count(b"\n") + 1:
                    raise WrongAnswerError(f"a mistake at a place that the file lacks: {mistake}") from None
            return " / ".join(sorted({in_short(m.message) for m in e.errors}))[:300]
        Epoch.of(Snapshot(policy))
        cluster_resources(policy)
        filter_resource("-- a script", policy, "1")
        return f"accepted: {' / '.join(in_short(w) for w in warnings(policy))}"


def _as_json(text: bytes) -> bytes:
    """A short YAML text as JSON, which is YAML too, so that its tree can be changed; the same text if that fails."""
    if len(text) > 4096 or b"*" in text:
        return text
    try:
        return json.dumps(yaml.load(text, yaml.CSafeLoader), default=str).encode()
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError):
        return text


class _Texts(Timed):
    """A reader of one text that raises ValueError and nothing else."""

    def __init__(self, read: Callable[[bytes], Any], seeds: Sequence[bytes]) -> None:
        super().__init__()
        self.seeds = seeds
        self._read = read

    def mutate(self, random: Random, case: bytes, other: bytes) -> bytes:
        return changed_json(random, case, other)

    async def run(self, case: bytes) -> str:
        self.spent = 0.0
        try:
            with self:
                self._read(case)
        except ValueError as e:
            if not str(e).isprintable():
                raise WrongAnswerError(f"a message that is not one line: {e!r}") from None
            return in_short(str(e))
        return "accepted"


class Streams(Timed):
    """Streams of DiscoveryRequests, while one set of resources is replaced by another."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = corpus.discoveries()
        self._sets = [Resources.of({TYPE_CLUSTER: (b"c%d" % n,), TYPE_EXTENSION: (b"f%d" % n,)}) for n in range(2)]
        logging.getLogger("srp.xds").disabled = True

    def mutate(self, random: Random, case: bytes, other: bytes) -> bytes:
        if random.random() < 0.3:
            return damaged(random, case, other)
        messages = corpus.unframed(case)[:64]
        for _ in range(random.choice((1, 2, 4))):
            at = random.randrange(len(messages) + 1)
            match random.randrange(5):
                case 0:
                    messages.insert(at, random.choice([*messages, *corpus.unframed(other), b""]))
                case 1 if at < len(messages):
                    del messages[at]
                case 2 if at < len(messages):
                    messages[at] = damaged(random, messages[at], other)
                case _ if at < len(messages):
                    messages[at] = _changed_discovery(random, messages[at])
        return corpus.framed(messages)

    async def run(self, case: bytes) -> str:
        served = Ads(settle=0)
        await served.publish(self._sets[0])
        call = SimpleNamespace(method=f"/{SERVICE}/StreamAggregatedResources", invocation_metadata=())
        serve = served.handlers().service(call).stream_stream
        sent: list[bytes] = []
        publishing: list[asyncio.Task[Any]] = []

        async def write(response: bytes) -> None:
            sent.append(response)

        async def requests() -> AsyncIterator[bytes]:
            messages = corpus.unframed(case)
            for n, message in enumerate(messages):
                if n == len(messages) // 2:
                    publishing.append(asyncio.create_task(served.publish(self._sets[1])))
                yield message
                for _ in range(3):
                    await asyncio.sleep(0)

        self.spent = 0.0
        with _Watched() as tasks, self:
            await serve(requests(), SimpleNamespace(write=write))
            await asyncio.gather(*publishing)
            await asyncio.sleep(0)
        for error in tasks.errors():
            raise error
        if served.connected:
            raise WrongAnswerError("a stream that has ended and is still counted")
        responses = [_DiscoveryResponse.FromString(data) for data in sent]
        if not {r.type_url for r in responses} <= {TYPE_CLUSTER, TYPE_EXTENSION}:
            raise WrongAnswerError("a response for a type that is not served")
        results = [task.result().result.value for task in publishing]
        return f"{[r.type_url[-9:] for r in responses][:6]} {results} {served.acknowledged is not None} {bool(served.last_error)}"


class _Watched:
    """The tasks that start meanwhile: an exception in one that nobody awaits would be lost."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def __enter__(self) -> _Watched:
        def made(loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> asyncio.Task[Any]:
            task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **more)
            self._tasks.append(task)
            return task

        asyncio.get_running_loop().set_task_factory(made)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.get_running_loop().set_task_factory(None)

    def errors(self) -> list[BaseException]:
        ended = [task for task in self._tasks if task.done() and not task.cancelled()]
        return [error for task in ended if (error := task.exception()) is not None]


def _changed_discovery(random: Random, message: bytes) -> bytes:
    try:
        request = _DiscoveryRequest.FromString(message)
    except DecodeError:
        return message
    text = random.choice(("", "x" * 5000, *(t for t in TEXTS if t.isprintable())))
    match random.randrange(6):
        case 0:
            request.type_url = random.choice((TYPE_CLUSTER, TYPE_EXTENSION, text))
        case 1 | 2:
            request.response_nonce = random.choice(("1", "2", "3", "4", text))
        case 3:
            del request.resource_names[:]
            request.resource_names.extend([text] * random.choice((0, 1, 2, 1000)))
        case 4:
            request.error_detail.message = text
        case _:
            request.ClearField("error_detail")
    return bytes(request.SerializeToString())


TARGETS: dict[str, Callable[[], Target]] = {
    "check": CheckRequests,
    "tokens": Tokens,
    "bodies": Bodies,
    "policies": Policies,
    "jwks": lambda: _Texts(parse_jwks, corpus.key_sets()),
    "ads": Streams,
    "records": lambda: _Texts(Record.read, corpus.records()),
}
