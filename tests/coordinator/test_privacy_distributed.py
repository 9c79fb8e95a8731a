"""Noise of devices through the secure vector: the sum has the noise that the accountant counts on."""

from __future__ import annotations

import asyncio
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import update
from tiny_device import World, make_artifact, make_bundle

from evensong.coordinator import tables
from evensong.coordinator.bundle import check_bundle
from evensong.coordinator.privacy.accounting import Accounting
from evensong.coordinator.privacy.keys import NoiseKey
from evensong.coordinator.privacy.mechanism import Total, release
from evensong.coordinator.rounds import State
from evensong.secagg.noise import Keystream, local_noise
from evensong.secagg.vector import VectorPlan, conditional_norm_bound
from evensong.v1 import device_pb2, operator_pb2, task_pb2
from evensong.wire.signing import new_request_id

GAUSSIAN = task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_GAUSSIAN
SKELLAM = task_pb2.PRIVACY_MECHANISM_DISTRIBUTED_SKELLAM
ARTIFACT, LAYOUT = make_artifact({"weight": (40, 50)})
CLIP, SIZE, SURVIVORS = 0.5, 2_000, 24


def bundle(mechanism: task_pb2.PrivacyMechanism, bits: int = 6) -> task_pb2.TaskBundle:
    made = make_bundle(
        ARTIFACT,
        LAYOUT,
        goal=30,
        minimum=SURVIVORS,
        strategy="fedavg",
        weighting=task_pb2.WEIGHTING_UNIFORM,
        max_weight=1.0,
        secure=task_pb2.SecurePlan(
            corrupted_share=0.1, dropout_share=0.1, min_survivors=SURVIVORS, max_cohort=40, stage_ms=1_000
        ),
        clip_norm=CLIP,
        privacy=task_pb2.PrivacyPlan(
            mechanism=mechanism, epsilon=20, delta=1e-5, noise_multiplier=1.2, sampling=task_pb2.SAMPLING_NONE
        ),
    )
    made.update.bits = bits
    return made


@pytest.mark.parametrize("mechanism", [GAUSSIAN, SKELLAM])
def test_the_smallest_sum_is_noised_as_the_plan_promises(mechanism: task_pb2.PrivacyMechanism) -> None:
    made = bundle(mechanism)
    check_bundle(made)
    plan = VectorPlan.from_bundle(made, device_pb2.WORK_TRAIN)
    rng, seed, step = np.random.default_rng(1), bytes(16), plan.step(CLIP)
    lanes, exact = np.zeros(plan.fields.lanes, np.uint64), np.zeros(SIZE)
    for device in range(SURVIVORS):
        delta = rng.normal(size=SIZE).astype(np.float32)
        delta *= np.float32(2 * CLIP / np.linalg.norm(delta))  # twice the clip norm
        exact += delta / 2
        own = Keystream(hashlib.sha256(b"%d" % device).digest())
        rounding = Keystream(hashlib.sha256(b"r%d" % device).digest())
        added, _ = plan.encode(
            delta,
            clip_norm=CLIP,
            seed=seed,
            weight=1.0,
            metrics=None,
            words=lambda count, rounding=rounding: rounding.words(-(-count // 2)).view("<u4")[:count],
            noise=lambda count, own=own: local_noise(made, CLIP, step, count, own),
            norm_bound=conditional_norm_bound(CLIP, step, SIZE),
        )
        lanes += added
    summed = plan.decode(lanes, SURVIVORS, clip_norm=CLIP, seed=seed)
    assert summed.within == 0  # no count of devices leaves them without noise
    noise = summed.update - exact
    # All 24 noised; the plan counts on 20 of them, as 4 of 40 may collude. Rounding adds next to nothing.
    expected = 1.2 * CLIP * math.sqrt(SURVIVORS / 20)
    assert noise.std() == pytest.approx(expected, rel=0.06)
    released = release(
        made,
        Total(summed.update, SURVIVORS, SURVIVORS),
        clip_norm=CLIP,
        key=NoiseKey(bytes(32)),
        task_id="task",
        round=1,
    )
    np.testing.assert_array_equal(released.mean, summed.update / 30)  # nothing is added, and the goal divides
    assert released.weight == 30 and released.tag == b"" and released.clip_norm == 0


@pytest.mark.parametrize("mechanism", [GAUSSIAN, SKELLAM])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_finer_grid_comes_close_to_central_noise(mechanism: task_pb2.PrivacyMechanism, bits: int) -> None:
    distributed = Accounting.of(bundle(mechanism, bits)).epsilon(5)
    central = Accounting(task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN, 1.2, 1e-5).epsilon(5, "rdp")
    assert central < distributed < central * {4: 1.06, 6: 1.025, 8: 1.02}[bits]


def test_the_cost_does_not_depend_on_the_clip_norm() -> None:
    loud, quiet = bundle(GAUSSIAN), bundle(GAUSSIAN)
    loud.update.clip_norm = 100.0
    assert Accounting.of(loud) == Accounting.of(quiet)


def test_fewer_devices_in_the_smallest_sum_make_each_add_more() -> None:
    few = bundle(GAUSSIAN)
    few.secure.min_survivors = 14  # 10 honest ones in place of 20
    many, less = (VectorPlan.from_bundle(made, device_pb2.WORK_TRAIN) for made in (bundle(GAUSSIAN), few))
    assert less.noise_bound / many.noise_bound == pytest.approx(math.sqrt(2), rel=0.1)


def test_a_noised_sum_that_was_seen_but_came_to_no_version_is_spent_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with World(tmp_path / "data", log_level="error") as world:
            made = bundle(GAUSSIAN)
            await world.submit(
                goal=30,
                minimum=SURVIVORS,
                weighting=task_pb2.WEIGHTING_UNIFORM,
                max_weight=1.0,
                secure=made.secure,
                clip_norm=CLIP,
                privacy=made.privacy,
            )
            context, operators = world.core.context, world.core.operators
            with context.database.transaction() as tx:
                tx.execute(update(tables.rounds).values(state=State.AGGREGATING, reports=27))
            stop = operator_pb2.StopTaskRequest(request_id=new_request_id(), task_id=world.task_id)
            operators.stop_task(stop)
            request = operator_pb2.ReadPrivacyLedgerRequest(task_id=world.task_id)
            (entry,) = operators.read_privacy_ledger(request).entries
            assert (entry.version, entry.round, entry.devices, entry.clip_norm) == (0, 1, 27, CLIP)
            assert entry.epsilon == Accounting.of(world.task().bundle).epsilon(1)

    asyncio.run(run())
