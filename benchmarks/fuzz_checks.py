"""Checks, fuzzed: requests, tokens and bodies through `Authorization.check`, and what no answer may be."""

from __future__ import annotations

import json
import logging
import re
import sys
from random import Random
from typing import Any

from envoy_data_plane.envoy.config.core.v3 import HeaderValueOptionHeaderAppendAction
from envoy_data_plane.envoy.service.auth.v3 import CheckRequest, CheckResponse
from google.protobuf.message import DecodeError

from benchmarks import fuzz_corpus as corpus
from benchmarks.fuzz_corpus import END, NOW
from benchmarks.fuzz_target import Timed, WrongAnswerError, in_short
from benchmarks.mutations import changed_json, damaged
from ext_authz.core.headers import TARGET_CLUSTER, TIER
from ext_authz.core.model import STATUS, Reason
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.metrics import Tally
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.wire.twin import twins

_TWINS = twins(CheckRequest, CheckResponse)
_CheckRequest: Any = _TWINS[CheckRequest]
_CheckResponse: Any = _TWINS[CheckResponse]
_OVERWRITE = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD


class _Errors(logging.Handler):
    """Keeps the exception that a log record tells of. The record itself has only its place."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.last = sys.exc_info()[1]


class _NoKeys:
    async def refresh(self, issuer: str) -> bool:
        return False


class _Checks:
    """A policy's Authorization, asked three times: a new question, one with a token seen before, and one cached."""

    def __init__(self, text: str, errors: _Errors, timed: Timed) -> None:
        self._errors = errors
        self._timed = timed
        self._base = corpus.snapshot(text)
        self._tally = Tally()
        self.forget()

    def forget(self) -> None:
        snapshot = Snapshot(self._base.policy, self._base.keys)
        writer = Epoch.of(snapshot, "1").writer
        epoch = Epoch(snapshot, writer, "1", grants=True)
        self._authorization = Authorization(epoch, _NoKeys(), self._tally, lambda: NOW)

    async def ask(self, data: bytes) -> Any:
        """The answer, parsed; the same each time, or it is a wrong one."""
        first, *others = [await self._ask(data) for _ in range(3)]
        response = _CheckResponse.FromString(first)
        plain = _without_id(first, response)
        for answer in others:
            if _without_id(answer, _CheckResponse.FromString(answer)) != plain:
                raise WrongAnswerError("the same question has another answer the second or third time")
        return response

    async def _ask(self, data: bytes) -> bytes:
        before, self._errors.last = self._tally.rpc_errors, None
        with self._timed:
            answer = await self._authorization.check(data)
        if self._tally.rpc_errors != before:
            error = self._errors.last
            if error is None:
                raise WrongAnswerError("an error that was counted and not logged")
            if not (isinstance(error, ValueError) and _raised_in(error) == "wire/check.py"):
                raise error
        return answer

    def judge(self, response: Any, genuine: bool) -> str:
        """What the answer is. `genuine`: the request has a token that its issuer has signed."""
        if response.status.code == 0:
            return self._allowed(response, genuine)
        denied = response.denied_response
        if response.WhichOneof("http_response") != "denied_response":
            raise WrongAnswerError("a denial without a response for the client")
        error = json.loads(denied.body)["error"]
        if denied.status.code != STATUS[Reason(error["code"])]:
            raise WrongAnswerError(f"status {denied.status.code} for {error['code']}")
        if any(not o.header.value.isprintable() or not o.header.value.isascii() for o in denied.headers):
            raise WrongAnswerError("a header to the client that is not visible ASCII")
        return f"{error['code']}: {in_short(error['message'])}"

    def _allowed(self, response: Any, genuine: bool) -> str:
        ok = response.ok_response
        if response.WhichOneof("http_response") != "ok_response":
            raise WrongAnswerError("an OK without a target cluster, and without any header")
        targets = [o for o in ok.headers if o.header.key == TARGET_CLUSTER]
        if len(targets) != 1 or not targets[0].header.value or targets[0].append_action != _OVERWRITE:
            raise WrongAnswerError("an OK without a target cluster that overwrites the client's")
        names = {text.partition(";")[0] for text in targets[0].header.value.split(",")}
        if not names <= set(self._base.policy.clusters):
            raise WrongAnswerError("an OK with a target cluster that no expert has")
        if any(not o.header.value.isprintable() or not o.header.value.isascii() for o in ok.headers):
            raise WrongAnswerError("a header to the expert that is not visible ASCII")
        tier = next((o.header.value for o in ok.headers if o.header.key == TIER), "")
        if tier != "low" and not genuine:
            raise WrongAnswerError(f"tier {tier or 'none'} without a genuine token")
        return f"OK {tier} {targets[0].header.value}"


