"""An event loop with simulated time: when every task sleeps, the clock jumps to the next one that wakes.

Hours of protocol run in seconds, and in the same order every time: nothing here reads the machine's clock, and work
that would go to a thread runs in place, so that no scheduler of the operating system has a say.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple

from evensong.wire.errors import EvensongError

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

START_UNIX_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z


class DeadlockError(EvensongError):
    """Every task waits for something that will never happen."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """:func:`asyncio.run` under simulated time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


class SimulatedClock:
    """The clock of the running :class:`VirtualTimeLoop`; implements :class:`evensong.wire.clock.Clock`."""

    def __init__(self, start_unix_ms: int = START_UNIX_MS) -> None:
        self._loop = asyncio.get_running_loop()
        if not isinstance(self._loop, VirtualTimeLoop):
            raise EvensongError("a simulated clock needs a simulated loop", fix="Start with virtual_time.run(main()).")
        self._start_unix_ms = start_unix_ms

    def unix_ms(self) -> int:
        return self._start_unix_ms + round(self._loop.time() * 1000)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop over a selector that jumps instead of waiting. Starts at 0 s."""

    def __init__(self) -> None:
        self._jump = _JumpingSelector()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now

    def run_in_executor(
        self, executor: object, func: Callable[[*Arguments], T], *args: *Arguments
    ) -> asyncio.Future[T]:
        """Runs ``func`` now, in this thread; also serves :func:`asyncio.to_thread`."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class _JumpingSelector(selectors.SelectSelector):
    """Where a loop would wait for ``timeout`` seconds, this moves ``now`` on by as much."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)  # the loop's own wake-up pipe
        if not ready:
            if timeout is None:
                raise DeadlockError(
                    "nothing is left to happen, and a task still waits", fix="Await something with a deadline."
                )
            self.now += max(timeout, 0.0)
        return ready
