"""The operations of int8 training: the same bytes on every instruction set, near float32, rounding that keeps means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, instruction_sets, native_machine, run_one
from op_cases import CASES, Case
from torch.nn import functional as F

from evensong.mobile_runtime.twin import TwinMachine
from evensong.mobile_runtime.twin_ops_int8_train import mix
from evensong.wire.program import OPS

PRODUCTS = ["G_LINEAR_INPUT", "G_CONV2D_INPUT", "G_LINEAR_UPDATE", "G_CONV2D_UPDATE"]
OTHERS = [name for name in OPS if name.startswith(("Q_", "G_")) and name not in PRODUCTS]


def _outcome(case: Case, set_name: str | None) -> list[bytes]:
    artifact = case.artifact()
    machine = TwinMachine(artifact) if set_name is None else native_machine(set_name)(artifact)
    outputs = case.buffers()
    machine.run(0, case.batch, case.values, outputs, learning_rate=0.1, step=case.step, seed=case.seed)
    return [*(output.tobytes() for output in outputs), machine.state.tobytes(), machine.slots.tobytes()]


@needs_native
@pytest.mark.parametrize("name", PRODUCTS + OTHERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_instruction_set_gives_the_same_bytes(name: str, data: st.DataObject) -> None:
    case = Case(data.draw, name)
    CASES[name](case)
    expected = _outcome(case, None)
    for set_name in instruction_sets():
        assert _outcome(case, set_name) == expected, set_name


def _numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_stochastic_rounding_keeps_the_mean() -> None:
    """An element is off by less than one step, and the mean over many steps is right."""
    values = _numbers(1, 500) * 0.3
    total = np.zeros_like(values, np.float64)
    for step in range(1, 401):
        g, grads = run_one(
            "G_QUANTIZE",
            [values, np.zeros((4, 2), np.float32)],
            [Wanted((1, 500), np.int8)],
            index=1,
            step=step,
            seed=9,
        )
        real = g.astype(np.float64) * grads[1, 0]
        assert np.abs(real - values).max() <= 1.001 * grads[1, 0]
        total += real
    assert np.abs(total / 400 - values).max() < 0.2 * grads[1, 0]  # five standard deviations of a mean of 400


def test_the_hash_is_even() -> None:
    """Every bit of consecutive indices is set half of the time, and flips half of the time with the key's last bit."""
    words = mix(np.arange(1 << 14, dtype=np.uint32), np.uint32(12345))
    other = mix(np.arange(1 << 14, dtype=np.uint32), np.uint32(12344))
    for bits in (words, words ^ other, words[1:] ^ words[:-1]):
        shares = [float((bits >> np.uint32(bit) & 1).mean()) for bit in range(32)]
        assert min(shares) > 0.47 and max(shares) < 0.53


def test_an_input_gradient_is_the_one_of_float32() -> None:
    g = np.random.default_rng(1).integers(-127, 128, (2, 4, 3, 6)).astype(np.int8)
    w = np.random.default_rng(2).integers(-127, 128, (6, 3, 2, 5)).astype(np.int8)
    grads = np.zeros((2, 2), np.float32)
    grads[0, 0] = 0.25
    geometry = {"stride_h": 2, "stride_w": 1, "pad_top": 1, "dilation_h": 1, "dilation_w": 1, "groups": 1}
    dx, after = run_one(
        "G_CONV2D_INPUT",
        [g, w, grads],
        [Wanted((2, 8, 4, 5), np.int8)],
        **{"from": 0, "to": 1, "stream": 3},
        **geometry,
    )
    exact = torch.nn.grad.conv2d_input(
        (2, 5, 9, 4),
        torch.from_numpy(w).double().permute(0, 3, 1, 2),
        torch.from_numpy(g).double().permute(0, 3, 1, 2),
        stride=(2, 1),
    )[:, :, 1:]
    real = dx.astype(np.float64) * after[1, 0]
    np.testing.assert_allclose(real, 0.25 * exact.permute(0, 2, 3, 1).numpy(), atol=1.001 * after[1, 0])
    assert after[1, 1] == pytest.approx(after[1, 0])  # nothing grew: the next step keeps the scale


@pytest.mark.parametrize("compensated", [False, True])
def test_a_step_is_the_one_of_float32_sgd(compensated: bool) -> None:
    """In units of the weights' grid: exact to half a 256th of it with a residual, to one without."""
    rng = np.random.default_rng(3)
    w, g = rng.integers(-100, 100, (7, 11)).astype(np.int8), rng.integers(-127, 128, (40, 7)).astype(np.int8)
    x = rng.integers(-128, 128, (40, 11)).astype(np.int8)
    w_scale, scales = (0.01 + rng.random(7) / 50).astype(np.float32), np.array([0.02, 0.03], np.float32)
    grads = np.array([[0.0001, 0], [0.0002, 0]], np.float32)
    residual = [np.zeros((7, 11), np.int8)] if compensated else []
    moved, *rest = run_one(
        "G_LINEAR_UPDATE",
        [w, g, Given(x, zero_point=-20), w_scale, scales, grads, *residual],
        [],
        learning_rate=0.5,
        **{"from": 1, "entry": 1, "weight_decay": 0.01, "stream": 5},
    )
    gradient = 0.0002 * 0.03 / w_scale[:, None] * (g.T.astype(np.float64) @ (x.astype(np.float64) + 20))
    real = w * w_scale[:, None]
    expected = real - 0.5 * (gradient + 0.01 * real)
    got = moved.astype(np.float64) + (rest[0].astype(np.float64) / 256 if compensated else 0)
    most = 127 + 127 / 256 if compensated else 127
    error = got - np.clip(expected / w_scale[:, None], -127.5, most)
    assert np.abs(error).max() <= (0.6 / 256 if compensated else 1.001)


def test_small_steps_are_not_lost() -> None:
    """A hundred steps of a tenth of the grid move a weight by ten, either way of rounding."""
    grads = np.array([[1.0, 0]], np.float32)
    for residual in ([], [np.zeros((1, 64), np.int8)]):
        w, rest, one = np.zeros((1, 64), np.int8), residual, np.ones((1, 1), np.int8)
        x, unit = np.ones((1, 64), np.int8), np.ones(1, np.float32)
        for step in range(1, 101):
            w, *rest = run_one(
                "G_LINEAR_UPDATE",
                [w, one, x, unit, unit, grads, *rest],
                [],
                learning_rate=0.1,
                step=step,
                stream=1,
            )
        assert abs(float(w.mean()) + 10) < 0.6
        assert F.l1_loss(torch.from_numpy(w).float(), torch.full((1, 64), -10.0)) < 3
