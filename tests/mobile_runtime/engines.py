"""Both engines for tests: the twin always, the compiled one where it was built."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from evensong.mobile_runtime import native
from evensong.mobile_runtime.machine import Machine
from evensong.mobile_runtime.native import NativeMachine
from evensong.mobile_runtime.twin import TwinMachine
from evensong.wire.artifact import decode_artifact

needs_native = pytest.mark.skipif(
    not native.available(), reason="no compiled engine: run python mobile_runtime/engine/build.py"
)

ENGINES = ["twin", pytest.param("native", marks=needs_native)]


def machine(engine: str, data: bytes) -> Machine:
    """A machine as ``load`` makes it: the bytes are decoded, and checked, in any case."""
    artifact = decode_artifact(data)
    return TwinMachine(artifact) if engine == "twin" else NativeMachine(artifact, data)


def assert_close(
    actual: npt.NDArray[np.generic], expected: npt.NDArray[np.generic], *, rtol: float = 1e-5, what: str = ""
) -> None:
    """Equal integers; floats within ``rtol`` of the largest element, since sums may go in any order."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if actual.dtype != np.float32:
        np.testing.assert_array_equal(actual, expected, err_msg=what)
        return
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * max(1.0, finite.max(initial=0.0)), err_msg=what)
