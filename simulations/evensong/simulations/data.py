"""The data sets that the harness and the demo learn from, as float32 arrays with int32 labels.

``digits`` is scikit-learn's set of handwritten digits and needs no download. ``har`` and ``fashion`` are read from the
folder that the environment variable ``EVENSONG_DATA`` names: ``har/uci_har.npz`` and ``fashion/fashion.npz``. Nothing
is fetched from a network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evensong.wire.errors import EvensongError

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]

HAR_WINDOW = 128  # rows: 2.56 s at 50 Hz
HAR_STRIDE = 64
#: The people of the official test set of UCI HAR, counted from 0.
HAR_NEWCOMERS = tuple(person - 1 for person in (2, 4, 9, 10, 12, 13, 18, 20, 24))


class DataError(EvensongError):
    """A data set is unknown, absent, or cannot be divided as asked."""


@dataclass(frozen=True)
class Dataset:
    """Examples with labels, and what ties examples together.

    ``inputs`` is float32 ``[n, ...]``, ``labels`` int32 ``[n]``. ``people`` (int32 ``[n]``) says who an example comes
    from, where the data says so. Examples that share a ``block`` (int32 ``[n]``) overlap or follow each other: they
    must stay on one side of a split.
    """

    name: str
    inputs: Floats
    labels: Labels
    classes: tuple[str, ...]
    people: Labels | None
    blocks: Labels
    #: People who never take part in training, as the authors of the set divided it.
    newcomers: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def load_dataset(name: str) -> Dataset:
    """One of :data:`DATASETS`. Raises :class:`DataError` where the name or the folder is wrong."""
    if name not in DATASETS:
        raise DataError("unknown data set", expected=" or ".join(DATASETS), got=name)
    return DATASETS[name]()


def _load_digits() -> Dataset:
    """1,797 digits of 43 writers, ``[n, 1, 8, 8]``: dark dots in each block of 4x4, scaled to [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn", fix="Run: pip install 'evensong[demo]'") from None
    images, labels = load_digits(return_X_y=True)
    inputs = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    return _independent("digits", inputs, labels, tuple("0123456789"))


def _load_fashion() -> Dataset:
    """Fashion-MNIST: 70,000 pictures ``[n, 1, 28, 28]`` in [0, 1], those of its test set last."""
    with np.load(_data_file("fashion/fashion.npz")) as file:
        pixels = np.concatenate([file["x_train"], file["x_test"]])
        labels = np.concatenate([file["y_train"], file["y_test"]])
    inputs = (pixels[:, None] / np.float32(255)).astype(np.float32)
    classes = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "trainer", "bag", "ankle boot")
    return _independent("fashion", inputs, labels, classes)


def _load_har() -> Dataset:
    """UCI HAR, 10,299 windows ``[n, 9, 128]`` of accelerometer (g) and gyroscope (rad/s), by 30 people. A block is one
    bout.

    The file holds each bout as one stream, of which windows of 128 rows are cut every 64 rows, as the authors of the
    set did.
    Values are physical: standardise them with :func:`evensong.simulations.fleet.standardise`, after the split.
    """
    with np.load(_data_file("har/uci_har.npz")) as file:
        stream, scale = file["stream"], np.float32(file["scale"])
        bout_windows = file["bout_windows"].astype(np.int64)
        bout_label, bout_subject = file["bout_label"], file["bout_subject"]
        classes = tuple(str(name).lower().replace("_", " ") for name in file["classes"])
    bout_rows = (bout_windows + 1) * HAR_STRIDE
    bout_start = np.cumsum(bout_rows) - bout_rows
    bout = np.repeat(np.arange(len(bout_windows)), bout_windows)
    within = np.arange(len(bout)) - np.repeat(np.cumsum(bout_windows) - bout_windows, bout_windows)
    rows = (bout_start[bout] + within * HAR_STRIDE)[:, None] + np.arange(HAR_WINDOW)
    inputs = np.ascontiguousarray(stream[rows].transpose(0, 2, 1).astype(np.float32) * scale)
    return Dataset(
        "har",
        inputs,
        bout_label[bout].astype(np.int32),
        classes,
        bout_subject[bout].astype(np.int32),
        bout.astype(np.int32),
        HAR_NEWCOMERS,
    )


def _independent(name: str, inputs: Floats, labels: npt.NDArray[np.integer], classes: tuple[str, ...]) -> Dataset:
    """A set whose examples do not overlap: each one is its own block."""
    return Dataset(name, inputs, labels.astype(np.int32), classes, None, np.arange(len(labels), dtype=np.int32))


def _data_file(relative: str) -> Path:
    folder = os.environ.get("EVENSONG_DATA")
    if not folder:
        raise DataError(
            f"{relative} is not part of evensong",
            fix="Set the environment variable EVENSONG_DATA to the folder that holds it, or use the digits.",
        )
    path = Path(folder) / relative
    if not path.is_file():
        raise DataError(
            "the data set is absent", expected=str(path), fix="Point EVENSONG_DATA at the folder that holds it."
        )
    return path


DATASETS = {"digits": _load_digits, "har": _load_har, "fashion": _load_fashion}
