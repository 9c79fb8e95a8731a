"""Text, categories, numbers and images in front of a model, against plain references, on the twin and every engine."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one_op import Given, MachineFactory, Wanted, check_everywhere, instruction_sets, native_machine, run_one

from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.philox import philox
from evensong.mobile_runtime.twin import TwinMachine
from evensong.wire.program import Interpolation, Split

MACHINES: list[MachineFactory] = [TwinMachine, *map(native_machine, instruction_sets())]

# ------------------------------------------------------------------------------------------------- text


def fnv1a(token: bytes, salt: int = 0) -> int:
    """By the definition of Fowler, Noll and Vo; 0 means that there is no token, so it becomes 1."""
    state = 2166136261 ^ (salt & 0xFFFFFFFF)
    for byte in token:
        state = (state ^ byte) * 16777619 % 2**32
    return state or 1


def tokens_of(text: str, *, lower: bool, strip: bool, split: int, ngrams: int = 1) -> list[str]:
    """What docs/artifact.md says of Tokens, on code points: ASCII letters become lower case, ASCII punctuation goes."""
    text = text.partition("\0")[0]
    if lower:
        text = re.sub("[A-Z]", lambda found: found[0].lower(), text)
    if strip:
        text = re.sub(r"""[!-/:-@\[-`{-~]""", "", text)
    if split == Split.NONE:
        words = [text] if text else []
    elif split == Split.WHITESPACE:
        words = [word for word in re.split("[ \t\n\v\f\r]+", text) if word]
    else:
        words = list(text)
    return [" ".join(words[i - k : i]) for i in range(1, len(words) + 1) for k in range(1, min(ngrams, i) + 1)]


def padded(texts: list[str], size: int) -> np.ndarray:
    rows = [text.encode()[:size].ljust(size, b"\0") for text in texts]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(texts), size)


#: Mostly ASCII, so that there are words; and every other code point but surrogates.
texts = st.text(
    st.one_of(
        st.sampled_from("abcABC zZ\t\n.,'-_@[`{~09éßЖ中\u00a0\u2019\u3000😀\0"),
        st.characters(exclude_categories=["Cs"]),
    )
)


@settings(max_examples=150, deadline=None)
@given(
    some=st.lists(texts, min_size=1, max_size=5),
    width=st.integers(1, 30),
    lower=st.booleans(),
    strip=st.booleans(),
    split=st.sampled_from(Split),
    ngrams=st.integers(1, 4),
    salt=st.sampled_from([0, 7, -1]),
)
@example(["Don't  STOP -- now", "", "a"], 9, True, True, Split.WHITESPACE, 3, 0)
@example(["é😀!"], 3, True, True, Split.CHARACTERS, 2, 5)
def test_tokens(some: list[str], width: int, lower: bool, strip: bool, split: Split, ngrams: int, salt: int) -> None:
    size = max(1, *(len(text.encode()) for text in some))
    expected = np.zeros((len(some), width), np.uint32)
    for row, text in zip(expected, some, strict=True):
        tokens = tokens_of(text, lower=lower, strip=strip, split=split, ngrams=ngrams)[:width]
        row[: len(tokens)] = [fnv1a(token.encode(), salt) for token in tokens]
    for machine in MACHINES:
        (hashes,) = run_one(
            "TOKENIZE",
            [padded(some, size)],
            [Wanted(expected.shape, np.int32)],
            machine=machine,
            lower=lower,
            strip=strip,
            split=split,
            ngrams=ngrams,
            salt=salt,
        )
        np.testing.assert_array_equal(hashes.view(np.uint32), expected)


def test_the_hashes_are_those_that_the_field_publishes() -> None:
    text = padded(["a foobar"], 8)
    (hashes,) = run_one("TOKENIZE", [text], [Wanted((1, 3), np.int32)], split=Split.WHITESPACE, ngrams=1)
    assert hashes.view(np.uint32).tolist() == [[0xE40C292C, 0xBF9CF968, 0]]
    # fmix32 of MurmurHash3; with 2^31 - 1 bins a bin is nearly half of the hash
    numbers, bins = np.array([0, 1, 2], np.int32), 2**31 - 1
    (found,) = run_one("LOOKUP", [numbers], [Wanted((3,), np.int32)], bins=bins)
    assert found.tolist() == [h * bins >> 32 for h in (0, 0x514E28B7, 0x30F4C306)]


@given(st.binary(min_size=1, max_size=40), st.sampled_from(Split))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_utf8_are_tokens_too(data: bytes, split: Split) -> None:
    text = np.frombuffer(data, np.uint8)[None]
    results = [
        run_one("TOKENIZE", [text], [Wanted((1, 9), np.int32)], machine=m, lower=1, strip=1, split=split, ngrams=2)[0]
        for m in MACHINES
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


# ------------------------------------------------------------------------------------------------- categories


@settings(max_examples=60, deadline=None)
@given(
    keys=st.dictionaries(st.integers(-(2**31), 2**31 - 1), st.integers(0, 1000), min_size=1, max_size=20),
    others=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20),
    bins=st.sampled_from([1, 3, 1000]),
)
def test_lookup_finds_every_key_and_nothing_else(keys: dict[int, int], others: list[int], bins: int) -> None:
    table = np.array(sorted(keys.items()), np.int32)
    x = np.array([*keys, *others], np.int32)
    (found,) = run_one("LOOKUP", [x, table], [Wanted(x.shape, np.int32)], first=2000, bins=bins, salt=9)
    for value, id_ in zip(x.tolist(), found.tolist(), strict=True):
        assert id_ == keys[value] if value in keys else 2000 <= id_ < 2000 + bins


def test_hashing_spreads_evenly() -> None:
    x = np.arange(100_000, dtype=np.int32)
    (found,) = run_one("LOOKUP", [x], [Wanted(x.shape, np.int32)], bins=10)
    counts = np.bincount(found)
    assert len(counts) == 10 and abs(counts - 10_000).max() < 400  # four standard deviations


@settings(max_examples=40, deadline=None)
@given(data=st.data(), right=st.booleans())
def test_bucketize(data: st.DataObject, right: bool) -> None:
    numbers = st.floats(-5, 5, width=32)
    edges = np.array(sorted(data.draw(st.lists(numbers, min_size=1, max_size=12))), np.float32)
    x = np.array([*edges, *data.draw(st.lists(numbers))], np.float32)
    expected = np.searchsorted(edges, x, side="right" if right else "left")
    check_everywhere("BUCKETIZE", [x, edges], [Wanted(x.shape, np.int32)], [expected], right=right)


def test_one_hot_counts_and_skips_what_is_below_the_first_id() -> None:
    ids = np.array([[3, 1, 3, 0], [0, 0, -7, 0], [2, 3, 1, 1]], np.int32)
    counts = np.array([[1, 0, 2], [0, 0, 0], [2, 1, 1]], np.float32)
    check_everywhere("ONE_HOT", [ids], [(3, 3)], [counts], first=1, count=1)
    check_everywhere("ONE_HOT", [ids], [(3, 3)], [counts > 0], first=1, count=0)


@pytest.mark.parametrize("bad", [4, 2**31 - 1])
def test_an_id_past_the_last_column_is_refused(bad: int) -> None:
    for machine in MACHINES:
        with pytest.raises(ExampleError):
            run_one("ONE_HOT", [np.array([[1, bad]], np.int32)], [(1, 3)], machine=machine, first=1)


def test_cast_is_exact_for_bytes_and_rounds_integers() -> None:
    check_everywhere("CAST", [np.arange(256, dtype=np.uint8)], [(256,)], [np.arange(256)])
    x = np.array([-(2**31), -1, 0, 2**24 + 1, 2**24 + 3, 2**31 - 1], np.int32)
    check_everywhere("CAST", [x], [x.shape], [x.astype(np.float32)])


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.torch
@settings(max_examples=60, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 40)] * 4), mode=st.sampled_from(Interpolation), channels=st.integers(1, 4))
@example((14, 14, 20, 20), Interpolation.NEAREST, 1)
def test_resize_and_its_gradient_are_torch_s(sizes: tuple[int, ...], mode: Interpolation, channels: int) -> None:
    import torch

    height, width, rows, columns = sizes
    rng = np.random.default_rng(height)
    x, dy = rng.normal(size=(2, height, width, channels)), rng.normal(size=(2, rows, columns, channels))
    x, dy = x.astype(np.float32), dy.astype(np.float32)
    name = ("nearest", "nearest-exact", "bilinear")[mode]
    image = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    result = torch.nn.functional.interpolate(
        image, (rows, columns), mode=name, **({"align_corners": False} if name == "bilinear" else {})
    )
    result.backward(torch.from_numpy(dy).permute(0, 3, 1, 2))
    y, dx = (t.detach().permute(0, 2, 3, 1).numpy() for t in (result, image.grad))
    exact = mode != Interpolation.BILINEAR
    check_everywhere("RESIZE2D", [x], [y.shape], [y], mode=mode, atol=0 if exact else 1e-6 * height * width)
    check_everywhere("RESIZE2D_GRAD", [dy], [x.shape], [dx], mode=mode, atol=1e-5 * max(1, abs(dx).max()) * 40)


