"""A network inside one process: calls go straight to the coordinator's dispatcher, delayed or lost on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from evensong.wire.clock import Clock
from evensong.wire.errors import EvensongError, UnreachableError
from evensong.wire.transport import Dispatcher, Metadata


@dataclass(frozen=True)
class Network:
    """How bad the network is: probabilities per message, latencies in seconds, uniform in [low, high], each way."""

    latency: tuple[float, float] = (0.01, 0.05)
    lost_request: float = 0.0
    #: The coordinator acted, and the device never learns: what idempotent calls are for.
    lost_response: float = 0.0
    #: How long a caller waits for an answer that never comes.
    timeout: float = 10.0

    def __post_init__(self) -> None:
        low, high = self.latency
        if not (0 <= low <= high and self.timeout > 0):
            raise EvensongError("the network's times are wrong", expected="0 <= low <= high, timeout > 0", got=self)
        if not (0 <= self.lost_request < 1 and 0 <= self.lost_response < 1):
            raise EvensongError("the network's losses are wrong", expected="0 <= probability < 1", got=self)


class InMemoryTransport:
    """One device's line to a dispatcher; implements :class:`evensong.wire.transport.Transport`.

    ``random`` decides delays and losses: give each device its own, and no device's traffic changes another's luck.
    ``lost`` counts messages that did not arrive.
    """

    def __init__(self, dispatcher: Dispatcher, clock: Clock, network: Network, random: np.random.Generator) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._network = network
        self._random = random
        self.lost = 0

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        await self._travel(method, self._network.lost_request)
        answer = await self._dispatcher.call(method, body, metadata)
        await self._travel(method, self._network.lost_response)
        return answer

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        await self._travel(method, self._network.lost_request)
        async for message in self._dispatcher.stream(method, body, metadata):
            await self._travel(method, self._network.lost_response)
            yield message

    async def close(self) -> None:
        """Nothing to close."""

    async def _travel(self, method: str, loss: float) -> None:
        delay, luck = self._random.uniform(*self._network.latency), self._random.random()
        if luck < loss:
            self.lost += 1
            await self._clock.sleep(self._network.timeout)
            raise UnreachableError(
                f"no answer to {method}", expected=f"one within {self._network.timeout} s", fix="Try again."
            )
        await self._clock.sleep(delay)
