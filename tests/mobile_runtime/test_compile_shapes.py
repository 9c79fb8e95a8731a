"""Chains of calls that only move elements: wherever the compiler leaves the bytes, the author sees what torch sees."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from evensong.mobile_runtime import load
from evensong.mobile_runtime.compiler import compile

pytestmark = pytest.mark.torch

Step = Callable[[torch.Tensor], torch.Tensor]


class Chain(nn.Module):
    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return x


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[str], list[Step], tuple[int, ...]]:
    """Names and functions of some steps that keep the batch in axis 0, and the shape of one example."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    names: list[str] = []
    steps: list[Step] = []
    current = shape
    for _ in range(draw(st.integers(1, 6))):
        name, step = draw(_step(current))
        names.append(name)
        steps.append(step)
        current = tuple(step(torch.zeros(2, *current)).shape[1:])
    return names, steps, shape


def _step(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[str, Step]]:
    rank = len(shape)
    axis = st.integers(1, max(rank, 1))
    options = [
        st.permutations(range(1, rank + 1)).map(lambda p: (f"permute {p}", lambda x: x.permute(0, *p))),
        _factors(math.prod(shape)).map(lambda s: (f"reshape {s}", lambda x: x.reshape(x.shape[0], *s))),
        st.just(("relu", torch.relu)),
        st.just(("double", lambda x: x + x.clone())),
    ]
    if rank < 5:
        options.append(st.integers(1, rank + 1).map(lambda a: (f"unsqueeze {a}", lambda x: x.unsqueeze(a))))
    if rank:
        options += [
            axis.map(lambda a: (f"join {a}", lambda x: torch.cat([x, -x], dim=a))),
            axis.map(lambda a: (f"mean {a}", lambda x: x.mean(dim=a, keepdim=True))),
            axis.map(lambda a: (f"first half {a}", lambda x: x.chunk(2, dim=a)[0])),
            axis.map(lambda a: (f"last {a}", lambda x: x.select(a, -1).unsqueeze(a))),
            st.just(("a row of factors", lambda x: x * torch.arange(1.0, x.shape[-1] + 1))),
        ]
    return st.one_of(options)


def _factors(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes with ``size`` elements."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return st.sampled_from(divisors).flatmap(
        lambda first: st.sampled_from([d for d in divisors if size // first % d == 0]).map(
            lambda second: (first, second, size // first // second)
        )
    )


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chains())
def test_chains_of_moves_compute_what_torch_computes(chain: tuple[list[str], list[Step], tuple[int, ...]]) -> None:
    names, steps, shape = chain
    model = Chain(steps)
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    session = load(compile(model, x[:1], loss="mse", predict_batch=2))
    expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.predict(x), expected, rtol=1e-5, atol=1e-6, err_msg=" > ".join(names))