def test_resizing_bytes_is_resizing_what_they_cast_to() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    for mode in Interpolation:
        (expected,) = run_one("RESIZE2D", [x.astype(np.float32)], [(2, 8, 4, 3)], mode=mode)
        check_everywhere("RESIZE2D", [x], [(2, 8, 4, 3)], [expected], mode=mode)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.uint8]), flips=st.tuples(st.booleans(), st.booleans()))
def test_crops_lie_where_philox_says(data: st.DataObject, dtype: type[np.generic], flips: tuple[bool, bool]) -> None:
    count, image, pads = 3, (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))), (2, 1)
    size = tuple(data.draw(st.integers(1, side + 2 * pad)) for side, pad in zip(image, pads, strict=True))
    seed, step, stream = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(1, 2**40)), 5
    x = np.random.default_rng(1).integers(1, 200, (count, *image, 2)).astype(dtype)
    wide = np.pad(x, ((0, 0), (2, 2), (1, 1), (0, 0)))
    expected = np.empty((count, *size, 2), dtype)
    for n in range(count):
        counter = np.array([[n, stream, step & 0xFFFFFFFF, step >> 32]], np.uint64)
        words = [int(word) for word in philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]]
        top, left = (words[i] * (wide.shape[1 + i] - size[i] + 1) >> 32 for i in range(2))
        window = wide[n, top : top + size[0], left : left + size[1]]
        window = window[::-1] if flips[0] and words[2] >> 31 else window
        expected[n] = window[:, ::-1] if flips[1] and words[3] >> 31 else window
    for machine in MACHINES:
        (found,) = run_one(
            "CROP2D", [x], [Wanted(expected.shape, dtype)], machine=machine, step=step, seed=seed, stream=stream,
            random=1, pad_h=2, pad_w=1, flip_v=flips[0], flip_h=flips[1],
        )  # fmt: skip
        np.testing.assert_array_equal(found, expected)


