"""Runs a command that ends when its parent does: ``python leash.py PARENT_PID COMMAND...``.

A launcher, and not a ``preexec_fn`` of :mod:`subprocess`: that would fork a process that runs gRPC, whose poller aborts
the forked child (grpc/grpc#43055).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Becomes ``command``; on Linux the kernel will send it SIGTERM when ``parent`` has ended."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere leaving the with block of Children is all there is
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit("the parent ended before its child began")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
