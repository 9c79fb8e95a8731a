"""GRU and LSTM against torch's layers and autograd, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere, run_one

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch

sizes = st.one_of(st.integers(1, 9), st.sampled_from([16, 33, 64]))
seeds = st.integers(0, 2**32 - 1)


class Reference:
    """A layer of torch in float64 whose inputs already are the gates' part: its w_ih is the identity."""

    def __init__(self, kind: str, examples: int, steps: int, hidden: int, reverse: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parts = 3 if kind == "GRU" else 4
        gates = self.parts * hidden
        self.layer = getattr(torch.nn, kind)(gates, hidden, batch_first=True).double()
        with torch.no_grad():
            self.layer.weight_ih_l0.copy_(torch.eye(gates))
            self.layer.bias_ih_l0.zero_()
            for weight in (self.layer.weight_hh_l0, self.layer.bias_hh_l0):
                drawn = torch.randn(weight.shape, generator=generator) / hidden**0.5
                weight.copy_(drawn.float())
        self.gx = torch.randn(examples, steps, gates, generator=generator).double().requires_grad_()
        self.dy = torch.randn(examples, steps, hidden, generator=generator).double()
        gx = self.gx.flip(1) if reverse else self.gx
        y = self.layer(gx)[0]
        self.y = y.flip(1) if reverse else y
        self.y.backward(self.dy)
        self.attributes = {"reverse": int(reverse)}

    def arrays(self, *tensors: torch.Tensor) -> list[np.ndarray]:
        return [tensor.detach().numpy().astype(np.float32) for tensor in tensors]

    def forward(self) -> list[np.ndarray]:
        return self.arrays(self.gx, self.layer.weight_hh_l0, self.layer.bias_hh_l0)

    def gradients(self) -> list[np.ndarray]:
        """dgx, dw, db."""
        return self.arrays(self.gx.grad, self.layer.weight_hh_l0.grad, self.layer.bias_hh_l0.grad)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@settings(max_examples=15, deadline=None)
@given(
    examples=st.sampled_from([1, 3, 5, 20, 50]),
    steps=st.integers(1, 7),
    hidden=sizes,
    reverse=st.booleans(),
    seed=seeds,
)
def test_forward_and_gradient_are_torchs(
    kind: str, examples: int, steps: int, hidden: int, reverse: bool, seed: int
) -> None:
    reference = Reference(kind, examples, steps, hidden, reverse, seed)
    gx, w, b = reference.forward()
    y, dy = reference.arrays(reference.y, reference.dy)
    gates, states = run_one(kind, [gx, w, b], [gx.shape, y.shape], **reference.attributes)
    np.testing.assert_allclose(states, y, rtol=1e-5, atol=2e-6)
    check_everywhere(kind, [gx, w, b], [gx.shape, y.shape], [gates, y], atol=4e-6, **reference.attributes)

    operands = [dy, gates, states, w] + ([b] if kind == "GRU" else [])
    dgx, dw, db = reference.gradients()
    _, scratch, *_ = run_one(f"{kind}_GRAD", operands, [gx.shape, y.shape, w.shape, b.shape], **reference.attributes)
    check_everywhere(
        f"{kind}_GRAD",
        operands,
        [gx.shape, y.shape, w.shape, b.shape],
        [dgx, scratch, dw, db],
        rtol=2e-5,
        atol=2e-5 * max(1, np.abs(dw).max()),
        **reference.attributes,
    )


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_gates_take_the_place_of_their_inputs(kind: str) -> None:
    reference = Reference(kind, 5, 4, 6, False, 0)
    gx, w, b = reference.forward()
    y, dy = reference.arrays(reference.y, reference.dy)
    expected = run_one(kind, [gx, w, b], [gx.shape, y.shape])
    check_everywhere(kind, [gx, w, b], [gx.shape, y.shape], expected, atol=2e-6, inplace=(0, 0))
    operands = [dy, *expected, w] + ([b] if kind == "GRU" else [])
    shapes = [gx.shape, y.shape, w.shape, b.shape]
    expected = run_one(f"{kind}_GRAD", operands, shapes)
    check_everywhere(f"{kind}_GRAD", operands, shapes, expected, atol=1e-5, inplace=(1, 0))


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_long_sequences_and_a_part_of_the_batch(kind: str) -> None:
    """More steps than one product takes at a time; fewer examples than the program has room for."""
    reference = Reference(kind, 2, 600, 5, True, 1)
    gx, w, b = reference.forward()
    y, dy = reference.arrays(reference.y, reference.dy)
    dgx, dw, db = reference.gradients()
    options = {"max_batch": 6, "batch": 2, "reverse": 1}
    wanted = [Wanted(gx.shape, batched=True), Wanted(y.shape, batched=True)]
    gates, states = run_one(kind, [Given(gx, batched=True), w, b], wanted, **options)
    np.testing.assert_allclose(states, y, atol=1e-5)
    operands = [*(Given(value, batched=True) for value in (dy, gates, states)), w] + ([b] if kind == "GRU" else [])
    results = run_one(f"{kind}_GRAD", operands, [*wanted, w.shape, b.shape], **options)
    for result, expected in zip((results[0], *results[2:]), (dgx, dw, db), strict=True):
        np.testing.assert_allclose(result, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())
