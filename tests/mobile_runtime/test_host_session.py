"""The session over both engines: what goes in, what comes out, and what is refused without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import ENGINES
from hypothesis import given, settings
from hypothesis import strategies as st
from program_builder import Memory, ProgramBuilder, classifier

from evensong.mobile_runtime import (
    CheckpointError,
    DivergedError,
    ExampleError,
    ProgramError,
    RuntimeFault,
    Session,
    VariableError,
    load,
)
from evensong.wire.program import Artifact, DType, VariableFlag

ARTIFACT = classifier(max_batch=8, features=4, classes=3)
W, B = "linear.weight", "linear.bias"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def session(engine: Any) -> Iterator[Session]:
    opened = load(ARTIFACT, engine=engine)
    yield opened
    opened.close()


def examples(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, 4)).astype(np.float32), rng.integers(0, 3, count)


def logits(session: Session, x: Any) -> Any:
    values = session.get()
    return np.asarray(x) @ values[W].T + values[B]


# ------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("count", [1, 3, 8, 9, 16, 21])
def test_predict_splits_any_number_of_examples(session: Session, count: int) -> None:
    x, _ = examples(count)
    for _ in range(3):  # the second and third take the prepared path
        y = session.predict(x)
        assert y.shape == (count, 3) and y.dtype == np.float32
        np.testing.assert_allclose(y, logits(session, x), rtol=1e-5, atol=1e-6)


def test_a_prediction_is_the_callers_own(session: Session) -> None:
    x, _ = examples(2)
    first = session.predict(x)
    kept = first.copy()
    session.predict(-x)
    x[:] = 0
    np.testing.assert_array_equal(first, kept)


def test_predict_follows_the_variables(session: Session) -> None:
    x, labels = examples(4)
    session.predict(x)
    session.train_step(x, labels, learning_rate=1.0)
    np.testing.assert_allclose(session.predict(x), logits(session, x), rtol=1e-5, atol=1e-6)
    session.set({W: np.zeros((3, 4)), B: [1, 2, 3]})
    np.testing.assert_array_equal(session.predict(x), np.tile(np.float32([1, 2, 3]), (4, 1)))


def test_evaluate_is_the_mean_over_all_examples_and_changes_nothing(session: Session) -> None:
    x, labels = examples(21)
    before = session.checkpoint()
    result = session.evaluate(x, labels)
    y = logits(session, x).astype(np.float64)
    log_p = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    assert result.loss == pytest.approx(-log_p[np.arange(21), labels].mean(), rel=1e-5)
    assert result.correct == (y.argmax(axis=1) == labels).sum()
    assert result.examples == 21 and result.accuracy == result.correct / 21
    assert session.checkpoint() == before


def test_training_learns_and_counts_steps(session: Session) -> None:
    x, labels = examples(8)
    before = session.evaluate(x, labels)
    results = [session.train_step(x, labels, learning_rate=0.5) for _ in range(50)]
    assert results[0].loss == pytest.approx(before.loss, rel=1e-5) and results[0].correct == before.correct
    assert results[-1].loss < before.loss / 2 and results[-1].examples == 8


def test_one_step_is_sgd_with_momentum(session: Session) -> None:
    x, labels = examples(5)
    start = session.get()
    for _ in range(2):
        session.train_step(x, labels, learning_rate=0.1)
    w, b = start[W].astype(np.float64), start[B].astype(np.float64)
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    for _ in range(2):
        y = x @ w.T + b
        p = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
        p[np.arange(5), labels] -= 1
        vw, vb = 0.5 * vw + p.T @ x / 5, 0.5 * vb + p.mean(axis=0)
        w, b = w - 0.1 * vw, b - 0.1 * vb
    np.testing.assert_allclose(session.get()[W], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(session.get()[B], b, rtol=1e-5, atol=1e-6)


def test_zero_learning_rate_moves_nothing(session: Session) -> None:
    before = session.get()
    session.train_step(*examples(3), learning_rate=0.0)
    for name, value in session.get().items():
        np.testing.assert_array_equal(value, before[name])


# ------------------------------------------------------------------------------------------------- bad input

X, LABELS = examples(3)

BAD_EXAMPLES: dict[str, tuple[Any, Any]] = {
    "wrong features": (X[:, :3], LABELS),
    "wrong rank": (X[0], LABELS),
    "no examples": (X[:0], LABELS[:0]),
    "different numbers": (X, LABELS[:2]),
    "not a number": (np.full_like(X, np.nan), LABELS),
    "infinite": (np.full_like(X, np.inf), LABELS),
    "beyond float32": (np.full(X.shape, 1e300), LABELS),
    "unscaled pixels": (np.ones(X.shape, np.uint8), LABELS),
    "complex": (X.astype(np.complex64), LABELS),
    "words": (np.full(X.shape, "one"), LABELS),
    "objects": (np.full(X.shape, None), LABELS),
    "float labels": (X, LABELS.astype(np.float32)),
    "labels of two dimensions": (X, LABELS[:, None]),
    "label beyond int32": (X, LABELS + 2**40),
    "label too large": (X, [0, 1, 3]),
    "label negative": (X, [0, -1, 1]),
    "two inputs": ((X, X), LABELS),
}


@pytest.mark.parametrize("what", BAD_EXAMPLES)
def test_bad_examples_are_refused_and_change_nothing(session: Session, what: str) -> None:
    inputs, target = BAD_EXAMPLES[what]
    before = session.checkpoint()
    for use in (
        lambda: session.train_step(inputs, target, learning_rate=0.1),
        lambda: session.evaluate(inputs, target),
    ):
        with pytest.raises(ExampleError):
            use()
    assert session.checkpoint() == before
    session.train_step(X, LABELS, learning_rate=0.1)


@pytest.mark.parametrize(
    "what",
    [w for w, (_, target) in BAD_EXAMPLES.items() if "label" not in w and w not in ("different numbers", "two inputs")],
)
def test_bad_inputs_of_predict_are_refused(session: Session, what: str) -> None:
    session.predict(X)  # also when a prepared call is there
    with pytest.raises(ExampleError):
        session.predict(BAD_EXAMPLES[what][0])
    with pytest.raises(ExampleError):
        session.predict(X, X)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.int32, np.int64, np.uint16, ">f4"])
def test_inputs_of_other_dtypes_and_layouts_are_cast(session: Session, dtype: Any) -> None:
    x = np.arange(12).reshape(3, 4)
    expected = session.predict(x.astype(np.float32))
    np.testing.assert_array_equal(session.predict(x.astype(dtype)), expected)
    np.testing.assert_array_equal(session.predict(np.asfortranarray(x.astype(dtype))), expected)
    np.testing.assert_array_equal(session.predict(x.tolist()), expected)
    assert session.evaluate(x.astype(dtype), np.array([0, 1, 2], np.uint8)).examples == 3


@pytest.mark.parametrize("learning_rate", [-0.1, float("nan"), float("inf"), 1e300])
def test_bad_learning_rates_are_refused(session: Session, learning_rate: float) -> None:
    with pytest.raises(ExampleError, match="learning rate"):
        session.train_step(X, LABELS, learning_rate=learning_rate)


def test_a_step_takes_one_batch_at_most(session: Session) -> None:
    with pytest.raises(ExampleError, match="at most 8"):
        session.train_step(*examples(9), learning_rate=0.1)


def test_what_the_artifact_cannot_do_is_named(engine: Any) -> None:
    builder = ProgramBuilder("predict")
    builder.op(
        "LINEAR",
        [builder.input("x", (1, 2)), builder.const(np.ones((1, 2), np.float32))],
        [builder.output("y", (1, 1))],
    )
    session = load(builder.artifact(), engine=engine)
    np.testing.assert_array_equal(session.predict([[1, 2]]), [[3]])
    with pytest.raises(ProgramError, match="no program 'train'"):
        session.train_step([[1, 2]], [0], learning_rate=0.1)


def _ports(name: str, inputs: int, outputs: list[DType], *, batched: bool = True) -> Artifact:
    """A program of a few ports and no operation."""
    b = ProgramBuilder(name, 2)
    for number in range(inputs):
        b.input(f"in{number}", (2,), batched=batched)
    for number, dtype in enumerate(outputs):
        b.output(f"out{number}", (2,) if name == "predict" else (1,), dtype, batched=name == "predict")
    return b.artifact()


BROKEN_PROMISES = {
    "predict that trains": replace(ARTIFACT, programs=(replace(ARTIFACT.programs[2], name="predict"),)),
    "evaluate that trains": replace(ARTIFACT, programs=(replace(ARTIFACT.programs[2], name="evaluate"),)),
    "train that predicts": replace(ARTIFACT, programs=(replace(ARTIFACT.programs[0], name="train"),)),
    "predict without an output": _ports("predict", 1, []),
    "predict without an input": _ports("predict", 0, [DType.F32]),
    "evaluate without a target": _ports("evaluate", 1, [DType.F32, DType.I32]),
    "evaluate without correct": _ports("evaluate", 2, [DType.F32]),
    "correct as a float": _ports("train", 2, [DType.F32, DType.F32]),
    "inputs that are not batched": _ports("train", 2, [DType.F32, DType.I32], batched=False),
}


@pytest.mark.parametrize("what", BROKEN_PROMISES)
def test_programs_keep_what_their_names_promise(what: str) -> None:
    with pytest.raises(ProgramError, match="program"):
        load(BROKEN_PROMISES[what], engine="twin")


def test_accuracy_counts_every_answer(engine: Any) -> None:
    b = ProgramBuilder("evaluate", 2)
    x, t = b.input("x", (2, 3), batched=True), b.input("target", (2, 3), batched=True)
    b.op("BCE_WITH_LOGITS", [x, t], [b.output("loss", (1,)), b.output("correct", (1,), DType.I32)])
    result = load(b.artifact(), engine=engine).evaluate([[1, -1, 1]] * 3, [[1, 0, 0]] * 3)
    assert (result.correct, result.examples, result.accuracy) == (6, 3, 2 / 3)


# ------------------------------------------------------------------------------------------------- steps of one shape


def test_steps_of_one_shape_are_those_of_any_other_way_to_pass_the_examples(engine: Any) -> None:
    """Arrays of the port's own dtype take the prepared path from the second step on; lists never do."""
    with load(ARTIFACT, engine=engine) as prepared, load(ARTIFACT, engine=engine) as careful:
        for count in (8, 8, 8, 3, 3, 8):
            x, y = examples(count)
            step = prepared.train_step(x, y.astype(np.int32), learning_rate=0.3)
            assert step == careful.train_step(x.tolist(), y.tolist(), learning_rate=0.3)
        assert prepared.checkpoint() == careful.checkpoint()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_prepared_step_refuses_what_the_first_would(session: Session, bad: float) -> None:
    x, y = examples(8)
    labels = y.astype(np.int32)
    for _ in range(2):
        session.train_step(x, labels, learning_rate=0.1)
        session.predict(x)
    before = session.checkpoint()
    spoilt = x.copy()
    spoilt[7, 3] = bad
    with pytest.raises(ExampleError, match="NaN or infinite"):
        session.train_step(spoilt, labels, learning_rate=0.1)
    with pytest.raises(ExampleError, match="NaN or infinite"):
        session.predict(spoilt)
    with pytest.raises(ExampleError):
        session.train_step(x, np.full(8, 3, np.int32), learning_rate=0.1)
    with pytest.raises(ExampleError):
        session.train_step(x, labels, learning_rate=-bad)
    with pytest.raises(ExampleError):
        session.train_step(x, labels[:7], learning_rate=0.1)
    assert session.checkpoint() == before


