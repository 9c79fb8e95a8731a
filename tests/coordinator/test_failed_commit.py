"""A transaction that fails at its very last moment leaves nothing behind, in the database or in the running sum."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest
from tiny_device import World, make_bundle, settle

from evensong.coordinator.errors import StorageError
from evensong.coordinator.plan import parse_plan
from evensong.coordinator.sums import Sums
from evensong.v1 import common_pb2
from evensong.wire.errors import UpdateError
from evensong.wire.tensors import decode_tensors


def test_an_update_whose_journal_row_could_not_be_committed_counts_once_when_it_is_sent_again(tmp_path: Path) -> None:
    failures = 1

    def full_disk(place: str) -> None:
        nonlocal failures
        if place == "collect.before_commit" and failures:
            failures -= 1
            raise StorageError("the database could not be written", got="database or disk is full")

    async def run() -> None:
        async with World(tmp_path / "data", fault=full_disk) as world:
            await world.submit(goal=2)
            first, second = await world.enrol(2)
            lease = (await first.check_in()).assignment.lease
            update = first.make_update(world.layout, world.codec)
            upload_id = await first.upload(lease, update)
            request = {"weight": 8.0}
            failed = await first.commit(upload_id, lease, **request)
            assert failed.refusal.reason == common_pb2.REFUSAL_REASON_UNAVAILABLE
            assert not (await first.commit(upload_id, lease, **request)).HasField("refusal")
            lease = (await second.check_in()).assignment.lease
            other = second.make_update(world.layout, world.codec)
            upload_id = await second.upload(lease, other)
            assert not (await second.commit(upload_id, lease, weight=3.0)).HasField("refusal")
            await settle()
            version = world.versions()[1]
            assert version.total_weight == 11.0
            committed = world.core.context.blobs.read(version.manifest.parameters.sha256.hex())
            one, two = (world.codec.decode(data, world.layout) for data in (update, other))
            for name, values in decode_tensors(committed, world.layout).items():
                np.testing.assert_allclose(values, (8 * one[name] + 3 * two[name]) / 11, rtol=1e-5, atol=1e-7)

    asyncio.run(run())


def test_a_sum_forgets_an_update_that_had_its_number_but_was_not_journalled(tmp_path: Path) -> None:
    """SQLite gives the number of a rolled-back row again, other databases do not: the sum must not rely on it."""

    async def run() -> None:
        async with World(tmp_path / "data") as world:
            await world.submit(goal=2)
            (device,) = await world.enrol(1)
            context, sums = world.core.context, Sums(world.core.context)
            plan = parse_plan(make_bundle(world.artifact, world.layout, goal=2).SerializeToString())
            file = context.spool.upload("upload")
            file.append(device.make_update(world.layout, world.codec))
            with contextlib.suppress(StorageError), sums.adding(1, plan, file, 8.0) as running:
                running.entry = 7
                raise StorageError("the database could not be written")
            with pytest.raises(UpdateError, match="no mean of no updates"):
                sums.complete(1, plan)

    asyncio.run(run())
