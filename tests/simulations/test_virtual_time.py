"""Simulated time: jumps, keeps order, runs threads' work in place, and says when nothing can happen any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from evensong.simulations import virtual_time
from evensong.simulations.virtual_time import DeadlockError, SimulatedClock
from evensong.wire.errors import EvensongError


def test_sleeping_jumps_and_keeps_the_order_of_waking() -> None:
    woken: list[tuple[str, int]] = []

    async def sleeper(name: str, seconds: float, clock: SimulatedClock) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.unix_ms() - virtual_time.START_UNIX_MS))

    async def main() -> None:
        clock = SimulatedClock()
        await asyncio.gather(
            sleeper("night", 36_000, clock), sleeper("blink", 0.25, clock), sleeper("hour", 3_600, clock)
        )

    virtual_time.run(main())
    assert woken == [("blink", 250), ("hour", 3_600_000), ("night", 36_000_000)]


def test_timeouts_follow_the_simulated_clock() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(86_400 * 30):
                await loop.create_future()
        return loop.time()

    assert virtual_time.run(main()) == pytest.approx(86_400 * 30)


def test_work_for_threads_runs_in_place() -> None:
    async def main() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(threading.get_ident), await loop.run_in_executor(None, threading.get_ident)

    assert set(virtual_time.run(main())) == {threading.get_ident()}


def test_an_error_in_such_work_reaches_the_one_who_waits() -> None:
    async def main() -> None:
        await asyncio.to_thread(int, "no number")

    with pytest.raises(ValueError, match="no number"):
        virtual_time.run(main())


def test_waiting_for_nothing_is_an_error_and_not_a_hang() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlockError, match="nothing is left to happen"):
        virtual_time.run(main())


def test_the_clock_refuses_a_real_loop() -> None:
    async def main() -> None:
        SimulatedClock()

    with pytest.raises(EvensongError, match="simulated loop"):
        asyncio.run(main())
