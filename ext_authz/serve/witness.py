"""What happens to a decision after its response: the shadow policy is compared with it, and the log records it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric

from ext_authz.core.model import Decision, Request
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.decision_log import DecisionLog
from ext_authz.observe.decision_record import RecordWriter
from ext_authz.observe.metrics import gauge
from ext_authz.review.shadow import Shadow
from ext_authz.settings import Settings

log = logging.getLogger("srp.witness")


class Witness:
    """Sees each decision once, after its response. No failure here can affect the response."""

    def __init__(self, shadow: Shadow | None, log: DecisionLog | None) -> None:
        self._shadow = shadow
        self._log = log
        self._records = RecordWriter()
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, settings: Settings) -> Witness | None:
        """The witness that the settings call for; None if they call for none."""
        if settings.shadow_policy is None and settings.decision_log is None:
            return None
        shadow = Shadow(settings.shadow_policy) if settings.shadow_policy else None
        size, keep = settings.decision_log_size, settings.decision_log_keep
        return cls(shadow, DecisionLog(settings.decision_log, size, keep) if settings.decision_log else None)

    def __call__(self, snapshot: Snapshot, request: Request, decision: Decision, decision_id: str, now: float) -> None:
        """Take a `decision` made under `snapshot` at `now` (seconds since the epoch), with the id `decision_id`."""
        difference = self._shadow.judge(request, decision, now) if self._shadow else None
        if self._log is not None:
            self._log.add(self._records.line(snapshot, request, decision, decision_id, now, difference))

    def start(self) -> None:
        """Open the log and follow the shadow policy. OSError if the log cannot be opened."""
        if self._log is not None:
            self._log.start()
        if self._shadow is not None:
            self._watching = asyncio.create_task(self._shadow.watch())
            self._watching.add_done_callback(_ended)

    def set_active(self, active: Snapshot) -> None:
        """Note that `active` is in force from now on."""
        if self._shadow is not None:
            self._shadow.set_active(active)

    async def close(self) -> None:
        """Stop following the shadow policy, and write the log's pending lines."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._shadow is not None:
            await self._shadow.close()
        if self._log is not None:
            await asyncio.to_thread(self._log.close)

    def report(self) -> dict[str, Any]:
        """The witness's part of `/status`."""
        status: dict[str, Any] = {}
        if self._shadow is not None:
            status["shadow"] = dataclasses.asdict(self._shadow.status)
        if self._log is not None:
            status["decision_log"] = self._log.counts
        return status

    def families(self) -> Iterator[Metric]:
        """The witness's part of `/metrics`."""
        if self._shadow is not None:
            decisions = CounterMetricFamily(
                "srp_shadow_decisions",
                "Decisions by how the shadow policy would have differed.",
                labels=["difference"],
            )
            for difference, n in sorted(self._shadow.differences.items()):
                decisions.add_metric([difference], n)
            yield decisions
            error = self._shadow.status.error is not None
            yield gauge("srp_shadow_policy_error", "1 while the newest shadow policy file is rejected.", float(error))
        if self._log is not None:
            records = CounterMetricFamily("srp_decision_log_records", "Decision records.", labels=["outcome"])
            for outcome, n in self._log.counts.items():
                records.add_metric([outcome], n)
            yield records


def _ended(watching: asyncio.Task[None]) -> None:
    if not watching.cancelled() and (error := watching.exception()):
        log.error("the shadow policy is no longer followed: %s", type(error).__name__)
