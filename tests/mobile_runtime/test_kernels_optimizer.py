"""Optimiser steps against torch.optim in float64, several steps long, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import instruction_sets, native_machine, run_one

from evensong.mobile_runtime.errors import DivergedError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

STEPS = 5
sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 200]))
seeds = st.integers(0, 2**32 - 1)


def gradients(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((STEPS + 1, size)).astype(np.float32)


def run_torch(optimizer: type, w: np.ndarray, steps: np.ndarray, **options: object) -> np.ndarray:
    leaf = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    stepper = optimizer([leaf], **options)
    for g in steps:
        leaf.grad = torch.tensor(g, dtype=torch.float64)
        stepper.step()
    return leaf.detach().numpy()


def run_ours(op: str, name: str, w: np.ndarray, steps: np.ndarray, slots: int, **options: float) -> np.ndarray:
    state = [w, *(np.zeros_like(w) for _ in range(slots))]
    for number, g in enumerate(steps, start=1):
        w, *rest = state
        state = run_one(op, [w, g, *rest], [], machine=native_machine(name), step=number, **options)
    return state[0]


@settings(max_examples=30, deadline=None)
@given(
    size=sizes,
    seed=seeds,
    momentum=st.sampled_from([None, 0.0, 0.9]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.01]),
)
def test_sgd(size: int, seed: int, momentum: float | None, nesterov: bool, weight_decay: float) -> None:
    w, *steps = gradients(seed, size)
    nesterov = nesterov and bool(momentum)
    options = {"momentum": momentum or 0.0, "weight_decay": weight_decay, "nesterov": nesterov}
    expected = run_torch(torch.optim.SGD, w, steps, lr=0.1, **options)
    for name in instruction_sets():
        slots = 0 if momentum is None else 1
        result = run_ours("SGD", name, w, steps, slots, learning_rate=0.1, **options)
        np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(size=sizes, seed=seeds, weight_decay=st.sampled_from([0.0, 0.01]), decoupled=st.booleans())
def test_adam(size: int, seed: int, weight_decay: float, decoupled: bool) -> None:
    w, *steps = gradients(seed, size)
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = run_torch(optimizer, w, steps, lr=0.01, weight_decay=weight_decay)
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": weight_decay, "decoupled": decoupled}
    for name in instruction_sets():
        result = run_ours("ADAM", name, w, steps, 2, learning_rate=0.01, **options)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(
    rows=sizes,
    outputs=sizes,
    inputs=sizes,
    seed=seeds,
    weight_decay=st.sampled_from([0.0, 0.01]),
)
def test_a_linear_update_is_the_gradient_and_sgd(
    rows: int, outputs: int, inputs: int, seed: int, weight_decay: float
) -> None:
    random = np.random.default_rng(seed)
    w, dy, x = (random.normal(size=s).astype(np.float32) for s in [(outputs, inputs), (rows, outputs), (rows, inputs)])
    leaf = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(torch.tensor(x, dtype=torch.float64), leaf).backward(
        torch.tensor(dy, dtype=torch.float64)
    )
    torch.optim.SGD([leaf], lr=0.1, weight_decay=weight_decay).step()
    for name in instruction_sets():
        options = {"learning_rate": 0.1, "weight_decay": weight_decay}
        (result,) = run_one("LINEAR_UPDATE", [w, dy, x], [], machine=native_machine(name), **options)
        np.testing.assert_allclose(result, leaf.detach().numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_adam_knows_large_step_numbers() -> None:
    w, g = np.ones(3, np.float32), np.full(3, 0.5, np.float32)
    m, v = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
    for name in instruction_sets():
        updated, *_ = run_one(
            "ADAM",
            [w, g, m, v],
            [],
            machine=native_machine(name),
            step=2**63,
            learning_rate=0.5,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
        )
        np.testing.assert_allclose(updated, 0.5, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 16, 33])
@pytest.mark.parametrize("op", ["SGD", "ADAM"])
def test_a_weight_that_overflows_is_reported(op: str, size: int) -> None:
    w, g = np.zeros(size, np.float32), np.zeros(size, np.float32)
    w[-1], g[-1] = -3e38, 3e38
    slots = [np.zeros(size, np.float32)] * (2 if op == "ADAM" else 0)
    options = {"decoupled": 1, "weight_decay": -1e38, "beta2": 0.5, "eps": 1.0} if op == "ADAM" else {}
    for name in instruction_sets():
        with pytest.raises(DivergedError):
            run_one(op, [w, g, *slots], [], machine=native_machine(name), learning_rate=1.0, **options)


def test_adam_with_eps_zero_does_not_blame_the_lanes_beyond_the_end() -> None:
    w = g = np.ones(3, np.float32)
    zero = np.zeros(3, np.float32)
    for name in instruction_sets():
        options = {"beta1": 0.9, "beta2": 0.999, "eps": 0.0, "learning_rate": 0.25}
        updated, *_ = run_one("ADAM", [w, g, zero, zero], [], machine=native_machine(name), **options)
        np.testing.assert_allclose(updated, 0.75, rtol=1e-5)
