"""Updates as bytes, held against a second decoder and encoder written value by value from the format's description."""

from __future__ import annotations

import math
import struct
import tracemalloc
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evensong.v1 import task_pb2
from evensong.wire import CorruptError, TensorSpec, UpdateCodec, UpdateError, WireError, clip_to_norm, crc32c
from evensong.wire.tensors import Layout, layout_size

Tensors = dict[str, npt.NDArray[np.float32]]

LAYOUT: Layout = (TensorSpec("weight", (4, 6)), TensorSpec("bias", (5,)), TensorSpec("scale", ()))
CODECS = [UpdateCodec(None), *(UpdateCodec(bits, block) for bits in range(1, 17) for block in (0, 8, 16))]

codecs = st.one_of(
    st.just(UpdateCodec(None)),
    st.builds(UpdateCodec, st.integers(1, 16), st.sampled_from([0, 8, 16, 24, 1 << 20])),
)
layouts = st.lists(npst.array_shapes(min_dims=0, max_dims=3, max_side=7), min_size=1, max_size=4).map(
    lambda shapes: tuple(TensorSpec(f"tensor{i}", shape) for i, shape in enumerate(shapes))
)
floats = st.floats(-(2.0**126), 2.0**126, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)

moderate = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def updates(draw: st.DrawFn) -> tuple[Layout, Tensors]:
    layout = draw(layouts)
    return layout, {s.name: draw(npst.arrays(np.float32, s.shape, elements=floats)) for s in layout}


def normal_update(layout: Layout = LAYOUT, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in layout}


def flat(tensors: Tensors, layout: Layout) -> npt.NDArray[np.float32]:
    return np.concatenate([tensors[spec.name].reshape(-1) for spec in layout])


# ------------------------------------------------------------------------------------------------------- the naive twin


