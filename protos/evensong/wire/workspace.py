"""How much packing workspace a program's kernels may use: a bound that compiler and engines compute alike.

The C++ engine mirrors this file in ``workspace.hpp``; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from evensong.wire.program import Op, Tensor

_M_BLOCK, _N_BLOCK, _K_BLOCK = 144, 512, 256


def workspace_bytes(ops: Sequence[Op], tensors: Sequence[Tensor]) -> int:
    """The largest need of any operation, in bytes; kernels run one after the other and share it."""
    return max((_need(op, tensors) for op in ops), default=0)


def _need(op: Op, tensors: Sequence[Tensor]) -> int:
    raise AssertionError("replaced by the engine's author")
