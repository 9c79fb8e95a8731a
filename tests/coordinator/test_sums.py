"""The running sum is the journal's, whatever is refused or fails after it was added."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select
from tiny_device import World, settle

from evensong.coordinator import tables
from evensong.coordinator.errors import StorageError
from evensong.coordinator.plan import parse_plan
from evensong.coordinator.sums import Sums
from evensong.v1 import common_pb2


def test_an_update_that_is_added_but_refused_changes_no_mean_that_was_or_will_be_taken(tmp_path: Path) -> None:
    async def run() -> None:
        async with World(tmp_path / "data", log_level="error") as world:
            await world.submit(goal=3)
            first, late = await world.enrol(2)
            await world.train(first, weight=7.0)
            lease = (await late.check_in()).assignment.lease
            late_id = await late.upload(lease, late.make_update(world.layout, world.codec))

            context = world.core.context
            with context.database.read() as tx:
                plan = parse_plan(tx.execute(select(tables.bundles.c.payload)).scalar_one())
            sums = Sums(context)
            before = sums.complete(1, plan)
            update = before.update.copy()
            refused = sums.adding(1, plan, context.spool.upload(late_id), 80.0)
            with pytest.raises(RuntimeError, match="too late"), refused:
                raise RuntimeError("too late")
            for total in (before, sums.complete(1, plan)):
                assert total.weight == 7.0
                np.testing.assert_array_equal(total.update, update)

    asyncio.run(run())


def test_an_update_whose_transaction_fails_at_its_end_counts_once_when_it_is_sent_again(tmp_path: Path) -> None:
    failures = [StorageError("the disk is full")]

    def fault(name: str) -> None:
        if name == "collect.before_commit" and failures:
            raise failures.pop()

    async def run() -> None:
        async with World(tmp_path / "data", log_level="error", fault=fault) as world:
            await world.submit(goal=2)
            first, second = await world.enrol(2)
            lease = (await first.check_in()).assignment.lease
            upload_id = await first.upload(lease, first.make_update(world.layout, world.codec))
            answer = await first.commit(upload_id, lease, weight=3.0)
            assert answer.refusal.reason == common_pb2.REFUSAL_REASON_UNAVAILABLE
            assert not (await first.commit(upload_id, lease, weight=3.0)).HasField("refusal")
            await world.train(second, weight=4.0)
            await settle()
            assert world.versions()[1].total_weight == 7.0

    asyncio.run(run())
