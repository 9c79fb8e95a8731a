"""A cohort's secure sum in one process: exact, whoever drops out, and the same from the same seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from evensong.secagg import AbortedError, Policy, Primitives, ServerStage
from evensong.secagg.server import Answer, DeviceMessage
from evensong.simulations.secure_cohort import SecureCohort, Upload, run_cohort

DEVICES = 300
POLICY = Policy(corrupted_share=0.05, dropout_share=0.3, min_survivors=100, max_cohort=DEVICES)
VECTORS = np.random.default_rng(5).integers(0, 1 << 63, (DEVICES, 9), dtype=np.uint64) * 2 + 1

Lanes = npt.NDArray[np.uint64]
DROPPED = {
    ServerStage.SHARES: range(20),
    ServerStage.MASKED: range(20, 60),
    ServerStage.COMMIT: range(60, 75),
    ServerStage.UNMASK: range(75, 90),
}


def vector_of(index: int) -> Lanes:
    return VECTORS[index].copy()


def plain_sum(indices: range) -> Lanes:
    return np.add.reduce(VECTORS[indices.start : indices.stop], axis=0, dtype=np.uint64)


def test_the_sum_is_exactly_that_of_the_devices_whose_vectors_arrived() -> None:
    result = run_cohort(DEVICES, vector_of, policy=POLICY, dropped=DROPPED)
    assert result.survivors == tuple(range(60, DEVICES))
    assert (result.total == plain_sum(range(60, DEVICES))).all()
    assert list(result.reached.values()) == [300, 280, 240, 225, 210]
    assert result.parameters.degree < DEVICES - 1  # a sparse graph: what 10,000 devices have, too


def test_computing_shared_things_once_changes_no_bit() -> None:
    shared = masked_vectors(None)
    own = masked_vectors(lambda _: Primitives())
    assert shared.shape == (60, 9)
    assert (shared == own).all()
    assert not (shared == VECTORS[10:70]).any()


def masked_vectors(primitives_of: Callable[[int | None], Primitives] | None) -> Lanes:
    """What the devices of a cohort upload."""
    seen: list[Lanes] = []

    class Watched(SecureCohort):
        def device_turn(self, index: int, answer: Answer | None) -> tuple[DeviceMessage, Upload | None]:
            message, upload = super().device_turn(index, answer)
            if upload:
                seen.append(upload.lanes.copy())
            return message, upload

    policy = Policy(corrupted_share=0.05, dropout_share=0.3, min_survivors=3, max_cohort=70)
    Watched(70, vector_of, policy=policy, primitives_of=primitives_of).run({ServerStage.MASKED: range(10)})
    return np.array(seen)


def test_too_few_survivors_give_no_sum() -> None:
    with pytest.raises(AbortedError, match="139 devices"):
        run_cohort(DEVICES, vector_of, policy=POLICY, dropped={ServerStage.MASKED: range(161)})