def _without_id(answer: bytes, response: Any) -> bytes:
    decision_id = response.dynamic_metadata.fields["decision_id"].string_value.encode()
    return answer.replace(decision_id, b"") if decision_id else answer


def _raised_in(error: BaseException) -> str:
    """Room and file of the innermost frame."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "/".join(trace.tb_frame.f_code.co_filename.split("/")[-2:]) if trace else ""


class _Checked(Timed):
    """What the targets share that go through `Authorization.check`: by two policies, one that caches and one that
    reads all of the request."""

    def __init__(self) -> None:
        super().__init__()
        errors = _Errors()
        log = logging.getLogger("srp.server")
        log.handlers, log.propagate = [errors], False
        self._checks = [_Checks(text, errors, self) for text in (corpus.CACHED, corpus.READING)]
        self._genuine = frozenset(corpus.tokens())

    def forget(self) -> None:
        for checks in self._checks:
            checks.forget()

    async def _outcome(self, data: bytes, genuine: bool) -> str:
        self.spent = 0.0
        return " | ".join([c.judge(await c.ask(data), genuine) for c in self._checks])


class CheckRequests(_Checked):
    """CheckRequests: their fields, headers and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = corpus.check_requests()

    def mutate(self, random: Random, case: bytes, other: bytes) -> bytes:
        if random.random() < 0.4:
            return damaged(random, case, other)
        try:
            request = _CheckRequest.FromString(case)
        except DecodeError:
            return damaged(random, case, other)
        for _ in range(random.choice((1, 2, 4))):
            _change_http(random, request.attributes.request.http)
        return bytes(request.SerializeToString())

    async def run(self, case: bytes) -> str:
        return await self._outcome(case, any(token in case for token in self._genuine))


_NAMES = (
    "authorization", "x-expert-access-token", "x-expert-names", "x-requested-cluster", "x-target-cluster", "x-srp-downgrade",
    "content-type", "content-encoding", "x-envoy-auth-partial-body", "x-srp-tier", "x-team", ":path", "Authorization", "", "é",
)  # fmt: skip
_VALUES = (
    b"", b" ", b"Bearer", b"Bearer ", b"bearer  a.b.c", b"Basic YTpi", b"a.b.c", b"..", b"A", b"D", b"A,D", b"A;B", b",", b"A,,B",
    b"expert-d", b"gzip", b"identity", b"true", b"never", b"allow", b"application/json; charset=utf-16", b"\xff\xfe", b"\0",
    b"a\r\nb: c", b"A," * 64, b"x" * 70_000, b"bad", b"text/plain;charset", b";charset=" * 3000, b"; charset*=a" * 2000,
)  # fmt: skip
_PATHS = (
    "", "/", "/route", "/route?x", "/route;x", "/v1/", "/deep/", "/asked/", "/always", "//", "/../route", "*", "?", "/route\0", "é",
    "/x" * 1000, "http://x/route", "/ROUTE", "/route/",
)  # fmt: skip


def _change_http(random: Random, http: Any) -> None:
    headers = http.header_map.headers
    match random.randrange(9):
        case 0:
            http.path = random.choice(_PATHS)
        case 1:
            http.method = random.choice(("GET", "", "get", "CONNECT", "POST\0", "é", "A" * 5000))
        case 2 if headers:
            del headers[random.randrange(len(headers))]
        case 3 if headers:
            headers.add().CopyFrom(random.choice(headers))
        case 4 if headers:
            random.choice(headers).raw_value = random.choice(_VALUES)
        case 5 if headers:
            random.choice(headers).key = random.choice(_NAMES)
        case 6 if headers:
            header = random.choice(headers)
            header.raw_value = damaged(random, header.raw_value, random.choice(_VALUES))
        case 7:
            http.raw_body = changed_json(random, http.raw_body or b"{}", b"{}")
        case _:
            repeats = random.choice((1, 1, 2, 100))
            for _ in range(repeats):
                headers.add(key=random.choice(_NAMES), raw_value=random.choice(_VALUES))


