"""Normalisation against float64 formulas (and torch's autograd), on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere, instruction_sets, native_machine, run_one

from evensong.mobile_runtime.errors import DivergedError

EPS, MOMENTUM = 1e-3, 0.1
TOLERANCE = {"rtol": 2e-5, "atol": 3e-6}

row_counts = st.one_of(st.integers(1, 9), st.integers(60, 70), st.just(700))
widths = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """x, dy of [rows, columns] and gamma, beta, mean, variance of [columns]; x lies off zero."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, columns)) + 5 * rng.standard_normal(columns)).astype(np.float32)
    dy = rng.standard_normal((rows, columns)).astype(np.float32)
    gamma, beta, mean = rng.standard_normal((3, columns)).astype(np.float32)
    return x, dy, gamma, beta, mean, rng.uniform(0.1, 2, columns).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(rows=row_counts, columns=widths, seed=seeds)
def test_batch_norm_training_normalises_and_keeps_running_statistics(rows: int, columns: int, seed: int) -> None:
    x, _, gamma, beta, running_mean, running_var = draw(seed, rows, columns)
    x64 = x.astype(np.float64)
    mean, variance = x64.mean(axis=0), x64.var(axis=0)
    rstd = 1 / np.sqrt(variance + EPS)
    if rows == 1:  # the rounding of nothing: rstd is 1 / sqrt(eps)
        rstd = np.full(columns, EPS**-0.5)
    expected = [
        (x64 - mean) * rstd * gamma + beta,
        mean,
        rstd,
        (1 - MOMENTUM) * running_mean.astype(np.float64) + MOMENTUM * mean,
        (1 - MOMENTUM) * running_var.astype(np.float64) + MOMENTUM * variance * rows / max(rows - 1, 1),
    ]
    check_everywhere(
        "BATCH_NORM_TRAIN",
        [x, gamma, beta, running_mean, running_var],
        [x.shape, (columns,), (columns,)],
        expected,
        rtol=2e-5,
        atol=1e-4,  # a mean of 15 has an ulp of 1e-6, and rstd is up to 32
        eps=EPS,
        momentum=MOMENTUM,
    )


def test_running_statistics_that_overflow_are_reported() -> None:
    x = np.array([[1e30], [-1e30]], np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    for name in instruction_sets():
        with pytest.raises(DivergedError):
            run_one(
                "BATCH_NORM_TRAIN",
                [x, one, zero, zero, one],
                [x.shape, (1,), (1,)],
                machine=native_machine(name),
                eps=EPS,
                momentum=MOMENTUM,
            )


@settings(max_examples=40, deadline=None)
@given(rows=row_counts, columns=widths, seed=seeds)
def test_batch_norm_gradient(rows: int, columns: int, seed: int) -> None:
    x, dy, gamma, _, _, _ = draw(seed, rows, columns)
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    rstd = (1 / np.sqrt(x.var(axis=0, dtype=np.float64) + 0.1)).astype(np.float32)
    g, x_hat = dy.astype(np.float64), (x.astype(np.float64) - mean) * rstd
    dgamma, dbeta = (g * x_hat).sum(axis=0), g.sum(axis=0)
    dx = gamma * rstd * (g - dbeta / rows - x_hat * dgamma / rows)
    shapes = [x.shape, (columns,), (columns,)]
    tolerance = {"rtol": 2e-5, "atol": 3e-6 * max(rows, 16) ** 0.5}
    check_everywhere("BATCH_NORM_GRAD", [dy, x, gamma, mean, rstd], shapes, [dx, dgamma, dbeta], **tolerance)


@pytest.mark.torch
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 30), columns=widths, seed=seeds)
def test_batch_norm_forward_and_gradient_together_are_torchs(rows: int, columns: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    dy = rng.standard_normal((rows, columns)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, columns)).astype(np.float32)
    zero, one = np.zeros(columns, np.float32), np.ones(columns, np.float32)
    row = (columns,)
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, gamma, beta)]
    y = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=1e-2)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    expected = [leaf.grad.numpy() for leaf in leaves]
    _, mean, rstd, *_ = run_one("BATCH_NORM_TRAIN", [x, gamma, beta, zero, one], [x.shape, row, row], eps=1e-2)
    check_everywhere("BATCH_NORM_GRAD", [dy, x, gamma, mean, rstd], [x.shape, row, row], expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(rows=row_counts, columns=widths, seed=seeds, inplace=st.sampled_from([None, (0, 0)]), wanted=st.integers(1, 3))
def test_batch_norm_with_fixed_statistics(
    rows: int, columns: int, seed: int, inplace: tuple[int, int] | None, wanted: int
) -> None:
    x, dy, gamma, beta, mean, variance = draw(seed, rows, columns)
    rstd = 1 / np.sqrt(variance.astype(np.float64) + EPS)
    distance = x.astype(np.float64) - mean
    y = distance * rstd * gamma + beta
    inputs = [x, gamma, beta, mean, variance]
    check_everywhere("BATCH_NORM_EVAL", inputs, [x.shape], [y], rtol=2e-5, atol=2e-5, eps=EPS, inplace=inplace)
    expected = [dy * gamma * rstd, (dy * distance * rstd).sum(axis=0), dy.sum(axis=0, dtype=np.float64)]
    scale = np.abs(dy * distance * rstd).sum(axis=0).max()
    check_everywhere(
        "BATCH_NORM_EVAL_GRAD",
        [dy, x, gamma, mean, variance],
        [x.shape, (columns,), (columns,)][:wanted],
        expected[:wanted],
        rtol=2e-5,
        atol=1e-6 * max(scale, 1),
        eps=EPS,
    )


@settings(max_examples=40, deadline=None)
@given(rows=row_counts, columns=widths, seed=seeds)
def test_layer_norm_and_its_gradient(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, columns)) + 5).astype(np.float32)
    _, dy, gamma, beta, _, _ = draw(seed, rows, columns)
    x64, eps = x.astype(np.float64), 1e-3
    mean, variance = x64.mean(axis=1, keepdims=True), x64.var(axis=1, keepdims=True)
    rstd = 1 / np.sqrt(variance + eps)
    x_hat = (x64 - mean) * rstd
    check_everywhere(
        "LAYER_NORM",
        [x, gamma, beta],
        [x.shape, (rows,), (rows,)],
        [x_hat * gamma + beta, mean, rstd],
        rtol=2e-5,
        atol=3e-5,
        eps=eps,
    )
    g = dy.astype(np.float64) * gamma
    dx = rstd * (g - g.mean(axis=1, keepdims=True) - x_hat * (g * x_hat).mean(axis=1, keepdims=True))
    expected = [dx, (dy * x_hat).sum(axis=0), dy.sum(axis=0, dtype=np.float64)]
    statistics = [mean.astype(np.float32).ravel(), rstd.astype(np.float32).ravel()]
    check_everywhere(
        "LAYER_NORM_GRAD",
        [dy, x, gamma, *statistics],
        [x.shape, (columns,), (columns,)],
        expected,
        rtol=1e-4,
        atol=3e-4,  # rstd is up to 32 where a row has one element, and x has an ulp of 5e-7
    )


