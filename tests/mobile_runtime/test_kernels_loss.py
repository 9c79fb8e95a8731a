"""Softmax and losses against float64, on every instruction set. Losses hold to 1e-6 relative, however small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere, instruction_sets, native_machine, run_one
from scipy import special

from evensong.mobile_runtime.errors import DivergedError, ExampleError

row_counts = st.one_of(st.integers(1, 9), st.just(100))
class_counts = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 1000]))
seeds = st.integers(0, 2**32 - 1)
spreads = st.sampled_from([0.01, 1.0, 10.0, 60.0])

ONE = (1,)
COUNT = Wanted(ONE, np.int32)


def draw(seed: int, rows: int, columns: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal((rows, columns))).astype(np.float32)
    return x, rng.standard_normal((rows, columns)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(rows=row_counts, columns=class_counts, spread=spreads, seed=seeds)
def test_softmax_and_log_softmax_with_gradients(rows: int, columns: int, spread: float, seed: int) -> None:
    x, dy = draw(seed, rows, columns, spread)
    p, log_p = special.softmax(x.astype(np.float64), axis=1), special.log_softmax(x.astype(np.float64), axis=1)
    check_everywhere("SOFTMAX", [x], [x.shape], [p], rtol=1e-6 + 5e-7 * spread, atol=1e-30)
    check_everywhere("LOG_SOFTMAX", [x], [x.shape], [log_p], rtol=1e-6, atol=2e-7 * max(spread, 1))
    p32, log_p32 = p.astype(np.float32), log_p.astype(np.float32)
    dot = (dy.astype(np.float64) * p32).sum(axis=1, keepdims=True)
    check_everywhere("SOFTMAX_GRAD", [dy, p32], [x.shape], [p32 * (dy - dot)], rtol=1e-5, atol=1e-6)
    total = dy.sum(axis=1, keepdims=True, dtype=np.float64)
    expected = dy - np.exp(log_p32.astype(np.float64)) * total
    check_everywhere("LOG_SOFTMAX_GRAD", [dy, log_p32], [x.shape], [expected], rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    rows=row_counts, columns=class_counts, spread=spreads, confident=st.booleans(), seed=seeds, gradient=st.booleans()
)
def test_cross_entropy(rows: int, columns: int, spread: float, confident: bool, seed: int, gradient: bool) -> None:
    x, _ = draw(seed, rows, columns, spread)
    rng = np.random.default_rng(seed)
    labels = (x.argmax(axis=1) if confident else rng.integers(0, columns, rows)).astype(np.int32)
    if confident:
        x[np.arange(rows), labels] += np.float32(20)
    x64 = x.astype(np.float64)
    at_label = (np.arange(rows), labels)
    # log(1 + rest) with rest summed over the other classes: a confident loss keeps its digits in the reference too
    others = x64 - x64[at_label][:, None]
    others[at_label] = -np.inf
    loss = np.mean(np.logaddexp(0, special.logsumexp(others, axis=1)))
    correct = (x.argmax(axis=1) == labels).sum()
    dlogits = special.softmax(x64, axis=1)
    dlogits[at_label] = -special.expit(special.logsumexp(others, axis=1))
    expected = [loss, correct, dlogits / rows]
    outputs = [ONE, COUNT, x.shape]
    count = 3 if gradient else 2
    # The rest is e^-20 and less where the label is certain: its relative error is that of x's differences.
    tolerance = {"rtol": 1e-6 + 2e-7 * spread, "atol": 1e-9}
    check_everywhere("CROSS_ENTROPY", [x, labels], outputs[:count], expected[:count], **tolerance)


def test_the_first_of_equal_logits_is_the_prediction() -> None:
    x = np.zeros((3, 20), np.float32)
    labels = np.array([0, 1, 19], np.int32)
    check_everywhere("CROSS_ENTROPY", [x, labels], [ONE, COUNT], [np.log(20), 1], rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 10, 2**31 - 1, -(2**31)])
def test_labels_outside_the_classes_are_refused(label: int) -> None:
    x, labels = np.zeros((2, 10), np.float32), np.array([3, label], np.int32)
    for name in instruction_sets():
        with pytest.raises(ExampleError):
            run_one("CROSS_ENTROPY", [x, labels], [ONE, COUNT, x.shape], machine=native_machine(name))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 9])
def test_losses_that_are_not_finite_are_reported(bad: float, place: int) -> None:
    x = np.zeros((1, 10), np.float32)
    x[0, place] = bad
    target = np.zeros((1, 10), np.float32)
    labels = np.zeros(1, np.int32)
    for name in instruction_sets():
        machine = native_machine(name)
        for op, other in (("CROSS_ENTROPY", labels), ("MSE", target), ("BCE_WITH_LOGITS", target)):
            with pytest.raises(DivergedError):
                run_one(op, [x, other], [ONE, COUNT, x.shape], machine=machine)


@settings(max_examples=40, deadline=None)
@given(size=st.one_of(st.integers(1, 70), st.just(5000)), seed=seeds, gradient=st.booleans())
def test_mean_squared_error(size: int, seed: int, gradient: bool) -> None:
    prediction, target = np.random.default_rng(seed).standard_normal((2, size)).astype(np.float32)
    error = prediction.astype(np.float64) - target
    expected = [(error**2).mean(), 0, 2 * error / size]
    count = 3 if gradient else 2
    outputs = [ONE, COUNT, (size,)][:count]
    check_everywhere("MSE", [prediction, target], outputs, expected[:count], rtol=1e-6, atol=1e-7 / size)


@settings(max_examples=40, deadline=None)
@given(
    size=st.one_of(st.integers(1, 70), st.just(5000)),
    spread=spreads,
    hard=st.booleans(),
    seed=seeds,
    gradient=st.booleans(),
)
def test_binary_cross_entropy(size: int, spread: float, hard: bool, seed: int, gradient: bool) -> None:
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal(size)).astype(np.float32)
    t = ((x > 0) if hard else rng.uniform(0, 1, size)).astype(np.float32)
    x64 = x.astype(np.float64)
    loss = (np.maximum(x64, 0) - x64 * t + np.log1p(np.exp(-np.abs(x64)))).mean()
    expected = [loss, ((x > 0) == (t > 0.5)).sum(), (special.expit(x64) - t) / size]
    count = 3 if gradient else 2
    outputs = [ONE, COUNT, (size,)][:count]
    check_everywhere("BCE_WITH_LOGITS", [x, t], outputs, expected[:count], rtol=1e-6, atol=2e-7 / size)


def test_a_loss_is_the_mean_over_live_rows_only() -> None:
    x = np.zeros((2, 4), np.float32)
    labels = np.array([0, 3], np.int32)
    loss, correct = run_one(
        "CROSS_ENTROPY", [Given(x, batched=True), Given(labels, batched=True)], [ONE, COUNT], max_batch=9, batch=2
    )
    assert loss[0] == pytest.approx(np.log(4), rel=1e-6) and correct[0] == 1