class Tokens(_Checked):
    """Tokens, as `algorithm, header, payload, damage`: really signed, and then damaged if there is damage.

    Damage is a place and what stands there instead; or, for the algorithm `raw`, the payload is the whole token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [END.join((alg.encode(), *parts, b"")) for alg, *parts in corpus.token_parts()]
        self.seeds += [END.join((b"raw", b"", token, b"")) for token in corpus.tokens()[:4]]

    def mutate(self, random: Random, case: bytes, other: bytes) -> bytes:
        alg, header, payload, damage = _parts(case, 4)
        _, other_header, other_payload, _ = _parts(other, 4)
        match random.randrange(8):
            case 0:
                alg = random.choice([*corpus.KEYS, "raw"]).encode()
            case 1 | 2:
                header = changed_json(random, header, other_header)
            case 3:
                place = random.choice((random.randrange(80), random.randrange(600), -random.randrange(1, 90)))
                damage = b"%d:" % place + damaged(random, random.choice((b"", b"A", b"=", b".")), payload)
            case 4:
                damage = b""
            case _:
                payload = changed_json(random, payload, other_payload)
        return END.join((alg, header, payload, damage))

    async def run(self, case: bytes) -> str:
        alg, header, payload, damage = _parts(case, 4)
        name = alg.decode("latin-1")
        token = whole = corpus.signed(name, header, payload) if name in corpus.KEYS else payload
        place, colon, instead = damage.partition(b":")
        if colon and re.fullmatch(rb"-?\d{1,5}", place):
            at = min(int(place), len(token)) if int(place) >= 0 else max(0, len(token) + int(place))
            token = token[:at] + instead + token[at + 1 :]
        genuine = token.strip(b" ") in self._genuine or (name in corpus.KEYS and token.strip(b" ") == whole)
        asked = corpus.check_request([("x-expert-names", b"A,B,C,D"), ("authorization", b"Bearer " + token)])
        outcome = await self._outcome(asked, genuine)
        if not genuine and "OK" in outcome:
            raise WrongAnswerError("an OK for a token that no key has signed")
        return outcome


class Bodies(_Checked):
    """Bodies, as `path, content type, body`, through the rules of the gate that read one."""

    def __init__(self) -> None:
        super().__init__()
        texts = [
            (b"/route", b'{"token_id": 101, "expert_names": ["A", "B"]}'),
            (b"/route", b'{"expert_names":"A","input":[1,2.5,null,true,{"a":"\xc3\xa9"}]}'),
            (
                b"/v1/chat",
                b'{"model": "A", "messages": [{"role": "user", "content": "two plus two"}], "stream": false}',
            ),
            (b"/v1/chat", b'{"model":"nobody"}'),
            (b"/deep/x", b'{"a": {"b": [{"c/d": ["A", "C"]}]}}'),
            (b"/deep/x", b'{"a":{"b":[]}}'),
        ]
        self.seeds = [END.join((path, b"application/json", body)) for path, body in texts]

    def mutate(self, random: Random, case: bytes, other: bytes) -> bytes:
        path, kind, body = _parts(case, 3)
        if random.random() < 0.1:
            kind = damaged(random, kind, b"; charset=utf-8")
        if random.random() < 0.1:
            path = random.choice((b"/route", b"/v1/x", b"/deep/x"))
        return END.join((path, kind, changed_json(random, body, _parts(other, 3)[2])))

    async def run(self, case: bytes) -> str:
        path, kind, body = _parts(case, 3)
        return await self._outcome(
            corpus.check_request([("content-type", kind)], path.decode("utf-8", "replace"), body), False
        )


def _parts(case: bytes, n: int) -> list[bytes]:
    """The parts of a case; what is missing is empty."""
    found = case.split(END, n - 1)
    return [*found, *[b""] * (n - len(found))]
