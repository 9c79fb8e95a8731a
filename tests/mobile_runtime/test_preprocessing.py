"""Layers between raw data and a model: what they do in torch is what every engine does, integers to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from compile_harness import ENGINES, assert_trains_like_torch, classified, normal
from test_kernels_input import texts, tokens_of

from evensong.mobile_runtime import ExampleError, PostTrainingInt8, QuantizationAwareTraining, compile, load, to_onnx
from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.preprocessing import (
    CategoryEncoding,
    CenterCrop,
    Discretization,
    Hashing,
    IntegerLookup,
    Normalization,
    RandomCrop,
    RandomFlip,
    Rescaling,
    Resizing,
    StringLookup,
    TextVectorization,
    encode_text,
)
from evensong.mobile_runtime.text import words
from evensong.wire.program import DType, Split

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 3, 7, 6)).astype(np.uint8)
TABLE = RNG.normal(size=(5, 4)).astype(np.float32)
IDS = RNG.integers(0, 9, (5, 4)).astype(np.int64)
SENTENCES = ["Free entry, WIN a prize!", "see you at nine", "", "you win", "naïve café 中文 😀"]
TEXTS = encode_text(SENTENCES, 32)


class Floats(nn.Module):
    """Ids as numbers, so that a model may end with them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().flatten(1)


def adapted(layer: Any, data: Any) -> Any:
    layer.adapt(data)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], np.ndarray]] = {
    "rescaling bytes": (lambda: Rescaling(1 / 255), IMAGES),
    "rescaling with an offset": (lambda: Rescaling(2 / 255, -1), IMAGES),
    "normalization of columns": (lambda: adapted(Normalization(), TABLE), TABLE),
    "normalization of channels": (lambda: adapted(Normalization(1), IMAGES), IMAGES),
    "normalization of everything": (lambda: Normalization(None, 100.0, 25.0), IMAGES),
    "discretization": (lambda: adapted(Discretization(bins=3), TABLE), TABLE),
    "discretization by boundaries": (lambda: Discretization([-1.0, float(TABLE[0, 0]), 1.0]), TABLE),
    "one-hot": (lambda: CategoryEncoding(9), IDS),
    "multi-hot": (lambda: CategoryEncoding(9, "multi_hot"), IDS),
    "count": (lambda: CategoryEncoding(9, "count"), IDS),
    "hashed integers": (lambda: Hashing(7, salt=3), IDS * 1000003 - 5000000),
    "hashed texts": (lambda: nn.Sequential(Hashing(1000), CategoryEncoding(1000)), TEXTS),
    "integers": (lambda: IntegerLookup([5, 3, -2], unknown=2), IDS),
    "learned integers": (lambda: adapted(IntegerLookup(max_ids=4), IDS), IDS),
    "strings": (lambda: nn.Sequential(StringLookup(["you win", "no"]), CategoryEncoding(3)), TEXTS),
    "tokens": (lambda: adapted(TextVectorization(12, length=6, ngrams=2), SENTENCES), TEXTS),
    "hashed tokens": (lambda: TextVectorization(hash_bins=50, unknown=3, standardize=None), encode_text(SENTENCES, 9)),
    "characters": (lambda: adapted(TextVectorization(split="character"), SENTENCES), encode_text(SENTENCES, 24)),
    "bag of words": (lambda: adapted(TextVectorization(mode="count"), SENTENCES), TEXTS),
    "weighted words": (lambda: adapted(TextVectorization(9, mode="tf_idf", unknown=2), SENTENCES), TEXTS),
    "bilinear": (lambda: Resizing(5, 9), IMAGES),
    "nearest": (lambda: Resizing(3, 11, "nearest"), IMAGES),
    "nearest-exact": (lambda: Resizing(4, 4, "nearest-exact"), IMAGES),
    "center crop": (lambda: CenterCrop(4, 5), IMAGES),
    "random crop in evaluation": (lambda: RandomCrop(8, 5, padding=1), IMAGES),
    "random flip in evaluation": (lambda: RandomFlip("both"), IMAGES),
    "bytes by themselves": (lambda: nn.Flatten(), IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, x = LAYERS[name]
    model = nn.Sequential(make(), Floats()).eval()
    expected = model(torch.from_numpy(x)).numpy()
    exact = name not in ("bilinear", "weighted words") and "norm" not in name and "rescaling" not in name
    compiled = compile(model, x[:1], predict_batch=4)
    for engine in ENGINES:
        found = load(compiled, engine=engine).predict(x.astype(np.int32) if x.dtype == np.int64 else x)
        tolerance = 0.0 if exact else 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=engine)


# ------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("split", Split)
@settings(max_examples=100, deadline=None)
@given(text=texts, lower=st.booleans(), strip=st.booleans(), ngrams=st.integers(1, 4))
def test_words_are_those_of_the_rules(split: Split, text: str, lower: bool, strip: bool, ngrams: int) -> None:
    found = words(text.encode(), lower=lower, strip=strip, split=split, ngrams=ngrams)
    expected = tokens_of(text, lower=lower, strip=strip, split=split, ngrams=ngrams)
    assert [word.decode() for word in found] == expected


WORDS = adapted(TextVectorization(30, mode="count", ngrams=2, unknown=2), SENTENCES)
COMPILED = compile(WORDS, encode_text([""], 48), predict_batch=3)
SESSIONS = [load(COMPILED, engine=engine) for engine in ENGINES]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(texts, st.sampled_from(SENTENCES)), min_size=1, max_size=7))
def test_any_text_gives_the_same_bag_in_torch_and_on_every_engine(some: list[str]) -> None:
    expected = WORDS(torch.from_numpy(encode_text(some, 48))).numpy()
    for session in SESSIONS:
        np.testing.assert_array_equal(session.predict(some), expected)


