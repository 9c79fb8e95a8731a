"""The promise itself: of all that the coordinator received, computed and stored, only the whole sum makes sense."""

from __future__ import annotations

import asyncio
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from secure_device import METRICS, SecureDevice, all_take_part, cohort
from sqlalchemy import select
from tiny_device import World

from evensong.coordinator import tables
from evensong.secagg.masks import apply_masks
from evensong.wire.transport import Metadata

pytestmark = pytest.mark.secagg

MEMBERS, LEAVER = 6, 5


class Wiretap:
    """Between devices and dispatcher: keeps every byte that the coordinator is sent."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher
        self.heard = bytearray()

    async def call(self, method: str, body: bytes, metadata: Metadata) -> bytes:
        self.heard += body
        answer: bytes = await self._dispatcher.call(method, body, metadata)
        return answer


class View:
    """What an attacker has who owns the coordinator when it knows most: all is revealed, nothing is deleted yet."""

    def __init__(self) -> None:
        self.disk = b""
        self.vectors: dict[str, np.ndarray[Any, np.dtype[np.uint64]]] = {}
        self.masks: list[tuple[bytes, int]] = []
        self.journal: list[Any] = []
        self.messages = 0

    def look(self, world: World, folder: Path) -> None:
        with world.core.context.database.read() as tx:
            round_id = tx.execute(select(tables.rounds.c.round_id)).scalars().first()
            for row in tx.execute(select(tables.secure_messages)).all():
                self.messages += 1
                if row.upload_id:
                    data = (folder / "uploads" / row.upload_id).read_bytes()
                    self.vectors[row.device_id] = np.frombuffer(data, "<u8")
            self.journal = list(tx.execute(select(tables.journal)).all())
        assert round_id is not None
        with world.core.secure.machines.open(round_id) as machine:
            self.masks = list(machine.unmasking().masks)
        self.disk = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[View, list[SecureDevice], bytes]:
    """A round with a device that drops out after sharing: then the coordinator learns mask keys as well as seeds."""
    folder, view = tmp_path_factory.mktemp("view") / "data", View()
    world: World

    def spy(point: str) -> None:
        if point == "aggregate.before_mean":
            view.look(world, folder)

    async def story() -> tuple[list[SecureDevice], bytes]:
        nonlocal world
        world = World(folder, fault=spy)
        async with world:
            tap = Wiretap(world.core.devices)
            devices = await cohort(world, MEMBERS)
            for device in devices:
                device.dispatcher = tap  # type: ignore[assignment]
            await all_take_part(world, devices, {LEAVER: "masked"})
            assert len(world.versions()) == 2
            return devices, bytes(tap.heard)

    devices, heard = asyncio.run(story())
    return view, devices, heard


def test_the_coordinator_saw_the_whole_round(seen: tuple[View, list[SecureDevice], bytes]) -> None:
    view, devices, heard = seen
    assert set(view.vectors) == {device.device_id for device in devices[:LEAVER]}
    assert view.messages > 4 * LEAVER and len(heard) > 1_000 and len(view.disk) > 10_000


def test_no_plain_value_was_sent_or_stored(seen: tuple[View, list[SecureDevice], bytes]) -> None:
    view, devices, heard = seen
    for device in devices:
        parameters = device.plain[: device.plan.size // device.plan.fields.per_lane]  # lanes without a metric
        assert len(parameters) >= 3
        for plain in (*(lane.tobytes() for lane in parameters), *windows(device.delta.tobytes(), 12)):
            assert plain not in heard and plain not in view.disk
    for row in view.journal:
        assert (row.weight, row.examples, row.loss_sum, row.correct) == (0.0, 0, 0.0, 0)
    assert METRICS.SerializeToString() not in heard


def test_every_secret_that_was_revealed_opens_the_whole_sum_and_no_part_of_it(
    seen: tuple[View, list[SecureDevice], bytes],
) -> None:
    view, devices, _ = seen
    survivors = devices[:LEAVER]
    for size in range(1, LEAVER + 1):
        for part in combinations(survivors, size):
            plain, opened = total(device.plain for device in part), total(view.vectors[d.device_id] for d in part)
            apply_masks(opened, view.masks)
            assert np.array_equal(opened, plain) == (size == LEAVER)


def test_with_any_revealed_masks_removed_a_vector_still_looks_random(
    seen: tuple[View, list[SecureDevice], bytes],
) -> None:
    """Chi-square of its bits against fair coins, over every choice of one or two known masks."""
    view, devices, _ = seen
    for device in devices[:LEAVER]:
        for size in (0, 1, 2):
            for some in combinations(view.masks, size):
                lanes = view.vectors[device.device_id].copy()
                apply_masks(lanes, some)
                bits = np.unpackbits(lanes.view(np.uint8))
                assert abs(int(bits.sum()) - bits.size / 2) < 6 * np.sqrt(bits.size) / 2
                assert not np.array_equal(lanes, device.plain)


def windows(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data) - size + 1, 4)]


def total(vectors: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
    summed: np.ndarray[Any, np.dtype[np.uint64]] = np.add.reduce(list(vectors))
    return summed.copy()
