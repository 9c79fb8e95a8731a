"""Data sets: what is in them, and errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from evensong.simulations.data import HAR_NEWCOMERS, HAR_STRIDE, DataError, load_dataset

needs_data = pytest.mark.skipif(not os.environ.get("EVENSONG_DATA"), reason="EVENSONG_DATA names no folder")


def test_digits_are_scaled_pictures_with_labels() -> None:
    digits = load_dataset("digits")
    assert digits.inputs.shape == (1797, 1, 8, 8) and digits.inputs.dtype == np.float32
    assert digits.inputs.min() == 0 and digits.inputs.max() == 1
    assert digits.labels.dtype == np.int32 and set(digits.labels) == set(range(10))


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(DataError, match="digits or har or fashion"):
        load_dataset("mnist")


def test_absent_data_says_which_variable_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EVENSONG_DATA", raising=False)
    with pytest.raises(DataError, match="EVENSONG_DATA"):
        load_dataset("har")
    monkeypatch.setenv("EVENSONG_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"uci_har\.npz"):
        load_dataset("har")


def test_har_windows_are_cut_from_their_bout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stream whose value is its row number shows where each window begins."""
    windows = np.array([2, 1, 3], dtype=np.int16)
    rows = int((windows + 1).sum()) * HAR_STRIDE
    (tmp_path / "har").mkdir()
    np.savez(
        tmp_path / "har" / "uci_har.npz",
        stream=np.arange(rows, dtype=np.int16)[:, None] * np.ones(9, dtype=np.int16),
        scale=np.float32(0.5),
        bout_windows=windows,
        bout_label=np.array([3, 1, 0], dtype=np.uint8),
        bout_subject=np.array([7, 7, 2], dtype=np.uint8),
        classes=np.array(["A", "B_C", "D", "E"]),
    )
    monkeypatch.setenv("EVENSONG_DATA", str(tmp_path))
    har = load_dataset("har")
    assert har.inputs.shape == (6, 9, 128)
    # Bouts take 192, 128 and 256 rows; windows start every 64 rows within their own bout.
    assert list(har.inputs[:, 4, 0] / 0.5) == [0, 64, 192, 320, 384, 448]
    assert list(har.inputs[2, 0] / 0.5) == list(range(192, 320))
    assert list(har.blocks) == [0, 0, 1, 2, 2, 2]
    assert list(har.labels) == [3, 3, 1, 0, 0, 0]
    assert har.people is not None and list(har.people) == [7, 7, 7, 2, 2, 2]
    assert har.classes[1] == "b c"


@pytest.mark.data
@needs_data
def test_har_is_the_published_set() -> None:
    har = load_dataset("har")
    assert len(har) == 10_299 and har.people is not None
    assert np.isin(har.people, HAR_NEWCOMERS).sum() == 2_947  # the official test set
    assert list(np.bincount(har.labels)) == [1722, 1544, 1406, 1777, 1906, 1944]
    gravity = np.linalg.norm(har.inputs[har.labels == har.classes.index("standing"), 6:].mean(axis=2), axis=1)
    assert gravity.mean() == pytest.approx(1.0, abs=0.05)  # total acceleration at rest, in g


@pytest.mark.data
@needs_data
def test_fashion_is_whole() -> None:
    fashion = load_dataset("fashion")
    assert fashion.inputs.shape == (70_000, 1, 28, 28) and fashion.inputs.max() == 1
    assert set(np.bincount(fashion.labels)) == {7_000}
