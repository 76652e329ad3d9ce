"""How the threads of a server process share a CPU core."""

from __future__ import annotations

import contextlib
import os
import sys

SWITCH_INTERVAL = 0.0002  # seconds that a thread keeps the GIL while another waits for it


def set_scheduling() -> None:
    """Set how the threads of this process, present and future, are scheduled. Children inherit SCHED_BATCH.

    At the interpreter's default switch interval of 5 ms, a thread that compiles a policy delays checks, and a busy
    event loop, which releases the GIL only briefly on each iteration, starves the log's writer thread.

    gRPC's threads wake for each event to hand it to the event loop. Under SCHED_BATCH (sched(7)) they wait until the
    loop is idle and hand over several events at once. A scheduling policy that was set for this process stays.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    with contextlib.suppress(OSError, AttributeError):  # not permitted, or not Linux
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