def naive_decode(data: bytes, layout: Layout) -> list[float]:
    """Every value by the words of the format's description, one bit after the other."""
    bits, block = data[20], struct.unpack_from("<I", data, 24)[0]
    if not bits:
        return list(struct.unpack_from(f"<{layout_size(layout)}f", data, 32))
    widths = [block or spec.size for spec in layout]
    groups = sum(-(-spec.size // width) for spec, width in zip(layout, widths, strict=True))
    lower = struct.unpack_from(f"<{groups}f", data, 32)
    step = struct.unpack_from(f"<{groups}f", data, 32 + 4 * groups)
    values = []
    start, group = 32 + 8 * groups, 0
    for spec, width in zip(layout, widths, strict=True):
        for i in range(spec.size):
            code = 0
            for k in range(bits):
                place = i * bits + k
                code |= (data[start + place // 8] >> place % 8 & 1) << k
            exact = Fraction(lower[group + i // width]) + code * Fraction(step[group + i // width])
            values.append(float(np.float32(float(exact))))
        start += -(-spec.size // 8) * bits
        group += -(-spec.size // width)
    return values


def naive_grid(values: list[float], bits: int) -> list[tuple[float, float]]:
    """The two grids of a group as (lower, step), min-max first; quotients in float64, rounded up exactly."""
    top, least, most = 2**bits - 1, min(values), max(values)

    def round_up(step: Fraction) -> float:
        unit = Fraction(2) ** -149
        while step / unit > 2 ** (24 - bits):
            unit *= 2
        return float(math.ceil(step / unit) * unit)

    grids = [(least, round_up(Fraction((most - least) / top)))]
    if bits > 1 and least < 0 < most:
        steps = {zero: Fraction(max(-least / zero, most / (top - zero))) for zero in range(1, top)}
        zero = min(steps, key=lambda place: steps[place])
        grids.append((-zero * round_up(steps[zero]), round_up(steps[zero])))
    return grids


def variance(values: list[float], lower: float, step: float) -> float:
    """Of stochastic rounding, summed over the values."""
    if not step:
        return 0.0
    fractions = [(value - lower) / step % 1 for value in values]
    return step**2 * sum(f * (1 - f) for f in fractions)


@settings(max_examples=60)
@given(updates(), codecs, st.integers(0, 2**32 - 1))
def test_decodes_as_the_description_says(drawn: tuple[Layout, Tensors], codec: UpdateCodec, seed: int) -> None:
    layout, tensors = drawn
    data = codec.encode(tensors, layout, np.random.default_rng(seed))
    assert len(data) == codec.encoded_bytes(layout)
    assert flat(codec.decode(data, layout), layout).tolist() == naive_decode(data, layout)


@settings(max_examples=60)
@example(np.array([6.627405e16, -1.0], np.float32), 1)
@given(npst.arrays(np.float32, st.integers(1, 20), elements=moderate), st.integers(1, 8))
def test_the_grid_is_the_better_of_the_two(values: npt.NDArray[np.float32], bits: int) -> None:
    layout = (TensorSpec("x", values.shape),)
    data = UpdateCodec(bits).encode({"x": values}, layout, np.random.default_rng(0))
    lower, step = struct.unpack_from("<ff", data, 32)
    grids = naive_grid(values.tolist(), bits)
    assert (lower, step) in grids
    best = min(variance(values.tolist(), *grid) for grid in grids)
    assert variance(values.tolist(), lower, step) <= best * (1 + 1e-6) + 1e-30


# ------------------------------------------------------------------------------------------------------------- encoding


@given(updates(), codecs, st.integers(0, 2**32 - 1))
def test_the_error_is_below_one_step(drawn: tuple[Layout, Tensors], codec: UpdateCodec, seed: int) -> None:
    layout, tensors = drawn
    decoded = codec.decode(codec.encode(tensors, layout, np.random.default_rng(seed)), layout)
    for name, values in tensors.items():
        if codec.bits is None:
            assert decoded[name].tobytes() == values.tobytes()
            continue
        width = codec.block_size or values.size
        for start in range(0, values.size, width):
            group = values.reshape(-1)[start : start + width].astype(np.float64)
            came = decoded[name].reshape(-1)[start : start + width]
            # the zero-aligned grid is at most twice as coarse as the min-max grid, and float32 rounds once
            spread = group.max() - group.min()
            step = spread / (2**codec.bits - 1) * (2 if codec.bits > 1 else 1) * (1 + 2.0 ** (codec.bits - 23))
            assert (np.abs(came - group) <= step + 2.0**-22 * np.abs(group).max() + 2.0**-148).all()


@pytest.mark.parametrize("codec", CODECS[::5], ids=str)
def test_updates_are_unbiased(codec: UpdateCodec) -> None:
    """The mean of many encodings lies as near to the truth as Bernstein's inequality asks, value by value."""
    repeats = 300
    tensors, rng = normal_update(), np.random.default_rng(1)
    step = 2 * np.ptp(flat(tensors, LAYOUT)) / (2 ** (codec.bits or 24) - 1)
    total, squares = np.zeros(layout_size(LAYOUT)), np.zeros(layout_size(LAYOUT))
    for _ in range(repeats):
        values = flat(codec.decode(codec.encode(tensors, LAYOUT, rng), LAYOUT), LAYOUT).astype(np.float64)
        total += values
        squares += values**2
    mean = total / repeats
    standard_error = np.sqrt(np.maximum(squares / repeats - mean**2, 0) / repeats)
    assert (np.abs(mean - flat(tensors, LAYOUT)) <= 5 * standard_error + 12 * step / repeats + 1e-6).all()


def test_zeros_of_a_sparse_update_travel_without_noise() -> None:
    values = np.zeros((100, 16), np.float32)
    values[[3, 50]] = np.random.default_rng(0).normal(size=(2, 16))
    layout = (TensorSpec("embedding", values.shape),)
    for bits in (2, 4, 8):
        codec = UpdateCodec(bits)
        decoded = codec.decode(codec.encode({"embedding": values}, layout, np.random.default_rng(1)), layout)
        assert not decoded["embedding"][values == 0].any()


def test_a_constant_tensor_travels_exactly() -> None:
    tensors = {spec.name: np.full(spec.shape, -1 / 3, np.float32) for spec in LAYOUT}
    for bits in (1, 8, 16):
        codec = UpdateCodec(bits)
        decoded = codec.decode(codec.encode(tensors, LAYOUT, np.random.default_rng(0)), LAYOUT)
        assert all((decoded[name] == values).all() for name, values in tensors.items())


def test_one_byte_a_value_and_one_grid_a_tensor() -> None:
    layout = (TensorSpec("weight", (1000, 1000)),)
    assert UpdateCodec(8).encoded_bytes(layout) == 1_000_000 + 32 + 8
    assert UpdateCodec(8, 1000).encoded_bytes(layout) == 1_000_000 + 32 + 8 * 1000
    assert UpdateCodec(4).encoded_bytes(layout) == 500_000 + 32 + 8
    assert UpdateCodec(None).encoded_bytes(layout) == 4_000_000 + 32


@pytest.mark.parametrize("codec", [UpdateCodec(8), UpdateCodec(3, 64), UpdateCodec(12, 72), UpdateCodec(1, 8)], ids=str)
def test_the_bytes_do_not_depend_on_how_a_tensor_is_cut(codec: UpdateCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long tensors are worked on in pieces; every value gets its own word all the same."""
    layout = (TensorSpec("a", (300,)), TensorSpec("b", (7,)), TensorSpec("c", (2, 70)))
    tensors = normal_update(layout)
    whole = codec.encode(tensors, layout, np.random.default_rng(5))
    monkeypatch.setattr("evensong.wire.codecs._PIECE", 64)
    assert codec.encode(tensors, layout, np.random.default_rng(5)) == whole
    assert flat(codec.decode(whole, layout), layout).tolist() == naive_decode(whole, layout)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e38])
def test_updates_that_cannot_travel_are_refused(bad: float) -> None:
    tensors = normal_update()
    tensors["bias"][2] = bad
    with pytest.raises(UpdateError):
        UpdateCodec(8).encode(tensors, LAYOUT, np.random.default_rng(0))


# --------------------------------------------------------------------------------------------------------- accumulating


@given(updates(), codecs, st.floats(1e-3, 1e4))
def test_accumulating_is_adding_the_weighted_decoding(
    drawn: tuple[Layout, Tensors], codec: UpdateCodec, weight: float
) -> None:
    layout, tensors = drawn
    data = codec.encode(tensors, layout, np.random.default_rng(0))
    start = np.linspace(-1, 1, layout_size(layout))
    into = start.copy()
    codec.accumulate(data, layout, weight, into)
    decoded = flat(codec.decode(data, layout), layout).astype(np.float64)
    assert (into == start + weight * decoded).all()


@pytest.mark.parametrize("codec", [UpdateCodec(None), UpdateCodec(3), UpdateCodec(16)], ids=str)
def test_updates_are_read_wherever_they_lie(codec: UpdateCodec) -> None:
    """A view into a larger buffer, at an odd address."""
    data = codec.encode(normal_update(), LAYOUT, np.random.default_rng(0))
    view = memoryview(b"x" + data)[1:]
    assert (flat(codec.decode(view, LAYOUT), LAYOUT) == flat(codec.decode(data, LAYOUT), LAYOUT)).all()


@pytest.mark.parametrize("codec", [UpdateCodec(None), UpdateCodec(8), UpdateCodec(5, 256), UpdateCodec(16)], ids=str)
def test_accumulating_needs_no_second_model(codec: UpdateCodec) -> None:
    layout = (TensorSpec("weight", (1 << 20,)),)
    data = codec.encode(normal_update(layout), layout, np.random.default_rng(0))
    into = np.zeros(1 << 20)
    tracemalloc.start()
    codec.accumulate(data, layout, 1.0, into)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # a float32 copy of the update would take 4 MiB


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_bad_weights_add_nothing(weight: float) -> None:
    data = UpdateCodec(8).encode(normal_update(), LAYOUT, np.random.default_rng(0))
    into = np.zeros(layout_size(LAYOUT))
    with pytest.raises(UpdateError, match="weight"):
        UpdateCodec(8).accumulate(data, LAYOUT, weight, into)
    assert not into.any()


def refuse(codec: UpdateCodec, data: bytes, layout: Layout = LAYOUT) -> WireError:
    """Both readers must refuse ``data``, and nothing may be added."""
    into = np.zeros(layout_size(layout))
    with pytest.raises(WireError):
        codec.decode(data, layout)
    with pytest.raises(WireError) as error:
        codec.accumulate(data, layout, 1.0, into)
    assert not into.any()
    return error.value


@pytest.mark.parametrize("codec", [UpdateCodec(None), UpdateCodec(8), UpdateCodec(3, 8)], ids=str)
def test_every_flipped_bit_and_truncation_is_detected(codec: UpdateCodec) -> None:
    data = codec.encode(normal_update(), LAYOUT, np.random.default_rng(0))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refuse(codec, bytes(damaged))
    for length in range(len(data)):
        assert isinstance(refuse(codec, data[:length]), CorruptError)


def reframe(body: bytes) -> bytes:
    """A frame with a right length and checksum around any body."""
    return struct.pack("<4sHHQI", b"EVUP", 1, 0, 20 + len(body), crc32c(body)) + body


@given(st.binary(max_size=120), st.integers(0, 120), st.sampled_from(CODECS))
def test_hostile_bodies_never_crash(junk: bytes, keep: int, codec: UpdateCodec) -> None:
    good = codec.encode(normal_update(), LAYOUT, np.random.default_rng(0))[20:]
    for body in (good[:keep] + junk, good[:keep] + junk + good[keep + len(junk) :]):
        into = np.zeros(layout_size(LAYOUT))
        try:
            codec.accumulate(reframe(body), LAYOUT, 1.0, into)
        except WireError:
            assert not into.any()
        else:
            assert np.isfinite(into).all()


@pytest.mark.parametrize(
    ("offset", "value"),
    [(12, np.nan), (12, np.inf), (24, np.nan), (24, -1.0), (24, np.inf), (24, 3e38)],
    ids=["lower NaN", "lower inf", "step NaN", "step negative", "step inf", "step overflows"],
)
def test_hostile_grids_are_refused(offset: int, value: float) -> None:
    body = bytearray(UpdateCodec(8).encode(normal_update(), LAYOUT, np.random.default_rng(0))[20:])
    struct.pack_into("<f", body, offset, value)
    assert "grid 0" in str(refuse(UpdateCodec(8), reframe(bytes(body))))


def test_hostile_padding_and_floats_are_refused() -> None:
    body = bytearray(UpdateCodec(8).encode(normal_update(), LAYOUT, np.random.default_rng(0))[20:])
    body[-1] = 1  # scale has one code and seven of padding
    assert "'scale'" in str(refuse(UpdateCodec(8), reframe(bytes(body))))
    body = bytearray(UpdateCodec(None).encode(normal_update(), LAYOUT, np.random.default_rng(0))[20:])
    body[-4:] = struct.pack("<f", np.nan)
    assert "finite" in str(refuse(UpdateCodec(None), reframe(bytes(body))))


def test_updates_of_another_task_are_refused_with_the_reason() -> None:
    data = UpdateCodec(8).encode(normal_update(), LAYOUT, np.random.default_rng(0))
    assert "bits=4" in str(refuse(UpdateCodec(4), data))
    assert "block_size=8" in str(refuse(UpdateCodec(8, 8), data))
    renamed = (TensorSpec("other", (4, 6)), *LAYOUT[1:])
    assert "layout" in str(refuse(UpdateCodec(8), data, renamed))
    reshaped = (TensorSpec("weight", (6, 4)), *LAYOUT[1:])
    assert "layout" in str(refuse(UpdateCodec(8), data, reshaped))


def test_a_layout_that_is_larger_than_the_bytes_takes_no_memory() -> None:
    data = UpdateCodec(8).encode(normal_update(), LAYOUT, np.random.default_rng(0))
    huge = (TensorSpec("weight", (1 << 28,)),)
    tracemalloc.start()
    with pytest.raises(WireError):
        UpdateCodec(8).decode(data, huge)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_plans_round_trip(codec: UpdateCodec) -> None:
    assert UpdateCodec.from_plan(codec.to_plan()) == codec


@pytest.mark.parametrize(
    "plan",
    [
        task_pb2.UpdatePlan(),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_QUANTIZED),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_QUANTIZED, bits=17),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_QUANTIZED, bits=8, block_size=12),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_QUANTIZED, bits=8, block_size=1 << 31),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_FLOAT32, bits=8),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_FLOAT32, block_size=8),
    ],
    ids=["none", "no bits", "17 bits", "odd block", "huge block", "float bits", "float block"],
)
def test_plans_out_of_range_are_refused(plan: task_pb2.UpdatePlan) -> None:
    with pytest.raises(UpdateError):
        UpdateCodec.from_plan(plan)


# ------------------------------------------------------------------------------------------------------------- clipping


@given(updates(), st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_and_keeps_the_direction(drawn: tuple[Layout, Tensors], clip_norm: float) -> None:
    layout, tensors = drawn
    before = flat(tensors, layout).astype(np.float64)
    clipped, norm = clip_to_norm(tensors, clip_norm)
    after = flat(clipped, layout).astype(np.float64)
    assert norm == pytest.approx(np.linalg.norm(before), rel=1e-9)
    assert np.linalg.norm(after) <= clip_norm or (after == before).all()
    if norm > clip_norm:
        np.testing.assert_allclose(after, before * (clip_norm / norm), rtol=1e-5, atol=1e-40)
    else:
        assert (after == before).all()


def test_clipping_refuses_what_is_not_finite() -> None:
    with pytest.raises(UpdateError, match="'bias'"):
        clip_to_norm({"weight": np.ones(2), "bias": np.array([1.0, np.nan])}, 1.0)
    with pytest.raises(ValueError, match="clip_norm"):
        clip_to_norm({"weight": np.ones(2)}, math.nan)


def test_zero_does_not_clip() -> None:
    values = np.full(4, 100, np.float32)
    clipped, norm = clip_to_norm({"x": values}, 0)
    assert (clipped["x"] == values).all()
    assert norm == 200
