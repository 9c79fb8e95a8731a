"""Rotated and sparse updates: distortion, bias, error feedback, and bytes that come from an enemy."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evensong.v1 import task_pb2
from evensong.wire import CorruptError, TensorSpec, UpdateCodec, UpdateError, WireError, crc32c
from evensong.wire.codec import Codec, codec_from_plan
from evensong.wire.deflate import deflate_if_smaller, inflate
from evensong.wire.rotated import RotatedCodec
from evensong.wire.tensors import Layout, layout_size
from evensong.wire.top_k import TopKCodec, residual_of

Tensors = dict[str, npt.NDArray[np.float32]]

LAYOUT: Layout = (TensorSpec("weight", (4, 6)), TensorSpec("bias", (5,)), TensorSpec("scale", ()))
ROTATED = [RotatedCodec(bits) for bits in (1, 2, 3, 4)]
SPARSE = [TopKCodec(0.1), TopKCodec(0.25, None), TopKCodec(1.0), TopKCodec(1e-9)]
CODECS = [*ROTATED, *SPARSE]

codecs = st.sampled_from(CODECS)
layouts = st.lists(npst.array_shapes(min_dims=0, max_dims=3, max_side=7), min_size=1, max_size=4).map(
    lambda shapes: tuple(TensorSpec(f"tensor{i}", shape) for i, shape in enumerate(shapes))
)
floats = st.floats(-(2.0**90), 2.0**90, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)


@st.composite
def updates(draw: st.DrawFn) -> tuple[Layout, Tensors]:
    layout = draw(layouts)
    return layout, {s.name: draw(npst.arrays(np.float32, s.shape, elements=floats)) for s in layout}


def normal_update(layout: Layout = LAYOUT, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in layout}


def flat(tensors: Tensors, layout: Layout) -> npt.NDArray[np.float32]:
    return np.concatenate([tensors[spec.name].reshape(-1) for spec in layout])


def encode(codec: Codec, tensors: Tensors, layout: Layout = LAYOUT, seed: int = 0) -> bytes:
    return codec.encode(tensors, layout, np.random.default_rng(seed))


@settings(max_examples=80)
@given(updates(), codecs, st.floats(1e-3, 1e4))
def test_accumulating_is_adding_the_weighted_decoding(drawn, codec, weight):
    layout, tensors = drawn
    data = encode(codec, tensors, layout)
    assert len(data) <= codec.encoded_bytes(layout)
    assert not codec.is_fixed or len(data) == codec.encoded_bytes(layout)
    start = np.linspace(-1, 1, layout_size(layout))
    into = start.copy()
    codec.accumulate(data, layout, weight, into)
    decoded = codec.decode(memoryview(b"x" + data)[1:], layout)
    assert all(decoded[spec.name].shape == spec.shape for spec in layout)
    assert (into == start + weight * flat(decoded, layout).astype(np.float64)).all()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_nothing_stays_nothing(codec):
    zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in LAYOUT}
    assert not flat(codec.decode(encode(codec, zeros), LAYOUT), LAYOUT).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e38])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_updates_that_cannot_travel_are_refused(codec, bad):
    tensors = normal_update()
    tensors["bias"][2] = bad
    with pytest.raises(UpdateError):
        encode(codec, tensors)


# -------------------------------------------------------------------------------------------------------------- rotated


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.570), (2, 0.133), (3, 0.036), (4, 0.0095)])
@pytest.mark.parametrize("size", [1 << 14, 20_000])
def test_the_distortion_is_the_published_one(bits, distortion, size):
    layout = (TensorSpec("weight", (size,)),)
    values = normal_update(layout)
    decoded = RotatedCodec(bits).decode(encode(RotatedCodec(bits), values, layout), layout)
    error = np.square(decoded["weight"] - values["weight"]).sum() / np.square(values["weight"]).sum()
    assert error == pytest.approx(distortion, rel=0.05)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_mean_over_seeds_goes_to_the_truth(bits):
    """The squared error of a mean of 200 devices is a 200th of one device's: there is no bias that stays."""
    layout = (TensorSpec("weight", (1500,)),)
    rng = np.random.default_rng(5)
    values = (rng.standard_normal(1500) * np.linspace(0, 3, 1500) ** 2).astype(np.float32)
    codec, total, single = RotatedCodec(bits), np.zeros(1500), 0.0
    for device in range(200):
        decoded = codec.decode(encode(codec, {"weight": values}, layout, device), layout)["weight"]
        single += np.square(decoded - values).sum() / 200
        total += decoded
    assert np.square(total / 200 - values).sum() < 1.5 * single / 200


