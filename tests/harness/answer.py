"""An HTTP answer as a client sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """Header names are in lower case; a repeated header is joined by commas."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float = 0.0  # between request and answer
    upstream: Mapping[str, str] | None = None  # the headers that reached the expert; None: no expert was asked

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error."""
        return str(self.json["error"]["code"])

    @property
    def id(self) -> str:
        """The id of the decision."""
        return self.headers.get("x-srp-decision-id", "")


def lower(headers: list[tuple[str, str]]) -> dict[str, str]:
    """Headers as an Answer has them."""
    found: dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        found[name] = f"{found[name]},{value}" if name in found else value
    return found
