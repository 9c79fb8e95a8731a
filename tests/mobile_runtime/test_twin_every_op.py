"""The twin runs a random program of every operation, and only what the operation owns is written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CASES, Case

from evensong.mobile_runtime.twin import KERNELS, TwinMachine
from evensong.wire.artifact import decode_artifact, encode_artifact
from evensong.wire.program import OPS


def test_every_operation_has_a_kernel_and_a_case() -> None:
    assert KERNELS.keys() == OPS.keys() == CASES.keys()


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_runs_after_a_round_trip_and_does_not_depend_on_old_memory(name: str, data: st.DataObject) -> None:
    case = Case(data.draw, name)
    CASES[name](case)
    artifact = decode_artifact(encode_artifact(case.artifact()))
    results = []
    for pattern in (0x00, 0xA5):
        machine = TwinMachine(artifact)
        for memory in machine._memory.values():
            if memory.flags.writeable and memory is not machine.state and memory is not machine.slots:
                memory[:] = pattern
        outputs = case.buffers()
        machine.run(0, case.batch, case.values, outputs, learning_rate=0.1, step=case.step, seed=case.seed)
        results.append((outputs, machine.state.copy(), machine.slots.copy()))
    (first, *regions), (second, *others) = results
    for a, b in zip((*first, *regions), (*second, *others), strict=True):
        np.testing.assert_array_equal(a, b)
