"""Updates whose length varies, and versions as differences, as the coordinator sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_device import TinyDevice, World, make_artifact, settle

from evensong.v1 import common_pb2, task_pb2
from evensong.wire import RotatedCodec, TopKCodec, decode_tensors
from evensong.wire.download import apply_download
from evensong.wire.tensors import encode_tensors

SPARSE = TopKCodec(0.5, None)


def play(tmp_path: Path, scene: Callable[[World, list[TinyDevice]], Awaitable[None]], **fields: Any) -> None:
    async def run() -> None:
        async with World(tmp_path / "data") as world:
            world.artifact, world.layout = make_artifact({"weight": (30, 20), "bias": (20,)})
            await world.submit(**fields)
            await scene(world, await world.enrol(2))

    asyncio.run(run())


async def train(world: World, device: TinyDevice) -> task_pb2.VersionManifest:
    """One update from this device; the version that it trained from."""
    answer = await device.check_in()
    manifest = device.manifest(answer.assignment)
    upload_id = await device.upload(answer.assignment.lease, device.make_update(world.layout, world.codec))
    committed = await device.commit(upload_id, answer.assignment.lease)
    assert not committed.HasField("refusal"), committed
    await settle()
    return manifest


@pytest.mark.parametrize("codec", [SPARSE, TopKCodec(0.5), RotatedCodec(1), RotatedCodec(4)], ids=str)
def test_updates_of_every_codec_count(tmp_path: Path, codec: Any) -> None:
    async def scene(world: World, devices: list[TinyDevice]) -> None:
        for device in devices:
            await train(world, device)
        assert world.versions()[1].total_weight > 0

    play(tmp_path, scene, codec=codec, goal=2)


@pytest.mark.parametrize("size", ["none", "too long"])
def test_a_length_that_no_update_can_have_is_refused(tmp_path: Path, size: str) -> None:
    async def scene(world: World, devices: list[TinyDevice]) -> None:
        lease = (await devices[0].check_in()).assignment.lease
        most = SPARSE.encoded_bytes(world.layout)
        announced = common_pb2.BlobRef(sha256=bytes(32), size_bytes=0 if size == "none" else most + 1)
        answer = await devices[0].begin(lease, b"", update=announced)
        assert answer.refusal.reason == common_pb2.REFUSAL_REASON_INVALID_UPDATE

    play(tmp_path, scene, codec=SPARSE)


def test_an_update_that_is_shorter_than_announced_is_not_complete(tmp_path: Path) -> None:
    async def scene(world: World, devices: list[TinyDevice]) -> None:
        device, lease = devices[0], (await devices[0].check_in()).assignment.lease
        update = device.make_update(world.layout, SPARSE)
        upload_id = await device.upload(lease, update[:-1])
        answer = await device.commit(upload_id, lease)
        assert answer.refusal.reason == common_pb2.REFUSAL_REASON_INVALID_UPDATE
        upload_id = await device.upload(lease, update)
        assert not (await device.commit(upload_id, lease)).HasField("refusal")

    play(tmp_path, scene, codec=SPARSE, goal=1, minimum=1)


def test_a_version_is_its_parent_and_a_difference_that_devices_may_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = TopKCodec.to_plan

    def with_downloads(self: TopKCodec) -> task_pb2.UpdatePlan:
        made = plan(self)
        made.download_bits = 5
        return made

    monkeypatch.setattr(TopKCodec, "to_plan", with_downloads)

    async def scene(world: World, devices: list[TinyDevice]) -> None:
        await train(world, devices[0])
        first = await train(world, devices[1])
        assert (first.number, first.parent) == (1, 0)
        assert first.delta.size_bytes < first.parameters.size_bytes / 4
        parent = await devices[0].download(first.parent_parameters_sha256)
        difference = await devices[0].download(first.delta.sha256)
        before = decode_tensors(parent, world.layout)
        after = encode_tensors(apply_download(before, difference, world.layout, 5), world.layout)
        assert after == await devices[0].download(first.parameters.sha256)
        assert any(np.any(values) for values in decode_tensors(after, world.layout).values())

    play(tmp_path, scene, codec=SPARSE, goal=1, minimum=1, rounds=3)