def test_a_prepared_step_takes_numbers_whose_squares_overflow(session: Session) -> None:
    x, y = np.full((8, 4), 1e25, np.float32), np.zeros(8, np.int32)
    session.set({W: np.zeros((3, 4))})
    for _ in range(3):
        assert session.train_step(x, y, learning_rate=0).loss == pytest.approx(np.log(3), rel=1e-6)


def test_a_closed_session_takes_no_prepared_step(engine: Any) -> None:
    session = load(ARTIFACT, engine=engine)
    x, y = examples(8)
    for _ in range(2):
        session.train_step(x, y.astype(np.int32), learning_rate=0.1)
    session.close()
    with pytest.raises(RuntimeFault, match="closed"):
        session.train_step(x, y.astype(np.int32), learning_rate=0.1)


# ------------------------------------------------------------------------------------------------- divergence


def with_statistics() -> Artifact:
    """Batch norm before the loss, so that running statistics change before the loss is known."""
    b = ProgramBuilder("train", 4, Memory())
    x, target = b.input("x", (4, 3), batched=True), b.input("target", (4, 3), batched=True)
    loss, correct = b.output("loss", (1,)), b.output("correct", (1,), DType.I32)
    gamma = b.variable("gamma", np.ones(3, np.float32))
    beta = b.variable("beta", np.zeros(3, np.float32))
    mean = b.variable("mean", np.zeros(3, np.float32), VariableFlag.BUFFER)
    var = b.variable("var", np.ones(3, np.float32), VariableFlag.BUFFER)
    y, dy, dx = (b.scratch((4, 3), batched=True) for _ in range(3))
    m, rstd, dgamma, dbeta = (b.scratch((3,)) for _ in range(4))
    b.op("BATCH_NORM_TRAIN", [x, gamma, beta, mean, var], [y, m, rstd], eps=1e-5, momentum=0.1)
    b.op("MSE", [y, target], [loss, correct, dy])
    b.op("BATCH_NORM_GRAD", [dy, x, gamma, m, rstd], [dx, dgamma, dbeta])
    b.op("SGD", [gamma, dgamma], [])
    b.op("SGD", [beta, dbeta, b.slot((3,))], [], momentum=0.9)
    return b.artifact()


