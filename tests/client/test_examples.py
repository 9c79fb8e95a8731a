"""The local examples: what goes in comes out, within limits, and nothing else goes in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import FakeClock

from evensong.client import ArrayExamples, Batch, ExampleStore
from evensong.client.train import run_epochs
from evensong.mobile_runtime import ExampleError


def store(**options) -> ExampleStore:
    return ExampleStore(None, **options)


def collect(examples, batch_size: int = 7, **options) -> tuple[list[np.ndarray], np.ndarray]:
    batches = list(examples.batches(batch_size, **options))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    inputs = [np.concatenate(parts) for parts in zip(*(batch.inputs for batch in batches), strict=True)]
    return inputs, np.concatenate([batch.target for batch in batches])


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    shape=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from(["f4", "f8", "f2", "i8", "i4", "i1", "u1", "u2", "?"]),
)
@settings(max_examples=50, deadline=None)
def test_what_goes_in_comes_out_in_the_order_of_arrival(count, batch_size, shape, dtype) -> None:
    x = np.random.default_rng(0).integers(0, 2, (count, *shape)).astype(dtype)
    y = np.arange(count)
    with_gaps = store()
    with_gaps.add_many(x[: count // 2], y[: count // 2])
    for one, label in zip(x[count // 2 :], y[count // 2 :], strict=True):
        with_gaps.add(one, label)
    [inputs], target = collect(with_gaps, batch_size)
    assert inputs.dtype.str in ("<f4", "<i4", "|i1", "|u1") and np.array_equal(inputs, x)
    assert target.dtype == np.int32 and np.array_equal(target, y)


def test_the_order_is_that_of_the_generator_and_complete() -> None:
    examples = store()
    examples.add_many(np.arange(100, dtype=np.float32)[:, None], np.arange(100))
    orders = [collect(examples, order=np.random.default_rng(seed))[1] for seed in (1, 1, 2)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    assert np.array_equal(np.sort(orders[2]), np.arange(100))


def test_several_inputs_and_splits_stay_apart() -> None:
    examples = store()
    first, second = np.zeros((5, 2), np.float32), np.arange(5, dtype=np.uint8)[:, None]
    examples.add_many((first, second), np.ones((5, 3), np.float32))
    examples.add_many((first + 1, second), np.zeros((5, 3), np.float32), split="test")
    inputs, target = collect(examples)
    assert np.array_equal(inputs[0], first) and np.array_equal(inputs[1], second) and target.all()
    inputs, target = collect(examples, split="test")
    assert np.array_equal(inputs[0], first + 1) and not target.any()


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=3)), min_size=1, max_size=12), st.booleans())
@settings(max_examples=40, deadline=None)
def test_texts_come_out_as_they_went_in_beside_other_fields(texts, as_objects) -> None:
    pairs = np.array(texts, object if as_objects else None)
    image = np.arange(len(texts) * 4, dtype=np.uint8).reshape(-1, 2, 2)
    examples = store()
    examples.add_many((image, pairs, pairs[:, 0]), np.arange(len(texts)))
    examples.add((image[0], ["one", "two"], "one"), 99)
    (images, both, first), target = collect(examples, 5)
    assert images.dtype == np.uint8 and np.array_equal(images[:-1], image)
    assert both.tolist() == [*pairs.tolist(), ["one", "two"]]
    assert first.tolist() == [*pairs[:, 0].tolist(), "one"] and target[-1] == 99


def test_a_store_of_texts_refuses_numbers_and_what_is_not_unicode() -> None:
    examples = store()
    examples.add("Hello", 1)
    for wrong in (1.5, ["a", "b"], "\ud800"):
        with pytest.raises(ExampleError):
            examples.add(wrong, 0)
    assert examples.count() == 1 and [field.dtype for field in examples.fields()] == ["text", "<i4"]


@pytest.mark.torch
def test_a_session_trains_on_texts_and_pixels_from_a_store() -> None:
    import torch
    from torch import nn

    from evensong.mobile_runtime import compile, load
    from evensong.mobile_runtime.preprocessing import Rescaling, TextVectorization, encode_text

    class Captioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = TextVectorization(hash_bins=16, mode="multi_hot")
            self.pixels = Rescaling(1 / 255)
            self.linear = nn.Linear(16 + 4, 2)

        def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.cat([self.words(text), self.pixels(image).flatten(1)], dim=1))

    torch.manual_seed(0)
    example = [encode_text([""], 16), np.zeros((1, 1, 2, 2), np.uint8)]
    session = load(compile(Captioned(), example, batch_size=8))
    examples = store()
    for number in range(40):
        examples.add(
            (f"a {('good', 'bad')[number % 2]} day {number}", np.full((1, 2, 2), number, np.uint8)), number % 2
        )
    assert [field.dtype for field in examples.fields()] == ["text", "|u1", "<i4"]
    order = np.random.default_rng(0)
    run_epochs(
        session, examples, epochs=30, batch_size=8, learning_rate=0.5, order=order, most_steps=1000,
        between_steps=lambda: None, on_step=lambda *step: None,
    )  # fmt: skip
    image = np.full((2, 1, 2, 2), 20, np.uint8)
    assert session.predict(["a good day", "a bad day"], image).argmax(axis=1).tolist() == [0, 1]


def test_reading_ahead_in_blocks_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evensong.client.examples._READ_AHEAD_BYTES", 100)
    examples = store()
    x = np.random.default_rng(0).normal(size=(1200, 3)).astype(np.float32)
    examples.add_many(x, np.arange(1200))
    [inputs], target = collect(examples, 32, order=np.random.default_rng(3))
    assert np.array_equal(inputs, x[target])


def test_row_limit_keeps_the_newest_of_each_split() -> None:
    examples = store(max_rows=10)
    for label in range(25):
        examples.add(np.zeros(1, np.float32), label)
    examples.add(np.zeros(1, np.float32), 99, split="test")
    assert (examples.count(), examples.count("test")) == (10, 1)
    assert collect(examples)[1].tolist() == list(range(15, 25))


def test_age_limit_forgets_by_the_clock() -> None:
    clock = FakeClock()
    examples = store(max_age_s=100, clock=clock)
    examples.add(np.zeros(1, np.float32), 1)
    clock.now += 60_000
    examples.add(np.zeros(1, np.float32), 2)
    assert examples.count() == 2
    clock.now += 60_000
    assert examples.count() == 1 and collect(examples)[1].tolist() == [2]
    clock.now += 60_000
    assert examples.count() == 0 and list(examples.batches(4)) == []


WRONG = [
    (np.zeros((2, 4), np.float32), np.zeros(2, np.int64), "wrong shape"),
    (np.zeros((2, 3), np.complex64), np.zeros(2, np.int64), "must be numbers"),
    (np.array([["a", "b", "c"]]), np.zeros(1, np.int64), "wrong dtype; expected float32; got text"),
    (np.zeros((2, 3), np.float32), np.array(["spam", "ham"]), "target must be numbers"),
    (np.zeros((2, 3), np.float32), np.zeros(3, np.int64), "same number"),
    (np.zeros((2, 3), np.float32), np.zeros(2, np.float32), "wrong dtype"),
    (np.full((2, 3), np.nan, np.float32), np.zeros(2, np.int64), "NaN or infinite"),
    (np.full((2, 3), 1e300), np.zeros(2, np.int64), "NaN or infinite"),
    (np.zeros((2, 3), np.float32), np.full(2, 1 << 40), "out of range"),
    ((np.zeros((2, 3), np.float32),) * 2, np.zeros(2, np.int64), "wrong number of inputs"),
    (np.float32(1), np.int64(1), "same number"),
]


@pytest.mark.parametrize(("x", "y", "message"), WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(x, y, message: str) -> None:
    examples = store()
    examples.add_many(np.ones((2, 3), np.float32), np.array([1, 2]))
    with pytest.raises(ExampleError, match=message):
        examples.add_many(x, y)
    assert examples.count() == 2


def test_a_refused_first_example_decides_nothing() -> None:
    examples = store()
    with pytest.raises(ExampleError):
        examples.add(np.array([np.nan], np.float32), 1)
    examples.add(np.zeros((2, 2), np.uint8), 1.5)
    assert [field.dtype for field in examples.fields()] == ["|u1", "<f4"]
    with pytest.raises(ExampleError, match="split"):
        examples.add(np.zeros((2, 2), np.uint8), 1.5, split="validation")  # type: ignore[arg-type]


def test_integers_fit_a_store_of_floats_but_not_the_other_way() -> None:
    examples = store()
    examples.add(np.array([0.5]), 0)
    examples.add(np.array([3]), 1)
    assert collect(examples)[0][0].tolist() == [[0.5], [3.0]]


def test_another_process_may_add_while_the_device_has_the_store_open(tmp_path: Path) -> None:
    path = tmp_path / "examples.sqlite"
    device, collector = ExampleStore(path), ExampleStore(path)
    iterating = device.batches(1)
    device.add(np.zeros(2), 0)
    next(iterating)
    collector.add(np.ones(2), 1)
    assert device.count() == collector.count() == 2
    device.clear()
    assert collector.count() == 0 and collector.fields() == ()


def test_what_is_forgotten_is_gone_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "examples.sqlite"
    examples = ExampleStore(path)
    secret = np.frombuffer(b"a very private sentence!" * 4, np.uint8)
    examples.add(secret, 0)
    examples.clear()
    examples.close()
    assert b"private" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_arrays_in_memory_behave_alike() -> None:
    x, y = np.arange(20, dtype=np.float32)[:, None], np.arange(20)
    arrays, database = ArrayExamples(Batch((x,), y)), store()
    database.add_many(x, y)
    for seed in range(3):
        pairs = [collect(source, 6, order=np.random.default_rng(seed)) for source in (arrays, database)]
        assert np.array_equal(pairs[0][0][0], pairs[1][0][0]) and np.array_equal(pairs[0][1], pairs[1][1])
    assert (arrays.count(), arrays.count("test"), list(arrays.batches(3, split="test"))) == (20, 0, [])


def test_processes_that_open_a_new_store_at_once_do_not_trip_over_each_other(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: ExampleStore(tmp_path / "examples.sqlite"), range(8)))
        list(pool.map(lambda pair: pair[1].add(np.zeros(1), pair[0]), enumerate(stores)))
    assert stores[0].count() == 8
