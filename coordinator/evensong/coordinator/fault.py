"""Named places where a test may kill the process. A test aid: without ``EVENSONG_CRASH_AT`` each is an empty call.

``EVENSONG_CRASH_AT=collect.after_fsync:3`` sends SIGKILL to the process itself when it comes to that place the
third time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

#: Called with the name of the place; may raise or never return.
Fault = Callable[[str], None]

#: Every place, in the order in which a round meets them.
CRASH_POINTS = (
    "enrol.before_commit",
    "enrol.after_commit",
    "assign.before_commit",
    "assign.after_commit",
    "begin.before_commit",
    "begin.after_commit",
    "chunk.before_write",
    "chunk.after_write",
    "collect.before_fsync",
    "collect.after_fsync",
    "collect.before_commit",
    "collect.after_commit",
    *(
        f"secure.{stage}.{moment}_commit"
        for stage in ("advertise", "shares", "masked", "commit", "unmask", "close")
        for moment in ("before", "after")
    ),
    "aggregate.before_mean",
    "step.before",
    "step.after",
    "commit.after_blobs",
    "commit.before_commit",
    "commit.after_commit",
    "evaluate.before_commit",
    "evaluate.after_commit",
    "abandon.before_commit",
    "abandon.after_commit",
)

ENVIRONMENT = "EVENSONG_CRASH_AT"


def no_fault(name: str) -> None:
    """Production's."""


def from_environment() -> Fault:
    """The hook that ``EVENSONG_CRASH_AT`` asks for, or the empty one."""
    wanted, _, count = os.environ.get(ENVIRONMENT, "").partition(":")
    if not wanted:
        return no_fault
    if wanted not in CRASH_POINTS:
        raise ValueError(f"{ENVIRONMENT} names no crash point: {wanted!r}")
    left = int(count or 1)
    lock = threading.Lock()

    def crash(name: str) -> None:
        nonlocal left
        if name != wanted:
            return
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return crash
