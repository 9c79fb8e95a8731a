"""Keras 3 models in the compiler: the same predictions, the same training steps, and weights that go back."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
layers = keras.layers

from evensong.mobile_runtime import load  # noqa: E402  # Keras reads its backend when it is imported
from evensong.mobile_runtime.compiler import KerasModule, compile  # noqa: E402
from evensong.mobile_runtime.errors import CompileError, UnsupportedOperation  # noqa: E402

pytestmark = pytest.mark.torch


def _image_model() -> Any:
    """Functional, with branches: every kind of image layer, "same" padding that is uneven on both sides."""
    image = keras.Input((11, 9, 2))
    x = layers.Rescaling(0.5, offset=0.1)(image)
    x = layers.Conv2D(8, (3, 2), strides=2, padding="same", activation="relu")(x)
    x = layers.BatchNormalization()(x)
    y = layers.DepthwiseConv2D(3, padding="same", activation="silu")(x)
    x = layers.Add()([x, layers.Conv2D(8, 1, use_bias=False)(y)])
    x = layers.ZeroPadding2D(((1, 0), (0, 2)))(x)
    x = layers.MaxPooling2D(2)(layers.ReLU(max_value=6.0)(x))
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.GlobalMaxPooling2D()(x)])
    x = layers.LayerNormalization()(layers.Dropout(0.0)(x))
    return keras.Model(image, layers.Dense(5)(layers.Multiply()([x, layers.Activation("tanh")(x)])))


def _signal_model() -> Any:
    return keras.Sequential(
        [
            keras.Input((12, 3)),
            layers.Conv1D(6, 3, padding="causal", dilation_rate=2, activation="gelu"),
            layers.AveragePooling1D(2),
            layers.Conv1D(4, 2, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.1),
            layers.Flatten(),
            layers.Reshape((3, 4)),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )


def _text_model() -> Any:
    return keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(20, 8), layers.GlobalAveragePooling1D(), layers.Dense(5)]
    )


MODELS = {
    "image": (_image_model, lambda rng: rng.normal(size=(8, 11, 9, 2)).astype(np.float32)),
    "signal": (_signal_model, lambda rng: rng.normal(size=(8, 12, 3)).astype(np.float32)),
    "text": (_text_model, lambda rng: rng.integers(0, 20, size=(8, 6)).astype(np.int32)),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Any, np.ndarray]:
    keras.utils.set_random_seed(3)
    make, examples = MODELS[request.param]
    model = make()
    for variable in model.weights:  # nothing may be zero or one by chance of its initialiser
        if variable.dtype == "float32":
            variable.assign(variable.numpy() + np.random.default_rng(1).uniform(0.05, 0.3, variable.shape))
    return model, examples(np.random.default_rng(0))


def test_predictions_are_those_of_keras(case: tuple[Any, np.ndarray]) -> None:
    model, x = case
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    predicted = load(compile(model, x, trainable="none")).predict(x)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


def test_training_goes_on_in_keras(case: tuple[Any, np.ndarray]) -> None:
    """Steps on the engine are steps of Keras' own SGD; what they taught goes back into the Keras model."""
    model, x = case
    y = np.random.default_rng(2).integers(0, 5, len(x)).astype(np.int32)
    module = KerasModule(model)
    session = load(compile(module, x, batch_size=len(x)))
    losses = [session.train_step(x, y, learning_rate=0.1).loss for _ in range(3)]
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    expected = [float(model.train_on_batch(x, y)) for _ in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)

    session.train_step(x, y, learning_rate=0.1)
    module.update(session.get())
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model(x, training=False)), session.predict(x), rtol=1e-4, atol=1e-5
    )


def test_frozen_layers_stay_frozen() -> None:
    model = _image_model()
    for layer in model.layers[:-1]:
        layer.trainable = False
    assert {name for name, p in KerasModule(model).named_parameters() if p.requires_grad} == {
        f"layers.{model.layers[-1].name}.weight",
        f"layers.{model.layers[-1].name}.bias",
    }


def test_what_has_no_counterpart_is_refused_by_name() -> None:
    recurrent = keras.Sequential([keras.Input((4, 2)), layers.GRU(3)])
    with pytest.raises(UnsupportedOperation, match="GRU"):
        compile(recurrent, np.zeros((1, 4, 2), np.float32))
    shared = layers.Dense(3, name="twice")
    image = keras.Input((3,))
    with pytest.raises(UnsupportedOperation, match="called more than once"):
        KerasModule(keras.Model(image, shared(shared(image))))
    with pytest.raises(UnsupportedOperation, match=r"before.*is called more than once"):
        KerasModule(keras.Model(image, layers.Dense(2)(shared(shared(image)))))
    with pytest.raises(CompileError, match="no graph of layers"):
        KerasModule(keras.Sequential([layers.Dense(3)]))
    assert not isinstance(torch.nn.Linear(1, 1), KerasModule)