def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(engine: Any) -> None:
    session = load(with_statistics(), engine=engine)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    session.train_step(x, x, learning_rate=0.1)
    before = session.checkpoint()
    with pytest.raises(DivergedError, match="nothing was changed"):
        session.train_step(x, np.full((4, 3), 3e38), learning_rate=0.1)  # the squared error overflows
    assert session.checkpoint() == before
    session.train_step(x, x, learning_rate=0.1)
    assert session.checkpoint() != before


def two_layers() -> Artifact:
    """y = (x a) b with each weight updated as soon as its old value is used up, as the compiler does."""
    b = ProgramBuilder("train", 1, Memory())
    x, target = b.input("x", (1, 1), batched=True), b.input("target", (1, 1), batched=True)
    loss, correct = b.output("loss", (1,)), b.output("correct", (1,), DType.I32)
    first = b.variable("first", np.ones((1, 1), np.float32))
    last = b.variable("last", np.full((1, 1), 1e20, np.float32))
    hidden, y, dy, dhidden = (b.scratch((1, 1), batched=True) for _ in range(4))
    dlast, dfirst = b.scratch((1, 1)), b.scratch((1, 1))
    b.op("LINEAR", [x, first], [hidden])
    b.op("LINEAR", [hidden, last], [y])
    b.op("MSE", [y, target], [loss, correct, dy])
    b.op("LINEAR_GRAD_WEIGHT", [dy, hidden], [dlast])
    b.op("LINEAR_GRAD_INPUT", [dy, last], [dhidden])
    b.op("SGD", [last, dlast], [])
    b.op("LINEAR_GRAD_WEIGHT", [dhidden, x], [dfirst])
    b.op("SGD", [first, dfirst], [])
    return b.artifact()


