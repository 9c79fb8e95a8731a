"""Kills a daemon under a working fleet: at each named place, or at random times."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from daemon_process import PATIENCE_S, Daemon


class WorkingFleet(Protocol):
    """Devices that work without end against a daemon that dies again and again."""

    idle: bool  #: set while the fleet shall let a round starve

    async def begin(self) -> list[asyncio.Task[None]]: ...

    async def end(self, working: list[asyncio.Task[None]]) -> None: ...


Fleet = TypeVar("Fleet", bound=WorkingFleet)


async def crash_at_each_point(daemon: Daemon, make: Callable[[Daemon], Fleet], points: Sequence[str]) -> Fleet:
    """Every place once; each must be reached."""
    daemon.start()
    fleet = make(daemon)
    working = await fleet.begin()
    daemon.terminate()
    assert daemon.join() == 0
    for point in points:
        fleet.idle = point.startswith("abandon")
        daemon.start(crash_at=point)
        deadline = time.monotonic() + PATIENCE_S
        while daemon.exit_code is None:
            await asyncio.sleep(0.01)
            failed = [task for task in working if task.done()]
            assert not failed, failed
            assert time.monotonic() < deadline, f"{point} is never reached"
        assert daemon.exit_code == -signal.SIGKILL, daemon.log.read_text()[-2_000:]
    daemon.start()
    await fleet.end(working)
    return fleet


async def crash_at_random_times(daemon: Daemon, make: Callable[[Daemon], Fleet], crashes: int) -> Fleet:
    """``crashes`` times, each within the second after the start; prints the seed of the times."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    times = random.Random(seed)
    daemon.start()
    fleet = make(daemon)
    working = await fleet.begin()
    for _ in range(crashes):
        await asyncio.sleep(times.uniform(0.0, 0.7))
        daemon.kill()
        assert daemon.join() == -signal.SIGKILL
        daemon.start()
        await daemon.address()
    await fleet.end(working)
    return fleet