def test_layer_norm_over_several_dimensions_and_a_part_of_the_batch() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    gamma, beta = np.full((3, 5), 2, np.float32), np.full((3, 5), 1, np.float32)
    flat = x.reshape(2, 15).astype(np.float64)
    expected = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True) * 2 + 1
    y, *_ = run_one(
        "LAYER_NORM",
        [Given(x, batched=True), gamma, beta],
        [Wanted(x.shape, batched=True), Wanted((2,), batched=True), Wanted((2,), batched=True)],
        max_batch=3,
        batch=2,
        eps=0.0,
    )
    np.testing.assert_allclose(y.reshape(2, 15), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.torch
@settings(max_examples=25, deadline=None)
@given(
    examples=st.integers(1, 4),
    length=st.one_of(st.integers(2, 9), st.just(150)),
    groups=st.sampled_from([1, 2, 3, 8]),
    size=st.one_of(st.integers(1, 9), st.just(33)),
    seed=seeds,
)
def test_group_norm_and_its_gradient_are_torchs(examples: int, length: int, groups: int, size: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    channels = groups * size
    x, dy, gamma, beta, _, _ = draw(seed, examples * length, channels)
    shape, statistics = (examples, length, channels), (examples, groups)
    x, dy = x.reshape(shape) / 5, dy.reshape(shape)
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, gamma, beta)]
    y = torch.nn.functional.group_norm(leaves[0].transpose(1, 2), groups, leaves[1], leaves[2], 1e-3).transpose(1, 2)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    grouped = x.astype(np.float64).reshape(examples, length, groups, size)
    mean, rstd = grouped.mean(axis=(1, 3)), 1 / np.sqrt(grouped.var(axis=(1, 3)) + 1e-3)
    shapes = [shape, statistics, statistics]
    forward = [y.detach().numpy(), mean, rstd]
    check_everywhere("GROUP_NORM", [x, gamma, beta], shapes, forward, rtol=2e-5, atol=2e-5, eps=1e-3)
    operands = [dy, x, gamma, mean.astype(np.float32), rstd.astype(np.float32)]
    expected = [leaf.grad.numpy() for leaf in leaves]
    scale = max(1, np.abs(expected[1]).max())
    check_everywhere(
        "GROUP_NORM_GRAD", operands, [shape, gamma.shape, gamma.shape], expected, rtol=1e-4, atol=2e-5 * scale
    )


@pytest.mark.torch
@settings(max_examples=25, deadline=None)
@given(rows=row_counts, columns=widths, seed=seeds)
def test_rms_norm_and_its_gradient_are_torchs(rows: int, columns: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    x, dy, gamma, _, _, _ = draw(seed, rows, columns)
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, gamma)]
    y = torch.nn.functional.rms_norm(leaves[0], (columns,), leaves[1], eps=1e-3)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    rstd = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1) + 1e-3)
    forward = [y.detach().numpy(), rstd]
    check_everywhere("RMS_NORM", [x, gamma], [x.shape, (rows,)], forward, rtol=2e-5, atol=2e-6, eps=1e-3)
    expected = [leaf.grad.numpy() for leaf in leaves]
    operands = [dy, x, gamma, rstd.astype(np.float32)]
    scale = max(1, np.abs(expected[1]).max(), np.abs(rstd).max())
    check_everywhere("RMS_NORM_GRAD", operands, [x.shape, gamma.shape], expected, rtol=1e-4, atol=1e-5 * scale)
