"""The device's own examples: stored here, trained on here, never uploaded.

They stand in a database of their own (``examples.sqlite``), so that whatever collects them may run in another process
while the device works, and so that one file holds all that is private.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from evensong.client.database import Database
from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.text import is_text, utf8
from evensong.wire.clock import Clock, SystemClock

Array = npt.NDArray[Any]
Split = Literal["train", "test"]
Fields = npt.ArrayLike | Sequence[npt.ArrayLike]

#: What an engine takes; other types are narrowed to the nearest of these where no value changes its meaning.
_NARROWED = {"f": "<f4", "i": "<i4", "u": "<i4", "b": "|u1"}
_KEPT = ("<f4", "<i4", "|i1", "|u1")
_TEXT = "text"  #: dtype of a field of strings; each is stored as UTF-8 behind its length in 4 bytes
_TYPICAL_TEXT_BYTES = 512
_READ_AHEAD_BYTES = 8 << 20

_MIGRATIONS = (
    """
    CREATE TABLE fields (only INTEGER PRIMARY KEY CHECK (only = 1), description TEXT NOT NULL);
    CREATE TABLE examples (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        split TEXT NOT NULL CHECK (split IN ('train', 'test')),
        added_unix_ms INTEGER NOT NULL,
        data BLOB NOT NULL
    );
    CREATE INDEX examples_by_split ON examples (split, id);
    """,
)


@dataclass(frozen=True)
class Field:
    """One array of every example: its dtype (NumPy string, or ``"text"``) and shape, without the batch dimension."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of one example; for texts a guess."""
        return (_TYPICAL_TEXT_BYTES if self.dtype == _TEXT else np.dtype(self.dtype).itemsize) * math.prod(self.shape)


@dataclass(frozen=True)
class Batch:
    """``inputs`` are the model's inputs ``[n, ...]``, ``target`` the labels ``[n, ...]``; texts as strings."""

    inputs: tuple[Array, ...]
    target: Array

    def __len__(self) -> int:
        return len(self.target)