@settings(max_examples=200, deadline=None)
@given(text=texts, size=st.integers(1, 12))
def test_a_text_that_is_too_long_ends_with_a_whole_character(text: str, size: int) -> None:
    row = encode_text([text], size)
    assert row.shape == (1, size) and row.dtype == np.uint8
    kept = row.tobytes().decode().rstrip("\0")
    assert text.startswith(kept)
    following = text[len(kept) : len(kept) + 1].encode()
    assert not following.strip(b"\0") or len(kept.encode()) + len(following) > size


def test_what_is_no_text_is_refused() -> None:
    for wrong in ([b"bytes"], [1, 2], ["a", None], ["\ud800"]):
        with pytest.raises(ExampleError):
            encode_text(wrong, 8)


def test_the_session_takes_strings_for_bytes_and_nowhere_else() -> None:
    session = SESSIONS[0]
    expected = session.predict(encode_text(SENTENCES, 48))
    for same in (SENTENCES, np.array(SENTENCES), np.array(SENTENCES, object)):
        np.testing.assert_array_equal(session.predict(same), expected)
    assert COMPILED.artifact.manifest["inputs"] == [{"name": "texts", "dtype": "text", "shape": [48]}]
    numbers = load(compile(nn.Linear(2, 2), TABLE[:1, :2]), engine="twin")
    with pytest.raises(ExampleError, match="wrong dtype"):
        numbers.predict([["a", "b"]])
    with pytest.raises(ExampleError, match="wrong shape"):
        session.predict([["a", "b"]])


def test_the_vocabulary_goes_from_the_most_frequent_to_the_least() -> None:
    layer = adapted(TextVectorization(5), ["b a c", "B c?", "c; d"])
    assert layer.vocabulary == ["c", "b", "a"]  # a and d are equally rare: five ids less two
    assert layer.ids == 5
    ids = layer(torch.from_numpy(encode_text(["C d zz b a"], 12)))
    assert ids.tolist() == [[2, 1, 1, 3, 4, 0]]
    assert adapted(IntegerLookup(max_ids=3), [7, 7, -1, 4, 4, 9]).vocabulary == [4, 7]
    assert adapted(StringLookup(), ["x y", "x y", "Z"]).vocabulary == ["x y", "Z"]


