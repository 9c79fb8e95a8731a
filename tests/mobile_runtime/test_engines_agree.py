"""The compiled engine against the NumPy twin: every operation on random programs, and which programs are refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from engines import assert_close, machine, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CASES, Case

from evensong.mobile_runtime.machine import Machine
from evensong.mobile_runtime.signatures import SIGNATURES
from evensong.wire.artifact import encode_artifact
from evensong.wire.program import OPS

VERIFIER = Path(__file__).parents[2] / "mobile_runtime" / "engine" / "src" / "verify.cpp"


@needs_native
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_operation_gives_the_same_result(name: str, data: st.DataObject) -> None:
    case = Case(data.draw, name)
    CASES[name](case)
    encoded = encode_artifact(case.artifact())
    twin, native = machine("twin", encoded), machine("native", encoded)
    expected, actual = case.buffers(), case.buffers()
    for engine, outputs in ((twin, expected), (native, actual)):
        engine.run(0, case.batch, case.values, outputs, learning_rate=0.1, step=case.step, seed=case.seed)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, what=f"{name}, output {index}")
    _assert_memory_agrees(native, twin, exactly=name.startswith(("Q", "G_")))
    native.close()


def _assert_memory_agrees(native: Machine, twin: Machine, *, exactly: bool) -> None:
    if exactly:  # integer operations give the same bytes everywhere
        assert native.state.tobytes() == twin.state.tobytes()
        assert native.slots.tobytes() == twin.slots.tobytes()
        return
    assert_close(native.state.view(np.float32), twin.state.view(np.float32), what="state")
    assert_close(native.slots.view(np.float32), twin.slots.view(np.float32), what="slots")


@pytest.mark.skipif(not VERIFIER.exists(), reason="the engine's source is not here")
def test_both_verifiers_have_the_same_signatures() -> None:
    found = dict(re.findall(r'\{op::(\w+),\s*"([^"]*)"', VERIFIER.read_text()))
    assert found == SIGNATURES
