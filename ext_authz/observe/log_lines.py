"""The server's log: one JSON object a line, on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonLines(logging.Formatter):
    """One JSON object a record, on one line whatever the record holds. `worker` is the number of a worker's process."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._process = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{record.msecs:03.0f}Z", "level": record.levelname.lower(),
            "logger": record.name, **self._process, "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info and record.exc_info[0]:
            entry["error"] = record.exc_info[0].__name__
        return json.dumps(entry)


def start(level: str, worker: int | None = None) -> None:
    """Log from `level` (debug, info, warning, error) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(worker))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change in the folder