def test_weights_of_words_are_those_of_tf_idf() -> None:
    layer = adapted(TextVectorization(mode="tf_idf"), ["a b", "a a", "c"])
    row = layer(torch.from_numpy(encode_text(["a a b zz"], 16)))[0]
    weight = {word: np.log(1 + 3 / (1 + count)) for word, count in {"a": 2, "b": 1, "c": 1}.items()}
    expected = [np.mean(list(weight.values())), 2 * weight["a"], weight["b"], 0]
    np.testing.assert_allclose(row.numpy(), expected, rtol=1e-6)


def test_what_was_learned_travels_in_the_state_dict() -> None:
    def fresh() -> nn.ModuleList:
        layers = [
            TextVectorization(mode="tf_idf"),
            StringLookup(),
            IntegerLookup(),
            Normalization(1),
            Discretization(bins=4),
        ]
        return nn.ModuleList(layers)  # fmt: skip

    learned, empty = fresh(), fresh()
    data = [SENTENCES, SENTENCES, IDS, IMAGES, TABLE]
    for layer, some in zip(learned, data, strict=True):
        layer.adapt(some)
    assert all(isinstance(value, torch.Tensor) for value in learned.state_dict().values())
    empty.load_state_dict(learned.state_dict())
    inputs = [TEXTS, TEXTS, IDS, IMAGES, TABLE]
    for before, after, x in zip(learned, empty, inputs, strict=True):
        assert torch.equal(before(torch.from_numpy(x)), after(torch.from_numpy(x)))


def test_colliding_words_get_another_salt() -> None:
    """ "costarring" and "liquid" have the same 32-bit FNV-1a hash."""
    layer = StringLookup(["costarring", "liquid"])
    assert layer.known.salt != 0
    assert layer(torch.from_numpy(encode_text(["liquid", "costarring", "other"], 12))).tolist() == [2, 1, 0]


# ------------------------------------------------------------------------------------------------- numbers


