"""What a Flower strategy remembers between rounds, as bytes, without pickle.

A strategy keeps its memory (momentum, first and second moments, counters) in attributes. Those that differ from a
freshly made strategy are written as JSON, with arrays as raw little-endian bytes behind it, in the frame of
:mod:`evensong.wire.frame` (magic ``EVST``). Equal memory gives equal bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.wire.errors import CorruptError, EvensongError
from evensong.wire.frame import HEADER_BYTES, open_frame, seal

MAGIC = b"EVST"
VERSION = 1

Arrays = list[npt.NDArray[np.generic]]

#: Flower keeps here what ``configure_train`` was given. It is given anew each round (a promoted version may differ).
_RECEIVED = "current_arrays"


class StrategyError(EvensongError):
    """A server strategy is unknown, unfit for sums, misconfigured, or failed."""


def export_state(name: str, strategy: object, fresh: object) -> bytes:
    """The attributes of ``strategy`` in which it differs from ``fresh``, a strategy made by the same factory."""
    arrays: Arrays = []
    attributes: dict[str, Any] = {}
    configured = vars(fresh)
    for attribute, value in sorted(vars(strategy).items()):
        if attribute == _RECEIVED:
            continue
        own: Arrays = []
        described = _describe(value, own, len(arrays))
        before = _describe(configured.get(attribute), [], 0)
        if described is not _UNKNOWN:
            if own or attribute not in configured or described != before:
                attributes[attribute] = described
                arrays += own
        elif before is not _UNKNOWN:  # unknown in a fresh strategy too: configuration, such as a function
            raise StrategyError(
                f"strategy {name!r} remembers something that cannot be stored",
                expected=f"numbers, text, arrays, and lists or dicts of them in {attribute!r}",
                got=type(value).__name__,
                fix="Keep the strategy's memory in such attributes, or write a ServerOptimizer.",
            )
    head = json.dumps(
        {
            "strategy": name,
            "attributes": attributes,
            "arrays": [{"dtype": array.dtype.str, "shape": array.shape} for array in arrays],
        },
        sort_keys=True,
    ).encode()
    parts = [bytes(HEADER_BYTES), len(head).to_bytes(4, "little"), head, *(array.tobytes() for array in arrays)]
    return seal(bytearray().join(parts), MAGIC, VERSION)


def restore_state(name: str, strategy: object, state: bytes) -> None:
    """Gives a fresh strategy the memory of ``state``; :class:`StrategyError` if that was another strategy's."""
    body = open_frame(state, MAGIC, VERSION, "the state of a server strategy")
    length = int.from_bytes(body[:4], "little")
    try:
        head = json.loads(bytes(body[4 : 4 + length]))
        if head["strategy"] != name:
            raise StrategyError("the stored state belongs to another strategy", expected=name, got=head["strategy"])
        arrays: Arrays = []
        offset = 4 + length
        for entry in head["arrays"]:
            dtype, count = np.dtype(entry["dtype"]), int(np.prod(entry["shape"], dtype=np.int64))
            arrays.append(np.frombuffer(body, dtype, count, offset).reshape(entry["shape"]).copy())
            offset += dtype.itemsize * count
        for attribute, described in head["attributes"].items():
            setattr(strategy, attribute, _rebuild(described, arrays))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptError("the state of a server strategy cannot be read", got=error) from error


_UNKNOWN = object()


def _describe(value: object, arrays: Arrays, first: int) -> Any:
    """JSON for ``value``; its arrays go to ``arrays``, the first of them being number ``first`` of the file."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        array = np.asarray(value)
        arrays.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape))
        return {"array": first + len(arrays) - 1}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, list | tuple):
        items = [_describe(item, arrays, first) for item in value]
        kind = "list" if isinstance(value, list) else "tuple"
        return _UNKNOWN if any(item is _UNKNOWN for item in items) else {kind: items}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        entries = [(key, _describe(item, arrays, first)) for key, item in value.items()]
        return _UNKNOWN if any(entry is _UNKNOWN for _, entry in entries) else {"dict": entries}
    return _UNKNOWN


def _rebuild(described: Any, arrays: Arrays) -> object:
    if not isinstance(described, dict):
        return described
    ((kind, content),) = described.items()
    if kind == "float":
        return float.fromhex(content)
    if kind == "array":
        return arrays[content]
    if kind == "dict":
        return {key: _rebuild(item, arrays) for key, item in content}
    items = [_rebuild(item, arrays) for item in content]
    return tuple(items) if kind == "tuple" else items
