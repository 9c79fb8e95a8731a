"""Wakes those who wait for news: held check-ins, the conductor, watchers. No news is lost between a look and the
wait."""

from __future__ import annotations

import asyncio
import threading


class Pulse:
    """Take :meth:`next` first, look, then await what was taken: a beat in between is not missed.

    ``beat`` may be called from any thread; waiters live on one event loop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._future: asyncio.Future[None] | None = None

    def next(self) -> asyncio.Future[None]:
        """Done at the next beat. Shared by all waiters: shield it, never cancel it."""
        with self._lock:
            if self._future is None or self._future.done():
                self._future = asyncio.get_running_loop().create_future()
            return self._future

    def beat(self) -> None:
        with self._lock:
            future, self._future = self._future, None
        if future is None:
            return
        loop = future.get_loop()
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            _finish(future)
        elif not loop.is_closed():
            loop.call_soon_threadsafe(_finish, future)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
