"""Fields in lanes, held against Python's integers: no carry, no stray bit, no value too large."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evensong.secagg import ParameterError, ProtocolError
from evensong.secagg.packing import WIDTHS, Fields, width_for
from evensong.wire import UpdateError

pytestmark = pytest.mark.secagg


@given(st.sampled_from(WIDTHS), st.integers(0, 40), st.integers(1, 9), st.randoms(use_true_random=False))
def test_lanes_add_as_their_fields_do(width, count, devices, random):
    fields = Fields(count, width)
    top = ((1 << width) - 1) // devices
    vectors = [[random.choice((0, top, random.randint(0, top))) for _ in range(count)] for _ in range(devices)]
    lanes = np.zeros(fields.lanes, np.uint64)
    for vector in vectors:
        lanes += fields.pack(np.array(vector, np.uint64))
    assert fields.unpack(lanes).tolist() == [sum(column) for column in zip(*vectors, strict=True)]


@given(st.sampled_from(WIDTHS), st.lists(st.integers(0, 255), max_size=20))
def test_the_lowest_field_stands_in_the_lowest_bits(width, values):
    fields = Fields(len(values), width)
    lanes = fields.pack(np.array(values, np.uint32))
    expected = [
        sum(value << width * place for place, value in enumerate(values[start : start + 64 // width]))
        for start in range(0, len(values), 64 // width)
    ]
    assert [int(lane) for lane in lanes] == expected
    assert fields.nbytes == 8 * len(expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_value_that_outgrows_its_field_is_refused(width):
    fields = Fields(3, width)
    fields.pack(np.array([0, 0, (1 << width) - 1], np.uint64))
    with pytest.raises(UpdateError, match="outgrows"):
        fields.pack(np.array([0, 0, 1 << width], np.uint64))


@pytest.mark.parametrize("width", WIDTHS)
def test_bits_between_or_behind_the_fields_are_refused(width):
    fields = Fields(64 // width + 1, width)  # one field in the last lane
    lanes = fields.pack(np.ones(fields.count, np.uint32))
    for lane, bit in [(0, 63)] * (64 % width > 0) + [(1, width), (1, 63)]:
        dirty = lanes.copy()
        dirty[lane] |= np.uint64(1 << bit)
        with pytest.raises(ProtocolError, match="no field owns"):
            fields.unpack(dirty)


def test_another_number_of_lanes_is_refused():
    with pytest.raises(ProtocolError, match="wrong length"):
        Fields(5, 16).unpack(np.zeros(3, np.uint64))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_width_is_the_narrowest_that_holds_the_sum(width):
    assert width_for((1 << width) - 1) == width
    assert Fields.for_sum(7, (1 << width) - 1) == Fields(7, width)


def test_a_sum_beyond_every_field_is_refused():
    with pytest.raises(ParameterError, match="outgrows every field"):
        width_for(1 << 32)
    with pytest.raises(ParameterError):
        Fields(1, 9)