class Examples(Protocol):
    """What training, evaluation and personalisation need of a source of examples."""

    def count(self, split: Split = "train") -> int:
        """Examples there are now."""
        ...

    def batches(
        self, batch_size: int, *, split: Split = "train", order: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """Every example once, in the order of arrival or as ``order`` shuffles; the last batch may be smaller."""
        ...


class ExampleStore:
    """Examples in SQLite.

    The first example decides the fields (dtype and shape of each input and of the target); later ones must fit them,
    and :class:`ExampleError` names what does not. float64 is stored as float32 and int64 as int32 where the values
    allow; inputs that are strings may have any length. Per split at most ``max_rows`` are kept, the newest, and none
    older than ``max_age_s``.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        max_rows: int = 10_000,
        max_age_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.max_rows = max_rows
        self.max_age_s = max_age_s
        self._clock = clock or SystemClock()
        self._database = Database(path, _MIGRATIONS)

    def add(self, x: Fields, y: npt.ArrayLike, *, split: Split = "train") -> None:
        """One example; ``x`` is an array, or a tuple of arrays for a model with several inputs; no batch dimension."""
        inputs = x if isinstance(x, tuple) else (x,)
        self.add_many(tuple(np.asarray(value)[None] for value in inputs), np.asarray(y)[None], split=split)

    def add_many(self, x: Fields, y: npt.ArrayLike, *, split: Split = "train") -> None:
        """``n`` examples at once, all or none: every array starts with the batch dimension ``n``."""
        if split not in ("train", "test"):
            raise ExampleError("unknown split", expected="'train' or 'test'", got=split)
        arrays = [_narrowed(np.asarray(value)) for value in (*(x if isinstance(x, tuple) else (x,)), y)]
        if any(array.ndim == 0 or len(array) != len(arrays[0]) for array in arrays):
            raise ExampleError(
                "inputs and target must have the same number of examples", got=[array.shape for array in arrays]
            )
        if is_text(arrays[-1]):
            raise ExampleError("a target must be numbers", got=str(arrays[-1][0])[:40], fix="Give each label a number.")
        if not len(arrays[0]):
            return
        with self._database.transaction() as connection:
            columns = self._fitting(arrays)
            now = self._clock.unix_ms()
            rows = zip(*map(_packed, columns), strict=True)
            connection.executemany(
                "INSERT INTO examples (split, added_unix_ms, data) VALUES (?, ?, ?)",
                ((split, now, b"".join(row)) for row in rows),
            )
            self._forget()

    def count(self, split: Split = "train") -> int:
        self._forget()
        return int(self._database.rows("SELECT count(*) FROM examples WHERE split = ?", (split,))[0][0])

    def batches(
        self, batch_size: int, *, split: Split = "train", order: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        if batch_size < 1:
            raise ExampleError("a batch has at least one example", got=batch_size)
        self._forget()
        fields = self.fields()
        if not fields:
            return
        found = self._database.rows("SELECT id FROM examples WHERE split = ? ORDER BY id", (split,))
        ids = np.array([row[0] for row in found], np.int64)
        if order is not None:
            order.shuffle(ids)
        row_bytes = max(1, sum(field.nbytes for field in fields))
        ahead = max(1, _READ_AHEAD_BYTES // (row_bytes * batch_size)) * batch_size
        for start in range(0, len(ids), ahead):
            arrays = self._read(ids[start : start + ahead], fields)
            for first in range(0, len(arrays[0]), batch_size):
                part = [array[first : first + batch_size] for array in arrays]
                yield Batch(tuple(part[:-1]), part[-1])

    def fields(self) -> tuple[Field, ...]:
        """Inputs, then the target; empty before the first example."""
        rows = self._database.rows("SELECT description FROM fields")
        if not rows:
            return ()
        return tuple(Field(dtype, tuple(shape)) for dtype, shape in json.loads(str(rows[0][0])))

    def clear(self) -> None:
        """Forgets all examples and their fields."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM examples")
            connection.execute("DELETE FROM fields")

    def close(self) -> None:
        self._database.close()

    def _fitting(self, arrays: Sequence[Array]) -> list[Array]:
        """The arrays in the store's dtypes; the first ones ever decide them."""
        fields = self.fields()
        if not fields:
            fields = tuple(Field(_dtype(array), array.shape[1:]) for array in arrays)
            description = json.dumps([[field.dtype, field.shape] for field in fields])
            with self._database.transaction() as connection:
                connection.execute("INSERT INTO fields VALUES (1, ?)", (description,))
        if len(fields) != len(arrays):
            raise ExampleError(
                "the example has the wrong number of inputs", expected=len(fields) - 1, got=len(arrays) - 1
            )
        return [_cast(array, field, index) for index, (array, field) in enumerate(zip(arrays, fields, strict=True))]

    def _read(self, ids: Array, fields: tuple[Field, ...]) -> list[Array]:
        """The rows of ``ids`` that still exist, in that order, one array a field."""
        data: dict[int, bytes] = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500].tolist()
            marks = ",".join("?" * len(some))
            data.update(self._database.rows(f"SELECT id, data FROM examples WHERE id IN ({marks})", some))
        blobs = [data[number] for number in ids.tolist() if number in data]
        return _unpacked(blobs, fields)

    def _forget(self) -> None:
        """Applies the row and age limits."""
        with self._database.transaction() as connection:
            if self.max_age_s is not None:
                oldest = self._clock.unix_ms() - int(self.max_age_s * 1000)
                connection.execute("DELETE FROM examples WHERE added_unix_ms < ?", (oldest,))
            for split in ("train", "test"):
                connection.execute(
                    "DELETE FROM examples WHERE split = ?1 AND id <= "
                    "(SELECT id FROM examples WHERE split = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
                    (split, self.max_rows),
                )


