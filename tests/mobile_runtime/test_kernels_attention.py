"""Batched matrix products and attention against NumPy and torch's autograd, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere, run_one

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch

sizes = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 33, 70]))
lengths = st.one_of(st.integers(1, 9), st.sampled_from([32, 47, 49, 100]))
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 4),
    rows=st.one_of(sizes, st.just(300)),
    depth=sizes,
    columns=sizes,
    transpose=st.integers(0, 2),
    seed=seeds,
)
def test_matrix_products(count: int, rows: int, depth: int, columns: int, transpose: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((count, rows, depth), (count, depth, columns)))
    expected = a.astype(np.float64) @ b.astype(np.float64)
    left = a.swapaxes(1, 2).copy() if transpose == 1 else a
    right = b.swapaxes(1, 2).copy() if transpose == 2 else b
    check_everywhere(
        "MATMUL", [left, right], [expected.shape], [expected], atol=1e-6 * depth + 5e-6, transpose=transpose
    )


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 3),
    queries=lengths,
    keys=lengths,
    heads=st.integers(1, 3),
    size=st.one_of(st.integers(1, 9), st.just(40)),
    value_size=st.one_of(st.integers(1, 9), st.just(40)),
    causal=st.booleans(),
    seed=seeds,
)
def test_attention_and_its_gradient_are_torchs(
    examples: int, queries: int, keys: int, heads: int, size: int, value_size: int, causal: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(examples, queries, heads, size), (examples, keys, heads, size), (examples, keys, heads, value_size)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    dy = rng.standard_normal((*shapes[0][:3], value_size)).astype(np.float32)
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (q, k, v)]
    heads_first = [leaf.transpose(1, 2) for leaf in leaves]
    scale = 1.5 / size**0.5
    y = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=scale).transpose(1, 2)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    scores = heads_first[0] @ heads_first[1].mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys).triu(1).bool(), -torch.inf)
    lse = scores.logsumexp(-1).transpose(1, 2).detach().numpy()
    attributes = {"causal": int(causal), "scale": scale}
    forward = [y.detach().numpy(), lse]
    check_everywhere("ATTENTION", [q, k, v], [dy.shape, lse.shape], forward, rtol=1e-5, atol=5e-6, **attributes)
    gradients = [leaf.grad.numpy() for leaf in leaves]
    largest = max(1.0, *(np.abs(gradient).max() for gradient in gradients))
    operands = [dy, q, k, v, lse.astype(np.float32)]
    check_everywhere("ATTENTION_GRAD", operands, shapes, gradients, rtol=1e-4, atol=1e-5 * largest, **attributes)


def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    q, k = np.full((1, 2, 1, 1), 300, np.float32), np.array([1, 2, -3], np.float32).reshape(1, 3, 1, 1)
    v = np.array([1, 10, 100], np.float32).reshape(1, 3, 1, 1)
    check_everywhere(
        "ATTENTION", [q, k, v], [(1, 2, 1, 1), (1, 2, 1)], [np.full(2, 10.0), np.full(2, 600.0)], scale=1.0
    )


def test_a_part_of_the_batch() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 2, 3)).astype(np.float32) for _ in range(3))
    expected, _ = run_one("ATTENTION", [q, k, v], [q.shape, q.shape[:3]], scale=0.5)
    batched = [Given(value, batched=True) for value in (q, k, v)]
    (y,) = run_one("ATTENTION", batched, [Wanted(q.shape, batched=True)], max_batch=3, batch=2, scale=0.5)
    np.testing.assert_array_equal(y, expected)
