"""The in-memory network: bytes arrive unchanged, losses happen on the right side, luck follows the seed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from evensong.simulations import virtual_time
from evensong.simulations.counting import CountingTransport
from evensong.simulations.in_memory import InMemoryTransport, Network
from evensong.simulations.virtual_time import SimulatedClock
from evensong.wire.errors import EvensongError, UnreachableError
from evensong.wire.transport import DEVICE_SERVICE, Metadata


class Echo:
    """Answers with what came, and remembers how often it acted."""

    def __init__(self) -> None:
        self.acted: list[tuple[str, bytes, Metadata]] = []

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        self.acted.append((method, body, metadata))
        return body[::-1]

    async def stream(self, method: str, body: bytes, metadata: Metadata) -> AsyncIterator[bytes]:
        self.acted.append((method, body, metadata))
        for byte in body:
            yield bytes([byte])


async def _outcomes(network: Network, seed: int, calls: int = 200) -> tuple[list[bool], int, float]:
    """Whether each call was answered, how often the other side acted, and when it was over."""
    echo, clock = Echo(), SimulatedClock()
    transport = InMemoryTransport(echo, clock, network, np.random.default_rng(seed))
    answered = []
    for _ in range(calls):
        try:
            assert await transport.call(DEVICE_SERVICE + "CheckIn", b"abc", ()) == b"cba"
            answered.append(True)
        except UnreachableError:
            answered.append(False)
    return answered, len(echo.acted), clock.unix_ms() - virtual_time.START_UNIX_MS


def test_bytes_and_metadata_arrive_and_are_counted() -> None:
    async def main() -> None:
        echo, metadata = Echo(), [("evensong-signature-bin", b"\x00\xff"), ("evensong-device", "ab")]
        line = InMemoryTransport(echo, SimulatedClock(), Network(), np.random.default_rng(0))
        transport = CountingTransport(line)
        assert await transport.call(DEVICE_SERVICE + "CheckIn", b"hello", metadata) == b"olleh"
        received = [part async for part in transport.stream(DEVICE_SERVICE + "Download", b"xyz", metadata)]
        assert received == [b"x", b"y", b"z"]
        assert echo.acted[0] == (DEVICE_SERVICE + "CheckIn", b"hello", metadata)
        assert (transport.calls, transport.bytes_up, transport.bytes_down) == (2, 8 + 2 * (24 + 17), 8)

    virtual_time.run(main())


def test_a_lost_request_never_arrives_and_a_lost_response_does() -> None:
    answered, acted, _ = virtual_time.run(_outcomes(Network(lost_request=0.3), seed=1))
    assert acted == sum(answered) < 200
    answered, acted, _ = virtual_time.run(_outcomes(Network(lost_response=0.3), seed=1))
    assert acted == 200 > sum(answered)


def test_luck_and_time_follow_the_seed() -> None:
    network = Network(lost_request=0.2, lost_response=0.2)
    first, again, other = (virtual_time.run(_outcomes(network, seed)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_stream_may_break_in_the_middle() -> None:
    async def main() -> None:
        transport = InMemoryTransport(Echo(), SimulatedClock(), Network(lost_response=0.2), np.random.default_rng(3))
        received = bytearray()

        async def download() -> None:
            async for part in transport.stream(DEVICE_SERVICE + "Download", bytes(100), ()):
                received.extend(part)

        with pytest.raises(UnreachableError):
            await download()
        assert 0 < len(received) < 100

    virtual_time.run(main())


@pytest.mark.parametrize(
    "bad", [{"latency": (2.0, 1.0)}, {"lost_request": 1.0}, {"lost_response": -0.1}, {"timeout": 0.0}]
)
def test_an_impossible_network_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(EvensongError, match="network"):
        Network(**bad)  # type: ignore[arg-type]
