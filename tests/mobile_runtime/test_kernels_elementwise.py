"""Element-wise operations, reductions and dropout against float64 and torch, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import Given, Wanted, check_everywhere, instruction_sets, native_machine, run_one
from scipy import special

from evensong.wire.program import Activation

KINDS = [kind for kind in Activation if Activation.NONE < kind <= Activation.SILU]
FUNCTIONS = [kind for kind in Activation if kind > Activation.SILU]

#: Sizes around every vector width, and 1.
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 130, 257]))
seeds = st.integers(0, 2**32 - 1)


def f64(kind: Activation, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    match kind:
        case Activation.RELU:
            return np.where(x < 0, 0, x)
        case Activation.RELU6:
            return np.clip(x, 0, 6)
        case Activation.HARDSWISH:
            return x * np.clip(x + 3, 0, 6) / 6
        case Activation.GELU:
            return x * special.ndtr(x)
        case Activation.GELU_TANH:
            return x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
        case Activation.SIGMOID:
            return special.expit(x)
        case Activation.TANH:
            return np.tanh(x)
        case Activation.SILU:
            return x * special.expit(x)
        case Activation.EXP:
            return np.exp(x)
        case Activation.LOG:
            return np.log(x)
        case Activation.SQRT:
            return np.sqrt(x)
        case Activation.RECIPROCAL:
            return 1 / x
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_activations_are_accurate_in_the_relative_sense_over_their_whole_range(kind: Activation) -> None:
    magnitudes = np.geomspace(1e-30, 80, 4000)
    x = np.concatenate([-magnitudes, magnitudes, [0.0]]).astype(np.float32)
    # The cubic of GELU_TANH and the exponent of SILU's and SIGMOID's left tails magnify the rounding of their argument.
    rtol = {Activation.GELU_TANH: 2e-5, Activation.GELU: 2e-6}.get(kind, 1e-6)
    check_everywhere("UNARY", [x], [x.shape], [f64(kind, x)], rtol=rtol, atol=2e-38, kind=kind)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=sizes, kind=st.sampled_from([Activation.RELU, Activation.RELU6]), seed=seeds)
def test_a_mask_of_bits_passes_what_the_activations_gradient_passes(
    rows: int, columns: int, kind: Activation, seed: int
) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(seed)
    x = random.choice(np.array([-1, -1e-40, -0.0, 0, 1e-40, 3, 6, 7, np.inf, np.nan], np.float32), (rows, columns))
    dy = random.normal(size=x.shape).astype(np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    y = torch.nn.functional.relu6(leaf) if kind == Activation.RELU6 else torch.nn.functional.relu(leaf)
    y.backward(torch.from_numpy(dy))
    expected = np.where(np.isnan(x), 0, leaf.grad.numpy())
    packed = np.packbits(expected != 0, axis=1, bitorder="little")
    for name in instruction_sets():
        machine = native_machine(name)
        wanted = Wanted(packed.shape, dtype=np.uint8)
        (mask,) = run_one("ACTIVATION_MASK", [y.detach().numpy()], [wanted], machine=machine, kind=kind)
        np.testing.assert_array_equal(mask, packed, err_msg=name)
        (dx,) = run_one("MASK_GRAD", [dy, mask], [x.shape], machine=machine)
        np.testing.assert_array_equal(dx, expected, err_msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_activations_keep_nan_and_saturate_at_infinity(kind: Activation) -> None:
    x = np.array([np.nan, np.inf, 1e38, -1e38], np.float32)
    for name in instruction_sets():
        (y,) = run_one("UNARY", [x], [x.shape], machine=native_machine(name), kind=kind)
        assert np.isnan(y[0])
        bounded = {Activation.RELU6: 6, Activation.SIGMOID: 1, Activation.TANH: 1}
        assert y[1] == bounded.get(kind, np.inf)
        assert y[3] == (-1 if kind == Activation.TANH else 0)


@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.name)
def test_functions_are_accurate_over_their_whole_range(kind: Activation) -> None:
    if kind == Activation.EXP:
        x = np.linspace(-87, 88, 5000).astype(np.float32)
    else:
        x = np.concatenate([np.geomspace(1e-37, 1e37, 5000), np.linspace(0.5, 2, 999)]).astype(np.float32)
        if kind == Activation.LOG:
            x = np.append(x, np.geomspace(2e-45, 1e-38, 99).astype(np.float32))
    expected = f64(kind, x)
    tolerance = 1e-7 if kind == Activation.LOG else 0.0  # near 1, where the logarithm is zero
    check_everywhere("UNARY", [x], [x.shape], [expected], rtol=1e-6, atol=tolerance * 1e-5, kind=kind)


def test_functions_at_the_borders_of_their_domains() -> None:
    x = np.array([0.0, -1.0, np.inf, np.nan, -np.inf], np.float32)
    expected = {
        Activation.EXP: [1, np.exp(-1.0), np.inf, np.nan, 0],
        Activation.LOG: [-np.inf, np.nan, np.inf, np.nan, np.nan],
        Activation.SQRT: [0, np.nan, np.inf, np.nan, np.nan],
        Activation.RECIPROCAL: [np.inf, -1, 0, np.nan, 0],
    }
    for kind, values in expected.items():
        check_everywhere("UNARY", [x], [x.shape], [values], rtol=1e-6, atol=1e-38, kind=kind)


@pytest.mark.torch
@pytest.mark.parametrize("kind", [*KINDS, *FUNCTIONS], ids=lambda kind: kind.name)
@settings(max_examples=15, deadline=None)
@given(size=sizes, seed=seeds, inplace=st.sampled_from([None, (0, 0), (1, 0)]))
def test_activation_gradients_match_torch(
    kind: Activation, size: int, seed: int, inplace: tuple[int, int] | None
) -> None:
    torch = pytest.importorskip("torch")
    functions = {
        Activation.RELU: torch.relu,
        Activation.RELU6: torch.nn.functional.relu6,
        Activation.HARDSWISH: torch.nn.functional.hardswish,
        Activation.GELU: torch.nn.functional.gelu,
        Activation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        Activation.SIGMOID: torch.sigmoid,
        Activation.TANH: torch.tanh,
        Activation.SILU: torch.nn.functional.silu,
        Activation.EXP: torch.exp,
        Activation.LOG: torch.log,
        Activation.SQRT: torch.sqrt,
        Activation.RECIPROCAL: torch.reciprocal,
    }
    rng = np.random.default_rng(seed)
    x = (4 * rng.standard_normal(size)).astype(np.float32)
    if kind in FUNCTIONS:
        x = rng.uniform(0.2, 3, size).astype(np.float32)
    dy = rng.standard_normal(size).astype(np.float32)
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = functions[kind](leaf)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    s = y.detach().numpy().astype(np.float32) if kind.gradient_reads_output else x
    expected = leaf.grad.numpy()
    check_everywhere("UNARY_GRAD", [dy, s], [x.shape], [expected], rtol=3e-6, atol=2e-6, kind=kind, inplace=inplace)


@settings(max_examples=40, deadline=None)
@given(
    op=st.sampled_from(["ADD", "SUB", "MUL", "MAXIMUM", "MINIMUM", "STEP"]),
    rows=st.integers(1, 9),
    columns=sizes,
    whole=st.booleans(),
    seed=seeds,
    inplace=st.sampled_from([None, (0, 0), (1, 0)]),
)
def test_arithmetic_broadcasts_rows(
    op: str, rows: int, columns: int, whole: bool, seed: int, inplace: tuple[int, int] | None
) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rows, columns)).astype(np.float32)
    b = rng.standard_normal((rows if whole else 1, columns)).astype(np.float32)
    b[..., ::3] = a[:1, ::3]  # some are equal
    expected = {
        "ADD": a + b,
        "SUB": a - b,
        "MUL": a * b,
        "MAXIMUM": np.maximum(a, b),
        "MINIMUM": np.minimum(a, b),
        "STEP": np.heaviside(a - b, np.float32(0.25)),
    }[op]
    b = b if whole else b.reshape(columns)
    options = {"at_equal": 0.25} if op == "STEP" else {}
    inplace = inplace if whole or inplace == (0, 0) else None
    check_everywhere(op, [a, b], [a.shape], [expected], inplace=inplace, **options)


@pytest.mark.parametrize("op", ["MAXIMUM", "MINIMUM"])
def test_comparisons_keep_nan(op: str) -> None:
    a, b = np.array([np.nan, 1, 1], np.float32), np.array([1, np.nan, np.inf], np.float32)
    check_everywhere(op, [a, b], [a.shape], [[np.nan, np.nan, np.inf if op == "MAXIMUM" else 1]])


@settings(max_examples=20, deadline=None)
@given(size=sizes, seed=seeds, inplace=st.sampled_from([None, (0, 0)]))
def test_scale_and_fill(size: int, seed: int, inplace: tuple[int, int] | None) -> None:
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    expected = -1.5 * x.astype(np.float64) + 0.25
    check_everywhere("SCALE", [x], [x.shape], [expected], rtol=1e-6, atol=1e-7, alpha=-1.5, beta=0.25, inplace=inplace)
    check_everywhere("FILL", [], [x.shape], [np.full(size, np.float32(0.1))], value=0.1)


@settings(max_examples=30, deadline=None)
@given(rows=st.one_of(st.integers(1, 9), st.integers(60, 70), st.just(3000)), columns=sizes, seed=seeds)
def test_sums_over_rows_do_not_lose_digits(rows: int, columns: int, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((rows, columns)) + 1).astype(np.float32)
    expected = x.sum(axis=0, dtype=np.float64)
    check_everywhere("SUM_ROWS", [x], [(columns,)], [expected], rtol=1e-6, atol=3e-7 * rows**0.5)


@settings(max_examples=30, deadline=None)
@given(outer=st.integers(1, 4), axis=st.integers(1, 70), inner=sizes, seed=seeds)
def test_means_over_an_axis_and_their_gradient(outer: int, axis: int, inner: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((outer, axis, inner)).astype(np.float32)
    attributes = {"axis_size": axis, "inner_size": inner}
    mean = x.mean(axis=1, dtype=np.float64)
    check_everywhere("REDUCE_MEAN", [x], [(outer, inner)], [mean], rtol=1e-6, atol=1e-6, **attributes)
    dy = x[:, 0]
    spread = np.repeat(dy[:, None].astype(np.float64) / axis, axis, axis=1)
    check_everywhere("REDUCE_MEAN_GRAD", [dy], [x.shape], [spread], rtol=1e-6, **attributes)


def test_only_live_rows_are_written() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (y,) = run_one("SCALE", [Given(x, batched=True)], [Wanted(x.shape, batched=True)], max_batch=5, batch=2, alpha=2)
    assert (y == 2 * x).all()


# ---------------------------------------------------------------------------------------------------------- dropout


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 word by word, as the paper writes it (Salmon et al. 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_the_reference_generator_gives_the_published_vectors() -> None:
    # Random123's known answers for philox4x32 with 10 rounds.
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@settings(max_examples=25, deadline=None)
@given(
    size=sizes,
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    stream=st.integers(-(2**31), 2**31 - 1),
    step=st.integers(1, 2**64 - 1),
    seed=st.integers(0, 2**64 - 1),
    inplace=st.sampled_from([None, (0, 0)]),
)
def test_dropout_keeps_exactly_what_the_generator_says(
    size: int, p: float, stream: int, step: int, seed: int, inplace: tuple[int, int] | None
) -> None:
    words = [
        philox((i // 4, stream & 0xFFFFFFFF, step & 0xFFFFFFFF, step >> 32), (seed & 0xFFFFFFFF, seed >> 32))[i % 4]
        for i in range(size)
    ]
    keep = np.array([(word >> 8) * 2.0**-24 >= np.float32(p) for word in words])
    x = np.linspace(-1, 1, size).astype(np.float32)
    expected = np.where(keep, x / (1 - np.float32(p)), 0)
    options = {"p": p, "stream": stream, "step": step, "seed": seed, "inplace": inplace}
    outputs = [x.shape, Wanted(x.shape, np.uint8)]
    check_everywhere("DROPOUT", [x], outputs, [expected, keep], rtol=2e-7, **options)
    mask = keep.astype(np.uint8)
    check_everywhere("DROPOUT_GRAD", [x, mask], [x.shape], [expected], rtol=2e-7, p=p, inplace=inplace)