def test_learned_numbers() -> None:
    layer = adapted(Normalization(1), IMAGES)
    y = layer(torch.from_numpy(IMAGES))
    np.testing.assert_allclose(y.mean(dim=(0, 2, 3)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(y.var(dim=(0, 2, 3), correction=0), np.ones(3), atol=1e-5)
    constant = adapted(Normalization(), np.full((4, 2), 7.0))
    assert torch.equal(constant(torch.full((1, 2), 7.0)), torch.zeros(1, 2))
    buckets = adapted(Discretization(bins=4), np.arange(1000))(torch.arange(1000.0))
    assert torch.bincount(buckets).tolist() == [250, 250, 250, 250]


WRONG: dict[str, Callable[[], Any]] = {
    "not adapted": lambda: StringLookup()(torch.zeros(1, 4, dtype=torch.uint8)),
    "no vocabulary": lambda: TextVectorization()(torch.zeros(1, 4, dtype=torch.uint8)),
    "no statistics": lambda: Normalization()(torch.zeros(1, 4)),
    "no boundaries": lambda: Discretization(bins=3)(torch.zeros(1, 4)),
    "mean without variance": lambda: Normalization(mean=[1.0]),
    "the batch axis": lambda: Normalization(0),
    "boundaries and bins": lambda: Discretization([1.0], bins=3),
    "unknown mode": lambda: CategoryEncoding(3, "both"),  # type: ignore[arg-type]
    "the same word twice": lambda: StringLookup(["a", "a"]),
    "a large integer": lambda: IntegerLookup([1 << 31]),
    "no room": lambda: TextVectorization(2),
    "too many n-grams": lambda: TextVectorization(ngrams=5),
    "a hash with a vocabulary": lambda: TextVectorization(hash_bins=3, vocabulary=["a"]),
    "nothing to learn": lambda: TextVectorization().adapt(["", " !"]),
    "adapting a hash": lambda: TextVectorization(hash_bins=3).adapt(["a"]),
    "a crop larger than the image": lambda: CenterCrop(9, 9)(torch.zeros(1, 1, 8, 10)),
    "unknown interpolation": lambda: Resizing(2, 2, "bicubic"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    with pytest.raises(CompileError):
        WRONG[name]()


# ------------------------------------------------------------------------------------------------- training


class Head(nn.Module):
    """Something trainable behind (and, with ``first``, before) the layer at test."""

    def __init__(self, layer: nn.Module, features: int, first: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.first = layer, first or nn.Identity()
        self.linear = nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layer(self.first(x)).flatten(1))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vectorize = adapted(TextVectorization(10, length=5), SENTENCES)
        self.embed = nn.EmbeddingBag(self.vectorize.ids, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, texts: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embed(self.vectorize(texts)))


TRAINED: dict[str, tuple[Callable[[], nn.Module], np.ndarray]] = {
    "bag of words": (lambda: Head(adapted(TextVectorization(9, mode="multi_hot"), SENTENCES), 8), TEXTS),
    "embedded words": (Embedded, TEXTS),
    "an image of bytes": (
        lambda: Head(nn.Sequential(Resizing(6, 6), Rescaling(1 / 255), nn.Conv2d(3, 4, 3), nn.ReLU()), 64), IMAGES),
    "bilinear behind a layer": (
        lambda: Head(nn.Upsample(size=(9, 5), mode="bilinear"), 90, nn.Conv2d(3, 2, 3)), normal((5, 3, 7, 6))),
    "nearest behind a layer": (
        lambda: Head(nn.Upsample(scale_factor=2), 160, nn.Conv2d(3, 2, 3)), normal((5, 3, 7, 6))),
    "buckets": (lambda: Head(nn.Sequential(Discretization([-0.5, 0.5]), CategoryEncoding(3)), 12), TABLE),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str) -> None:
    torch.manual_seed(3)
    make, x = TRAINED[name]
    assert_trains_like_torch(make(), x, classified(3, len(x)), steps=3)


def test_several_kinds_of_columns_in_one_model() -> None:
    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.city = StringLookup(["Rome", "Oslo"])
            self.place = nn.Embedding(3, 4)
            self.age = adapted(Normalization(), np.array([[20.0], [40.0], [60.0]]))
            self.visits = CategoryEncoding(4)
            self.linear = nn.Linear(9, 2)

        def forward(self, city: torch.Tensor, age: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.cat([self.place(self.city(city)), self.age(age), self.visits(visits)], dim=1))

    torch.manual_seed(0)
    model = Tabular()
    cities, ages, visits = ["Oslo", "Paris", "Rome"], np.array([[30], [40], [50.5]]), np.array([0, 3, 1])
    compiled = compile(model, [encode_text([""], 16), np.zeros((1, 1), np.float32), np.zeros(1, np.int64)])
    inputs = (torch.from_numpy(encode_text(cities, 16)), torch.tensor(ages).float(), torch.from_numpy(visits))
    expected = model(*inputs).detach().numpy()
    for engine in ENGINES:
        session = load(compiled, engine=engine)
        np.testing.assert_allclose(session.predict(cities, ages, visits), expected, atol=1e-6)
        assert session.train_step((cities, ages, visits), [0, 1, 1], learning_rate=0.1).examples == 3


# ------------------------------------------------------------------------------------------------- random images


def augmented() -> nn.Module:
    torch.manual_seed(1)
    layers = [RandomFlip("both"), RandomCrop(6, 6, padding=1), Rescaling(1 / 255), nn.Flatten(), nn.Linear(108, 3)]
    return nn.Sequential(*layers)


def test_augmentation_repeats_with_the_seed_on_every_engine_and_not_in_evaluation() -> None:
    compiled = compile(augmented(), IMAGES[:1])
    y = classified(3, len(IMAGES))

    def losses(engine: str, seed: int) -> list[float]:
        session = load(compiled, engine=engine, seed=seed)
        before = session.evaluate(IMAGES, y).loss
        assert session.evaluate(IMAGES, y).loss == before
        return [session.train_step(IMAGES, y, learning_rate=0.0).loss for _ in range(4)]

    first = losses("twin", 5)
    assert len(set(first)) == 4
    assert losses("twin", 6) != first
    for engine in ENGINES:
        assert losses(engine, 5) == pytest.approx(first, rel=1e-6)


def test_random_layers_in_torch_give_windows_of_the_image() -> None:
    torch.manual_seed(0)
    x = torch.arange(1, 43, dtype=torch.uint8).reshape(1, 1, 6, 7).expand(200, 1, 6, 7)
    flipped = RandomFlip("horizontal")(x)
    mirrored = [bool(torch.equal(image, x[0].flip(-1))) for image in flipped]
    assert 60 < sum(mirrored) < 140
    assert all(m or torch.equal(image, x[0]) for m, image in zip(mirrored, flipped, strict=True))
    crops = RandomCrop(4, 3)(x)
    corners = {int(crop[0, 0, 0]) for crop in crops}
    assert corners == {1 + row * 7 + column for row in range(3) for column in range(5)}
    wide = F.pad(x[0, 0], (1, 1, 1, 1))
    windows = {wide[r : r + 6, c : c + 7].numpy().tobytes() for r in range(3) for c in range(3)}
    assert {crop.numpy().tobytes() for crop in RandomCrop(6, 7, padding=1)(x)} == windows


def test_a_random_crop_behind_something_trainable_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), RandomFlip(), nn.Flatten(), nn.Linear(40, 3))
    with pytest.raises(CompileError, match="before the first trainable"):
        compile(model, normal((1, 3, 7, 6)))
    frozen = compile(model, normal((1, 3, 7, 6)), trainable=["3.*"])
    assert frozen.artifact.program("train")


def test_integers_are_not_computed_with_by_accident() -> None:
    class Sum(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (ids + 1).float()

    with pytest.raises(CompileError, match="arithmetic on integers"):
        compile(Sum(), IDS[:1])


# ------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_moved_before_they_are_floats() -> None:
    model = nn.Sequential(Rescaling(1 / 255), Resizing(6, 6), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    program = compile(model, IMAGES[:1]).artifact.program("predict")
    first = [(op.name, program.tensors[op.inputs[0]].dtype) for op in program.ops[:3]]
    assert first == [("TRANSPOSE", DType.U8), ("CAST", DType.U8), ("SCALE", DType.F32)]
    model = nn.Sequential(Resizing(6, 6), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    program = compile(model, IMAGES[:1]).artifact.program("predict")
    assert [op.name for op in program.ops[:2]] == ["TRANSPOSE", "RESIZE2D"]
    assert program.tensors[program.ops[1].inputs[0]].dtype == DType.U8


class Bytes(nn.Module):
    """An int8 body on an image of bytes, and a float32 head."""

    def __init__(self, *before: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*before, nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


BEFORE: dict[str, tuple[nn.Module, ...]] = {
    "pixels": (Rescaling(1 / 255),),
    "channels": (Rescaling(1 / 127.5, -1), Normalization(1, [0.1, -0.2, 0.3], [0.2, 0.3, 0.4])),
    "activation": (Rescaling(1 / 64, -2), nn.ReLU6()),
    "augmented": (RandomFlip(), RandomCrop(5, 5, padding=1), Rescaling(1 / 255)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_an_int8_body_takes_bytes_through_an_exact_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Bytes(*BEFORE[name])
    examples = RNG.integers(0, 256, (64, 3, 7, 6)).astype(np.uint8)

    def make() -> Any:
        return compile(model, examples[:1], trainable=["head.*"], quantize=PostTrainingInt8(examples), predict_batch=64)

    folded = make()
    for program in folded.artifact.programs:
        names = [op.name for op in program.ops]
        assert "QLUT_U8" in names and "CAST" not in names and "QUANTIZE" not in names
    train = folded.artifact.program("train")
    assert ("CROP2D" in [op.name for op in train.ops]) == (name == "augmented")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["evensong.mobile_runtime.compiler.compile"], "fold_byte_tables", lambda graph: None)
        unfolded = make()
    assert "CAST" in [op.name for op in unfolded.artifact.program("predict").ops]
    expected = load(unfolded, engine="twin").predict(examples)
    for engine in ENGINES:
        np.testing.assert_array_equal(load(folded, engine=engine).predict(examples), expected)
    np.testing.assert_allclose(expected, model.eval()(torch.from_numpy(examples)).detach().numpy(), atol=0.1)


def test_every_program_of_an_augmented_int8_body_has_the_same_integers() -> None:
    """Ranges do not depend on what was cut at random: the constants are those of the other programs, stored once."""
    examples = RNG.integers(0, 256, (64, 3, 7, 6)).astype(np.uint8)
    compiled = compile(
        Bytes(*BEFORE["augmented"]), examples[:1], trainable=["head.*"], quantize=PostTrainingInt8(examples)
    ).artifact
    layers = [
        [program.tensors[index].offset for index in op.inputs[1:]]
        for program in compiled.programs
        for op in program.ops
        if op.name in ("QCONV2D", "QLUT_U8")
    ]
    assert len(layers) == 6 and layers[:2] == layers[2:4] == layers[4:]


def test_what_has_no_one_table_stays_float32() -> None:
    torch.manual_seed(0)
    mean = nn.Parameter(torch.rand(3, 7, 6) * 100)

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = mean

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() - self.mean

    examples = RNG.integers(0, 256, (32, 3, 7, 6)).astype(np.uint8)
    model = Bytes(Centred())
    compiled = compile(model, examples[:1], trainable="none", quantize=PostTrainingInt8(examples))
    assert "QLUT_U8" not in [op.name for op in compiled.artifact.program("predict").ops]
    expected = model.eval()(torch.from_numpy(examples)).detach().numpy()
    np.testing.assert_allclose(load(compiled).predict(examples), expected, atol=0.03 * np.abs(expected).max())


def test_quantisation_aware_training_sees_bytes_as_the_engine_does() -> None:
    torch.manual_seed(0)
    examples = RNG.integers(0, 256, (32, 3, 7, 6)).astype(np.uint8)
    model = Bytes(RandomCrop(6, 6), Resizing(5, 5), *BEFORE["channels"])
    qat = QuantizationAwareTraining(model.eval(), torch.from_numpy(examples), PostTrainingInt8(examples))
    assert all(torch.isfinite(qat.train()(torch.from_numpy(examples))).flatten())
    compiled = compile(model, examples[:1], trainable="none", quantize=qat)
    expected = qat.eval()(torch.from_numpy(examples)).detach().numpy()
    np.testing.assert_array_equal(load(compiled, engine="twin").predict(examples), expected)


ONNX = [name for name, (_, x) in LAYERS.items() if ("hash" not in name and x.dtype != np.uint8) or x is IMAGES]


@pytest.mark.parametrize("name", [name for name in ONNX if "integers" not in name])
def test_numbers_and_images_are_exported_to_onnx(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    make, x = LAYERS[name]
    x = x.astype(np.int32) if x.dtype == np.int64 else x
    session = load(compile(nn.Sequential(make(), Floats()), x[:1]))
    expected = session.predict(x)
    peer = onnxruntime.InferenceSession(to_onnx(session), providers=["CPUExecutionProvider"])
    found = peer.run(None, {peer.get_inputs()[0].name: x})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", BEFORE)
def test_an_int8_body_on_bytes_is_exported_to_onnx(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    examples = RNG.integers(0, 256, (32, 3, 7, 6)).astype(np.uint8)
    session = load(
        compile(Bytes(*BEFORE[name]), examples[:1], quantize=PostTrainingInt8(examples), trainable=["head.*"])
    )
    peer = onnxruntime.InferenceSession(to_onnx(session), providers=["CPUExecutionProvider"])
    found = peer.run(None, {peer.get_inputs()[0].name: examples})[0]
    np.testing.assert_allclose(found, session.predict(examples), atol=0.02)