class ArrayExamples:
    """The same over arrays in memory ``[n, ...]``: for a simulated device, whose examples are views of one data set."""

    def __init__(self, train: Batch, test: Batch | None = None) -> None:
        self._splits: dict[Split, Batch | None] = {"train": train, "test": test}

    def count(self, split: Split = "train") -> int:
        batch = self._splits[split]
        return 0 if batch is None else len(batch)

    def batches(
        self, batch_size: int, *, split: Split = "train", order: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        batch = self._splits[split]
        if batch is None:
            return
        chosen = np.arange(len(batch))
        if order is not None:
            order.shuffle(chosen)
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            yield Batch(tuple(array[part] for array in batch.inputs), batch.target[part])


def _packed(column: Array) -> list[bytes]:
    """Each example of one field as bytes."""
    if _dtype(column) != _TEXT:
        return [row.tobytes() for row in column]
    rows = ([utf8(str(text)) for text in np.ravel(row)] for row in column)
    return [b"".join(len(text).to_bytes(4, "little") + text for text in row) for row in rows]


def _unpacked(blobs: Sequence[bytes], fields: Sequence[Field]) -> list[Array]:
    """One array a field, of examples that hold their fields one after the other."""
    arrays: list[Array] = []
    places = [0] * len(blobs)  # how far each is read
    for field in fields:
        if field.dtype == _TEXT:
            found = [_texts(blob, place, math.prod(field.shape)) for blob, place in zip(blobs, places, strict=True)]
            column = np.array([texts for texts, _ in found], object)
            places = [place for _, place in found]
        else:
            parts = (blob[place : place + field.nbytes] for blob, place in zip(blobs, places, strict=True))
            column = np.frombuffer(bytearray().join(parts), field.dtype)
            places = [place + field.nbytes for place in places]
        arrays.append(column.reshape(len(blobs), *field.shape))
    return arrays


def _texts(blob: bytes, place: int, count: int) -> tuple[list[str], int]:
    """``count`` strings from ``place`` on, and the place behind them."""
    texts = []
    for _ in range(count):
        start = place + 4
        place = start + int.from_bytes(blob[start - 4 : start], "little")
        texts.append(blob[start:place].decode())
    return texts, place


def _dtype(array: Array) -> str:
    return _TEXT if is_text(array) else array.dtype.str


def _narrowed(array: Array) -> Array:
    """In a dtype that engines know."""
    if array.dtype.str in _KEPT or is_text(array):
        return array
    target = _NARROWED.get(array.dtype.kind)
    if target is None:
        raise ExampleError(
            "examples must be numbers or strings",
            expected="float32, int32, int8 or uint8, or what fits them",
            got=array.dtype,
        )
    if target == "<i4" and array.size and not (int(array.min()) >= -(1 << 31) and int(array.max()) < 1 << 31):
        raise ExampleError("an integer is out of range", expected="32 bits", got=f"{array.min()} to {array.max()}")
    with np.errstate(over="ignore"):  # what overflows is not finite, and refused where it is used
        return array.astype(target)


def _cast(array: Array, field: Field, index: int) -> Array:
    if array.shape[1:] != field.shape:
        raise ExampleError(
            f"field {index} of the example has the wrong shape", expected=field.shape, got=array.shape[1:]
        )
    dtype = _dtype(array)
    same_values = dtype == field.dtype or (array.dtype.kind in "iu" and field.dtype in ("<i4", "<f4"))
    if not same_values:
        raise ExampleError(
            f"field {index} of the example has the wrong dtype",
            expected=field.dtype if field.dtype == _TEXT else np.dtype(field.dtype).name,
            got=dtype if dtype == _TEXT else array.dtype.name,
            fix="Use the dtype of the first example, or clear the store.",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ExampleError(f"field {index} of the example holds NaN or infinite values", expected="finite numbers")
    return array if dtype == _TEXT else np.ascontiguousarray(array, dtype=field.dtype)
