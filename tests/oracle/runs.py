"""One policy, and requests to it one after another: the oracle and ext_authz, side by side."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tests.oracle import policies, requests
from tests.oracle.answers import Answer, Oracle, Request
from tests.oracle.policies import Case
from tests.oracle.server import Server, answered

REQUESTS = 80  # to each policy
_PAUSES = (0,) * 15 + (0.25, 0.25, 1, 10, 60)  # seconds between two of them
Step = tuple[Request, float]  # a request, and when it is made


@dataclass(frozen=True)
class Difference:
    """The last of `steps` gets another answer than the oracle's. `actual` is a text if it has no proper form."""

    case: Case
    steps: Sequence[Step]
    expected: Answer
    actual: Answer | str


class Run:
    """A case, as both sides see it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._server = Server(case)  # first, as it checks the policy
        self._oracle = Oracle(case.text, case.keys)
        self._newer = dict(case.newer)
        self.leeway = self._oracle.leeway
        self._expect: dict[Step, Answer] = {}
        self._steps: list[Step] = []

    async def step(self, request: Request, now: float) -> Difference | None:
        """Ask both. None if they agree."""
        self._steps.append((request, now))
        expected = self._expected(request, now)
        data = await self._server.check(request, now)
        try:
            actual: Answer | str = answered(data, self._server.looked_for)
        except (AssertionError, KeyError, ValueError) as e:
            actual = f"{type(e).__name__}: {e} in {data!r}"
        if actual != expected:
            return Difference(self.case, tuple(self._steps), expected, actual)
        if expected.error and (told := _secret_told(request, data)):
            return Difference(self.case, tuple(self._steps), expected, f"the answer tells {told!r}")
        return None

    def _expected(self, request: Request, now: float) -> Answer:
        """The oracle's answer, by newer keys if they are looked for. With the same keys it is always the same."""
        if (request, now) not in self._expect:
            answer = self._oracle.answer(request, now)
            if answer.fresh in self._newer:
                self._oracle.load(answer.fresh, self._newer.pop(answer.fresh))
                self._expect.clear()
                return replace(self._oracle.answer(request, now), fresh=answer.fresh)
            self._expect[request, now] = answer
        return self._expect[request, now]


def _secret_told(request: Request, data: bytes) -> bytes | None:
    """A part of a token that an answer repeats."""
    tokens = [value for name, value in request.headers if name in ("authorization", "x-expert-access-token")]
    return next((part for token in tokens for part in token.split(b".") if len(part) > 20 and part in data), None)


async def differences(seed: int, cases: int) -> AsyncIterator[Difference]:
    """Each difference in `cases` random requests, each of which is made twice. At most one for each policy."""
    for number in range(0, cases, REQUESTS):
        rng = random.Random(f"{seed} {number}")
        found = await _policy(rng, min(REQUESTS, cases - number))
        if found is not None:
            yield found


async def _policy(rng: random.Random, count: int) -> Difference | None:
    run = Run(policies.case(rng))
    now = float(policies.START)
    made: list[Request] = []
    known: dict[str, float] = {}
    for _ in range(count):
        if made and rng.random() < 0.35:
            request = requests.varied(rng, run.case, rng.choice(made[-20:]))
        else:
            request = requests.request(rng, run.case, now, known)
        made.append(request)
        times = [now, now + rng.choice(_PAUSES)]
        if rng.random() < 0.05 and times[1] < (end := _exp(request, known) + run.leeway) < now + 1000:
            times += [times[1], end]  # once more, from the cache, and then at the end of its token
        for now in times:
            if difference := await run.step(request, now):
                return difference
        now += rng.choice(_PAUSES)
    return None


def _exp(request: Request, known: Mapping[str, float]) -> float:
    """When the token of a request ends, without leeway; 0 if it has none."""
    sent = b" ".join(value for _, value in request.headers)
    return max((exp for token, exp in known.items() if token and token.encode("latin-1") in sent), default=0.0)


def differs(case: Case, steps: Sequence[Step]) -> Difference | None:
    """The difference at the last of these steps, if there is one there or before."""

    async def play() -> Difference | None:
        run = Run(case)
        for step in steps:
            if difference := await run.step(*step):
                return difference
        return None

    return asyncio.run(play())