def test_a_value_takes_its_bits():
    layout = (TensorSpec("weight", (1000, 1000)),)
    assert RotatedCodec(1).encoded_bytes(layout) == 125_000 + 52
    assert 4_000_000 / RotatedCodec(1).encoded_bytes(layout) > 31
    assert RotatedCodec(4).encoded_bytes(layout) == 500_000 + 52


# --------------------------------------------------------------------------------------------------------------- sparse


@settings(max_examples=80)
@given(updates(), st.floats(1e-6, 1), st.sampled_from([None, 8]))
def test_the_largest_values_arrive_and_the_rest_is_residual(drawn, keep, bits):
    layout, tensors = drawn
    codec, values = TopKCodec(keep, bits), flat(tensors, layout)
    data = encode(codec, tensors, layout)
    sent = flat(codec.decode(data, layout), layout)
    count = math.ceil(keep * values.size)
    order = sorted(range(values.size), key=lambda place: (-abs(values[place]), place))[:count]
    left_out = np.setdiff1d(np.arange(values.size), order)
    assert not sent[left_out].any()
    step = 0 if bits is None else np.abs(values).max() / 127
    assert (np.abs(sent - values)[order] <= step * 0.51 + 2.0**-149).all()
    residual = flat(residual_of(tensors, data, codec, layout), layout)
    assert (residual == values - sent).all()
    assert (residual[left_out] == values[left_out]).all()


def test_error_feedback_brings_every_value_over_in_the_end():
    """A constant delta of which a tenth is sent each time: the mean of what arrived goes to the delta."""
    layout = (TensorSpec("weight", (400,)),)
    delta = normal_update(layout)["weight"]
    codec, residual, arrived = TopKCodec(0.1), np.zeros(400, np.float32), np.zeros(400)
    for _ in range(300):
        wanted = {"weight": delta + residual}
        data = encode(codec, wanted, layout)
        arrived += codec.decode(data, layout)["weight"]
        residual = residual_of(wanted, data, codec, layout)["weight"]
    np.testing.assert_allclose(arrived / 300, delta, atol=0.1)
    assert np.abs(residual).max() < 50 * np.abs(delta).max()


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=30, unique=True))
def test_gaps_of_every_length_travel(places):
    size = 100_001
    layout = (TensorSpec("weight", (size,)),)
    values = np.zeros(size, np.float32)
    values[places] = np.arange(1, len(places) + 1)
    codec = TopKCodec(len(places) / size, None)
    data = encode(codec, {"weight": values}, layout)
    assert len(data) <= codec.encoded_bytes(layout)
    kept = codec.kept(size)
    assert len(places) <= kept <= len(places) + 1
    assert (codec.decode(data, layout)["weight"] == values).all()


def test_sparse_updates_are_small_and_coded_where_it_pays():
    layout = (TensorSpec("weight", (100_000,)),)
    codec = TopKCodec(0.01)
    data = encode(codec, normal_update(layout), layout)
    assert data[36] == 1 and 400_000 / len(data) > 180
    tiny = encode(codec, normal_update())
    assert tiny[36] == 0


# -------------------------------------------------------------------------------------------------------------- hostile


def refuse(codec: Codec, data: bytes, layout: Layout = LAYOUT) -> WireError:
    """Both readers must refuse ``data``, and nothing may be added."""
    into = np.zeros(layout_size(layout))
    with pytest.raises(WireError):
        codec.decode(data, layout)
    with pytest.raises(WireError) as error:
        codec.accumulate(data, layout, 1.0, into)
    assert not into.any()
    return error.value


def reframe(body: bytes) -> bytes:
    """A frame with a right length and checksum around any body."""
    return struct.pack("<4sHHQI", b"EVUP", 1, 0, 20 + len(body), crc32c(body)) + body


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_flipped_bit_and_truncation_is_detected(codec):
    data = encode(codec, normal_update())
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refuse(codec, bytes(damaged))
    for length in range(len(data)):
        assert isinstance(refuse(codec, data[:length]), CorruptError)