def test_a_gradient_that_overflows_after_an_update_is_reported_as_such(engine: Any) -> None:
    session = load(two_layers(), engine=engine)
    saved = session.checkpoint()
    x = np.array([[0.1]], np.float32)
    with pytest.raises(DivergedError, match="other layers may have been updated") as raised:
        session.train_step(x, np.zeros((1, 1), np.float32), learning_rate=1.0)  # dy = 2e19, dhidden = 2e39
    assert "checkpoint" in str(raised.value)
    assert session.get(["last"])["last"] == pytest.approx(1e20 - 2e18)
    session.restore(saved)
    assert session.checkpoint() == saved


def test_a_weight_that_overflows_is_reported_with_the_way_out(session: Session) -> None:
    saved = session.checkpoint()
    x = np.full((1, 4), 1e30, np.float32)
    session.set({W: np.zeros((3, 4))})
    with pytest.raises(DivergedError, match="checkpoint"):
        session.train_step(x, [0], learning_rate=1e30)
    session.restore(saved)
    session.train_step(*examples(4), learning_rate=0.1)


# ------------------------------------------------------------------------------------------------- variables


def test_variables_come_in_the_authors_layout(engine: Any) -> None:
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    b = ProgramBuilder("anything", 1, Memory())
    b.variable("conv.weight", value, perm=(0, 2, 1))
    session = load(b.artifact(), engine=engine)
    assert session.variables["conv.weight"].shape == (2, 4, 3)
    np.testing.assert_array_equal(session.get()["conv.weight"], value.transpose(0, 2, 1))
    new = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    session.set({"conv.weight": new})
    got = session.get(["conv.weight"])["conv.weight"]
    np.testing.assert_array_equal(got, new)
    assert got.flags.c_contiguous


def test_get_gives_copies(session: Session) -> None:
    copy = session.get()[W]
    copy[:] = 99
    assert not np.array_equal(session.get()[W], copy)


def test_delta_is_current_minus_reference(session: Session) -> None:
    start = session.get()
    session.train_step(*examples(6), learning_rate=0.3)
    delta = session.delta(start)
    assert delta.keys() == start.keys()
    for name, value in delta.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous
        np.testing.assert_array_equal(value, session.get()[name] - start[name])
    assert session.delta({B: start[B]}).keys() == {B}


