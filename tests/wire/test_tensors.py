"""Parameters as bytes: exact round trips, and bytes or tensors that break a rule are refused with the reason."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evensong.v1 import task_pb2
from evensong.wire import (
    CorruptError,
    TensorSpec,
    UpdateError,
    WireError,
    crc32c,
    decode_tensors,
    encode_tensors,
    layout_from_proto,
    layout_of,
    layout_size,
    layout_to_proto,
)
from evensong.wire.program import DType, Variable, VariableFlag
from evensong.wire.tensors import Layout

SHAPES = npst.array_shapes(min_dims=0, max_dims=4, max_side=5)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
LAYOUTS = st.dictionaries(NAMES, SHAPES, min_size=1, max_size=4).map(
    lambda shapes: tuple(TensorSpec(name, shape) for name, shape in shapes.items())
)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)

LAYOUT: Layout = (TensorSpec("weight", (2, 3)), TensorSpec("bias", (3,)))


@st.composite
def laid_out_tensors(draw: st.DrawFn) -> tuple[Layout, dict[str, npt.NDArray[np.float32]]]:
    layout = draw(LAYOUTS)
    return layout, {s.name: draw(npst.arrays(np.float32, s.shape, elements=FLOATS)) for s in layout}


def tensors() -> dict[str, npt.NDArray[np.float32]]:
    return {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}


@given(laid_out_tensors())
def test_round_trip_is_exact(drawn: tuple[Layout, dict[str, npt.NDArray[np.float32]]]) -> None:
    layout, values = drawn
    decoded = decode_tensors(encode_tensors(values, layout), layout)
    assert list(decoded) == [spec.name for spec in layout]
    for spec in layout:
        assert decoded[spec.name].shape == spec.shape
        assert decoded[spec.name].tobytes() == values[spec.name].tobytes()
        assert decoded[spec.name].flags.writeable


def test_any_array_is_brought_to_float32() -> None:
    strided = {"weight": np.arange(6.0).reshape(3, 2).T, "bias": [1, 2, 3]}
    decoded = decode_tensors(encode_tensors(strided, LAYOUT), LAYOUT)
    np.testing.assert_array_equal(decoded["weight"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(decoded["bias"], [1, 2, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((3, 2))}, r"'weight' has the wrong shape.*\(2, 3\).*\(3, 2\)"),
        ({"other": np.zeros(1)}, "missing none, extra 'other'"),
        ({"bias": np.array([1, np.nan, np.inf])}, "'bias' is not finite.*2 of 3"),
        ({"bias": np.array([1, 2, 1e300])}, "'bias' is not finite.*1 of 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        encode_tensors({**tensors(), **change}, LAYOUT)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(UpdateError, match="missing 'weight'"):
        encode_tensors({"bias": np.zeros(3)}, LAYOUT)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((LAYOUT[0],), "extra 'bias'"),
        ((*LAYOUT, TensorSpec("scale", ())), "missing 'scale'"),
        ((TensorSpec("weight", (3, 2)), LAYOUT[1]), r"expected \(3, 2\); got \(2, 3\)"),
        (LAYOUT[::-1], "order"),
    ],
)
def test_bytes_of_another_layout_are_refused(layout: Layout, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        decode_tensors(encode_tensors(tensors(), LAYOUT), layout)


def test_every_flipped_bit_is_detected() -> None:
    data = encode_tensors(tensors(), LAYOUT)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode_tensors(bytes(damaged), LAYOUT)


def test_every_truncation_is_detected() -> None:
    data = encode_tensors(tensors(), LAYOUT)
    for length in range(len(data)):
        with pytest.raises(CorruptError):
            decode_tensors(data[:length], LAYOUT)


def reframe(body: bytes) -> bytes:
    """A frame with a right length and checksum around any body."""
    return struct.pack("<4sHHQI", b"EVTN", 1, 0, 20 + len(body), crc32c(body)) + body


@given(st.binary(max_size=200), st.integers(0, 200))
def test_hostile_bodies_are_refused_or_hold_the_layout(junk: bytes, keep: int) -> None:
    good = encode_tensors(tensors(), LAYOUT)[20:]
    for body in (good[:keep] + junk, good[:keep] + junk + good[keep + len(junk) :]):
        try:
            decoded = decode_tensors(reframe(body), LAYOUT)
        except WireError:
            continue
        assert {name: values.shape for name, values in decoded.items()} == {s.name: s.shape for s in LAYOUT}
        assert all(np.isfinite(values).all() for values in decoded.values())


def test_non_finite_values_and_padding_are_refused() -> None:
    good = bytearray(encode_tensors(tensors(), LAYOUT)[20:])
    not_finite = good.copy()
    not_finite[-4:] = struct.pack("<f", np.nan)
    with pytest.raises(UpdateError, match="'bias' is not finite"):
        decode_tensors(reframe(bytes(not_finite)), LAYOUT)
    padded = good.copy()
    padded[64 + 24 - 20] = 1  # weight takes 24 bytes from byte 64 of the frame on, bias starts at byte 128
    with pytest.raises(CorruptError, match="padding"):
        decode_tensors(reframe(bytes(padded)), LAYOUT)


def test_a_hostile_count_takes_no_memory() -> None:
    body = struct.pack("<I", 0xFFFFFFFF)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError):
            decode_tensors(reframe(body), LAYOUT)
        huge = (TensorSpec("weight", (1 << 28,)),)  # a layout of 1 GiB and bytes that do not have it
        with pytest.raises(WireError):
            decode_tensors(encode_tensors({"weight": np.zeros(1)}, (TensorSpec("weight", (1,)),)), huge)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_layout_leaves_out_personal_and_integer_tensors() -> None:
    variables = [
        Variable("body.weight", DType.F32, (3, 4), (1, 0), 0, VariableFlag.TRAINABLE),
        Variable("body.norm.running_mean", DType.F32, (4,), (0,), 64, VariableFlag.BUFFER),
        Variable("body.steps", DType.I32, (1,), (0,), 128, VariableFlag.BUFFER),
        Variable("head.weight", DType.F32, (2, 4), (0, 1), 192, VariableFlag.TRAINABLE),
    ]
    everything = layout_of(variables)
    assert [spec.name for spec in everything] == ["body.weight", "body.norm.running_mean", "head.weight"]
    assert everything[0].shape == (4, 3)  # the author's, not the engine's
    assert layout_of(variables, ["head.*", "*.running_*"]) == (TensorSpec("body.weight", (4, 3)),)
    assert layout_from_proto(layout_to_proto(everything)) == everything
    assert layout_size(everything) == 12 + 4 + 8


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [task_pb2.TensorSpec(name="", shape=[1])],
        [task_pb2.TensorSpec(name="x" * 256, shape=[1])],
        [task_pb2.TensorSpec(name="x", shape=[0])],
        [task_pb2.TensorSpec(name="x", shape=[1] * 7)],
        [task_pb2.TensorSpec(name="x", shape=[1]), task_pb2.TensorSpec(name="x", shape=[2])],
        [task_pb2.TensorSpec(name="x", shape=[1 << 31, 1 << 31, 1 << 31])],
    ],
    ids=["empty", "no name", "long name", "zero", "rank", "twice", "large"],
)
def test_hostile_layouts_are_refused(specs: list[task_pb2.TensorSpec]) -> None:
    with pytest.raises(UpdateError):
        layout_from_proto(specs)