@settings(max_examples=300)
@given(st.binary(max_size=120), st.integers(0, 120), codecs)
def test_hostile_bodies_never_crash(junk, keep, codec):
    good = encode(codec, normal_update())[20:]
    for body in (good[:keep] + junk, good[:keep] + junk + good[keep + len(junk) :]):
        into = np.zeros(layout_size(LAYOUT))
        try:
            codec.accumulate(reframe(body), LAYOUT, 1.0, into)
        except WireError:
            assert not into.any()
        else:
            assert np.isfinite(into).all()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 3e38])
def test_hostile_scales_are_refused(scale):
    rotated = bytearray(encode(ROTATED[1], normal_update())[20:])
    struct.pack_into("<f", rotated, 28, scale)
    assert "scale" in str(refuse(ROTATED[1], reframe(bytes(rotated))))
    sparse = bytearray(encode(SPARSE[0], normal_update())[20:])
    struct.pack_into("<f", sparse, 12, scale)
    assert "malformed" in str(refuse(SPARSE[0], reframe(bytes(sparse))))


def test_hostile_padding_is_refused():
    body = bytearray(encode(RotatedCodec(2), normal_update())[20:])
    body[-1] |= 0xC0  # 30 values, and two of padding
    assert "value too many" in str(refuse(RotatedCodec(2), reframe(bytes(body))))


@pytest.mark.parametrize(
    ("gaps", "why"),
    [
        (b"\x00\x00", "too few|malformed"),
        (b"\x00\x00\x00\x00", "malformed"),
        (b"\x00\x00\x80", "malformed"),
        (b"\x00\x80\x80\x80\x80\x80\x00\x00", "malformed"),
        (b"\x00\x00\x86\x27", "outside"),
        (b"\x00\xff\xff\xff\xff\x7f\x00", "outside"),
    ],
)
def test_hostile_places_are_refused(gaps, why):
    layout = (TensorSpec("weight", (5000,)),)
    codec = TopKCodec(3 / 5000)
    head = encode(codec, normal_update(layout), layout)[20:32]
    body = head + struct.pack("<fB3x", 1.0, 0) + gaps + b"\x01\x02\x03"
    with pytest.raises(WireError, match=why):
        codec.decode(reframe(body), layout)
    refuse(codec, reframe(body), layout)


def test_a_bomb_unfolds_no_further_than_an_update():
    codec = TopKCodec(0.1)
    bomb = zlib.compress(bytes(1 << 16), 9)[: codec.encoded_bytes(LAYOUT)]
    body = encode(codec, normal_update())[20:32] + struct.pack("<fB3x", 1.0, 1) + bomb
    assert isinstance(refuse(codec, reframe(body)), WireError)
    with pytest.raises(CorruptError, match="at most 100"):
        inflate(zlib.compress(bytes(1 << 24), 9), 100)


@given(st.binary(max_size=300))
def test_entropy_coding_round_trips(data):
    is_coded, coded = deflate_if_smaller(data)
    assert len(coded) <= len(data)
    assert (inflate(coded, len(data)) if is_coded else coded) == data


def test_updates_of_another_task_are_refused_with_the_reason():
    data = encode(RotatedCodec(1), normal_update())
    for other in (RotatedCodec(2), TopKCodec(0.1), UpdateCodec(1), UpdateCodec(None)):
        assert "another codec" in str(refuse(other, data)) or "zero" in str(refuse(other, data))
    renamed = (TensorSpec("other", (4, 6)), *LAYOUT[1:])
    assert "layout" in str(refuse(RotatedCodec(1), data, renamed))


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("codec", [*CODECS, UpdateCodec(None), UpdateCodec(5, 64)], ids=str)
def test_plans_round_trip(codec):
    assert codec_from_plan(codec.to_plan()) == codec


@pytest.mark.parametrize(
    "plan",
    [
        task_pb2.UpdatePlan(),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_FIELDS, bits=8),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_ROTATED),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_ROTATED, bits=5),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_ROTATED, bits=1, block_size=8),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_TOP_K),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_TOP_K, keep_fraction=1.5),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_TOP_K, keep_fraction=math.nan),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_TOP_K, keep_fraction=0.1, bits=4),
        task_pb2.UpdatePlan(codec=task_pb2.CODEC_QUANTIZED, bits=8, keep_fraction=0.1),
    ],
)
def test_plans_out_of_range_are_refused(plan):
    with pytest.raises(UpdateError):
        codec_from_plan(plan)