BAD_VALUES: dict[str, dict[str, Any]] = {
    "unknown": {"linear.wait": np.zeros(3)},
    "shape": {B: np.zeros(4)},
    "transposed": {W: np.zeros((4, 3))},
    "not finite": {B: [0, np.nan, 0]},
    "beyond float32": {B: [0, 1e300, 0]},
    "words": {B: ["a", "b", "c"]},
    "complex": {B: np.zeros(3, np.complex64)},
}


@pytest.mark.parametrize("what", BAD_VALUES)
def test_set_checks_every_value_before_it_writes_one(session: Session, what: str) -> None:
    before = session.checkpoint()
    with pytest.raises(VariableError):
        session.set({W: np.ones((3, 4)), **BAD_VALUES[what]})
    with pytest.raises(VariableError):
        session.delta(BAD_VALUES[what])
    assert session.checkpoint() == before


def test_frozen_variables_stay(session: Session) -> None:
    start = session.get()
    session.freeze([W])
    session.train_step(*examples(6), learning_rate=0.3)
    np.testing.assert_array_equal(session.get()[W], start[W])
    assert not np.array_equal(session.get()[B], start[B])
    session.freeze([])
    session.train_step(*examples(6), learning_rate=0.3)
    assert not np.array_equal(session.get()[W], start[W])
    with pytest.raises(VariableError):
        session.freeze(["nothing"])


def test_buffers_cannot_be_frozen(engine: Any) -> None:
    session = load(with_statistics(), engine=engine)
    with pytest.raises(VariableError, match="not trainable"):
        session.freeze(["mean"])


# ------------------------------------------------------------------------------------------------- state


def test_checkpoint_resumes_the_same_training(session: Session, engine: Any) -> None:
    x, labels = examples(8)
    session.train_step(x, labels, learning_rate=0.2)
    saved = session.checkpoint()
    session.train_step(x, labels, learning_rate=0.2)
    expected = session.checkpoint()
    other = load(ARTIFACT, engine=engine, seed=99)
    other.restore(saved)
    assert other.checkpoint() == saved
    other.train_step(x, labels, learning_rate=0.2)
    assert other.checkpoint() == expected


def test_both_engines_write_the_same_checkpoint() -> None:
    twin = load(ARTIFACT, engine="twin", seed=5)
    try:
        native = load(ARTIFACT, engine="native", seed=5)
    except RuntimeFault as fault:
        pytest.skip(str(fault))
    assert twin.checkpoint() == native.checkpoint()
    native.train_step(*examples(4), learning_rate=0.1)
    twin.restore(native.checkpoint())
    assert twin.checkpoint() == native.checkpoint()


def test_reset(session: Session) -> None:
    fresh = session.checkpoint()
    session.train_step(*examples(8), learning_rate=0.2)
    trained = session.get()
    session.reset_optimizer()
    np.testing.assert_array_equal(session.get()[W], trained[W])
    session.reset()
    assert session.checkpoint() == fresh
    session.reset(seed=3)
    assert session.checkpoint() != fresh
    with pytest.raises(RuntimeFault):
        session.reset(seed=-1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_checkpoints_are_refused(data: st.DataObject) -> None:
    session = load(ARTIFACT, engine="twin")
    session.train_step(*examples(8), learning_rate=0.2)
    good = session.checkpoint()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = data.draw(
        st.sampled_from([good[:at], good + b"\0", good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :], b""])
    )
    with pytest.raises(CheckpointError):
        session.restore(bad)
    assert session.checkpoint() == good


def test_foreign_checkpoints_are_refused(session: Session) -> None:
    other = load(classifier(max_batch=8, features=4, classes=2), engine="twin")
    with pytest.raises(CheckpointError, match="another artifact"):
        session.restore(other.checkpoint())


USES: dict[str, Callable[[Session], object]] = {
    "predict": lambda s: s.predict(X),
    "train_step": lambda s: s.train_step(X, LABELS, learning_rate=0.1),
    "evaluate": lambda s: s.evaluate(X, LABELS),
    "get": lambda s: s.get(),
    "set": lambda s: s.set({B: [0, 0, 0]}),
    "delta": lambda s: s.delta({}),
    "freeze": lambda s: s.freeze([]),
    "reset": lambda s: s.reset(),
    "reset_optimizer": lambda s: s.reset_optimizer(),
    "checkpoint": lambda s: s.checkpoint(),
    "restore": lambda s: s.restore(b""),
}


@pytest.mark.parametrize("use", USES)
def test_a_closed_session_says_so(session: Session, use: str) -> None:
    session.predict(X)
    session.close()
    session.close()
    with pytest.raises(RuntimeFault, match="closed"):
        USES[use](session)
