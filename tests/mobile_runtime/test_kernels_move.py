"""Operations that move elements, and embeddings, against NumPy, bit for bit on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere, instruction_sets, native_machine, run_one

from evensong.mobile_runtime.errors import ExampleError

dtypes = st.sampled_from([np.float32, np.int8, np.uint8, np.int32])
dims = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 33]))


def numbered(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    return np.arange(int(np.prod(shape)), dtype=np.int64).astype(dtype).reshape(shape)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), dtype=dtypes, rank=st.integers(1, 6))
def test_transpose(data: st.DataObject, dtype: type[np.generic], rank: int) -> None:
    shape = tuple(data.draw(st.lists(dims if rank <= 3 else st.integers(1, 5), min_size=rank, max_size=rank)))
    perm = data.draw(st.permutations(range(rank)))
    x = numbered(shape, dtype)
    y = x.transpose(perm)
    attributes = {f"perm{i}": perm[i] if i < rank else -1 for i in range(6)}
    check_everywhere("TRANSPOSE", [x], [Wanted(y.shape, dtype)], [y], **attributes)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=dtypes, rank=st.integers(1, 4), parts=st.integers(1, 5))
def test_concat_and_slice(data: st.DataObject, dtype: type[np.generic], rank: int, parts: int) -> None:
    shape = data.draw(st.lists(dims, min_size=rank, max_size=rank))
    axis = data.draw(st.integers(0, rank - 1))
    pieces = []
    for k in range(parts):
        shape[axis] = data.draw(dims)
        pieces.append(numbered(tuple(shape), dtype) + np.array(k).astype(dtype))
    whole = np.concatenate(pieces, axis)
    check_everywhere("CONCAT", pieces, [Wanted(whole.shape, dtype)], [whole], axis=axis)

    start = sum(piece.shape[axis] for piece in pieces[:-1])
    last = pieces[-1]
    check_everywhere("SLICE", [whole], [Wanted(last.shape, dtype)], [last], axis=axis, start=start)
    if dtype == np.float32:
        kept = whole * (np.arange(whole.shape[axis]) >= start).reshape([-1 if i == axis else 1 for i in range(rank)])
        check_everywhere("SLICE_GRAD", [last], [whole.shape], [kept], axis=axis, start=start)


def test_slice_gradient_of_a_middle_part_is_zero_around_it() -> None:
    dy = np.ones((2, 3), np.float32)
    expected = np.zeros((2, 7))
    expected[:, 2:5] = 1
    check_everywhere("SLICE_GRAD", [dy], [(2, 7)], [expected], axis=1, start=2)


@settings(max_examples=15, deadline=None)
@given(size=dims, dtype=dtypes)
def test_copy(size: int, dtype: type[np.generic]) -> None:
    x = numbered((size, 3), dtype)
    check_everywhere("COPY", [x], [Wanted((3, size), dtype)], [x])


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), rows=st.integers(1, 20), columns=dims, seed=st.integers(0, 2**32 - 1))
def test_embedding_and_its_gradient(count: int, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, count).astype(np.int32)
    table = rng.standard_normal((rows, columns)).astype(np.float32)
    check_everywhere("EMBEDDING", [ids, table], [(count, columns)], [table[ids]])
    dy = rng.standard_normal((count, columns)).astype(np.float32)
    dtable = np.zeros((rows, columns))
    np.add.at(dtable, ids, dy)
    check_everywhere("EMBEDDING_GRAD", [dy, ids], [table.shape], [dtable], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_ids_outside_the_table_are_refused(bad: int) -> None:
    ids, table = np.array([0, 4, bad], np.int32), np.zeros((5, 3), np.float32)
    for name in instruction_sets():
        with pytest.raises(ExampleError):
            run_one("EMBEDDING", [ids, table], [(3, 3)], machine=native_machine(name))
        with pytest.raises(ExampleError):
            run_one("EMBEDDING_GRAD", [np.zeros((3, 3), np.float32), ids], [(5, 3)], machine=native_machine(name))


def test_only_live_rows_move() -> None:
    x = numbered((2, 3, 4), np.float32)
    (y,) = run_one(
        "TRANSPOSE",
        [Given(x, batched=True)],
        [Wanted((2, 4, 3), batched=True)],
        max_batch=5,
        batch=2,
        perm0=0,
        perm1=2,
        perm2=1,
        perm3=-1,
        perm4=-1,
        perm5=-1,
    )
    assert (y == x.transpose(0, 2, 1)).all()