def test_without_randomness_the_middle_is_taken() -> None:
    x = np.arange(2 * 5 * 4).reshape(2, 5, 4, 1).astype(np.uint8)
    check_everywhere("CROP2D", [x], [Wanted((2, 2, 2, 1), np.uint8)], [x[:, 1:3, 1:3]], flip_h=1, flip_v=1)
    wide = np.pad(x, ((0, 0), (1, 0), (2, 2), (0, 0)))  # one more row of padding would go below
    check_everywhere("CROP2D", [x], [Wanted((2, 6, 8, 1), np.uint8)], [wide], pad_h=1, pad_w=2)


def test_only_live_images_draw_and_each_draws_the_same_in_any_batch() -> None:
    x = np.random.default_rng(3).normal(size=(3, 6, 6, 1)).astype(np.float32)
    options = {"max_batch": 8, "random": 1, "flip_h": 1, "seed": 4}
    (three,) = run_one("CROP2D", [Given(x, True)], [Wanted((3, 4, 4, 1), batched=True)], batch=3, **options)
    (two,) = run_one("CROP2D", [Given(x[:2], True)], [Wanted((2, 4, 4, 1), batched=True)], batch=2, **options)
    np.testing.assert_array_equal(two, three[:2])


# ------------------------------------------------------------------------------------------------- int8


def test_a_table_of_bytes_for_each_channel() -> None:
    rng = np.random.default_rng(0)
    x, table = rng.integers(0, 256, (7, 3)).astype(np.uint8), rng.integers(-128, 128, (3, 256)).astype(np.int8)
    expected = np.stack([table[c][x[:, c]] for c in range(3)], axis=1)
    check_everywhere("QLUT_U8", [x, table], [Wanted((7, 3), np.int8)], [expected])
