"""The server's log: one JSON object per line on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonLines(logging.Formatter):
    """Formats each record as one line of JSON, whatever it contains. `worker` is the worker's number, if any."""

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
    """Log at `level` (debug, info, warning, error) and above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(worker))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("cel").setLevel(logging.CRITICAL)  # of each call that fails, which is counted already
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs every change in the folder
