"""How the threads of a server process share a core."""

from __future__ import annotations

import contextlib
import os
import sys

SWITCH_INTERVAL = 0.0002  # seconds that a thread keeps the interpreter while another waits for it


def take_turns() -> None:
    """Settle how the threads of this process, those to come too, take turns. Children inherit the second half.

    At the interpreter's default of 5 ms a thread that compiles a policy holds up checks, and a busy loop, which lets go
    of the interpreter for a moment each round, never lets the log's writer have it. And gRPC's threads wake for each
    event, to hand it to the loop: as SCHED_BATCH (sched(7)) they wait until the loop is idle, and hand it several. A
    policy that somebody chose for this process stays.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    with contextlib.suppress(OSError, AttributeError):  # not allowed here, or not Linux
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
