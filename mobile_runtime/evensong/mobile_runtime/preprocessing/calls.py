"""Calls that ATen has no words for, as custom operations: ``torch.export`` keeps them, and the compiler knows them.

They compute with the NumPy functions of the engines' reference, on the CPU, so that author and device cannot disagree.
None has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.twin_call import Clock
from evensong.mobile_runtime.twin_ops_input import counted, cropped, looked_up, token_hashes

_LARGEST_SEED = (1 << 63) - 1

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def _operation(name: str, empty: Callable[..., Tensor]) -> Callable[[_Function], _Function]:
    """``torch.library.custom_op`` with the type of what it takes; ``empty`` makes a result of the right shape."""

    def register(function: _Function) -> _Function:
        operation: Any = torch.library.custom_op(name, function, mutates_args=())
        operation.register_fake(empty)
        return cast(_Function, operation)

    return register


@_operation("evensong::tokenize", lambda x, width, *how: x.new_empty((*x.shape[:-1], width), dtype=torch.int64))
def tokenize(text: Tensor, width: int, lower: bool, strip: bool, split: int, ngrams: int, salt: int) -> Tensor:
    """uint8 ``[..., bytes]`` -> int64 ``[..., width]``: hashes of the tokens, then zeros."""
    rows = text.detach().cpu().numpy().reshape(-1, text.shape[-1])
    hashes = token_hashes(rows, width, lower=lower, strip=strip, split=split, ngrams=ngrams, salt=salt)
    return torch.from_numpy(hashes.astype(np.int64)).reshape(*text.shape[:-1], width).to(text.device)


@_operation("evensong::lookup", lambda x, *how: torch.empty_like(x, dtype=torch.int64))
def lookup(x: Tensor, table: Tensor | None, first: int, bins: int, salt: int) -> Tensor:
    """Integers -> int64 ids of the same shape: the id beside the key in ``table [K, 2]``, else one of ``bins``."""
    keys = None if table is None else table.detach().cpu().numpy().astype(np.int32)
    ids = looked_up(_int32(x), keys, first=first, bins=bins, salt=salt)
    return torch.from_numpy(ids.astype(np.int64)).to(x.device)


@_operation("evensong::one_hot", lambda x, columns, *how: x.new_empty((*x.shape[:-1], columns), dtype=torch.float32))
def one_hot(ids: Tensor, columns: int, first: int, count: bool) -> Tensor:
    """Integers ``[..., n]`` -> float32 ``[..., columns]``; column ``c`` tells of id ``first + c``."""
    rows = ids.detach().cpu().numpy().reshape(-1, ids.shape[-1])
    found = counted(rows, columns, first=first, count=count)
    return torch.from_numpy(found).reshape(*ids.shape[:-1], columns).to(ids.device)


@_operation("evensong::crop2d", lambda x, height, width, *how: x.new_empty((*x.shape[:2], height, width)))
def crop2d(
    x: Tensor, height: int, width: int, random: bool, pad_h: int, pad_w: int, flip_h: bool, flip_v: bool
) -> Tensor:
    """Images ``[n, C, H, W]`` -> windows ``[n, C, height, width]``; with ``random`` torch's generator decides where."""
    windows = cropped(
        x.detach().cpu().numpy().transpose(0, 2, 3, 1),
        (height, width),
        Clock(0.0, 1, int(torch.randint(_LARGEST_SEED, ())) if random else 0),
        random=random,
        pad_h=pad_h,
        pad_w=pad_w,
        flip_h=flip_h,
        flip_v=flip_v,
        stream=0,
    )
    return torch.from_numpy(np.ascontiguousarray(windows.transpose(0, 3, 1, 2))).to(x.device)


def _int32(x: Tensor) -> npt.NDArray[np.int32]:
    values = x.detach().cpu().numpy()
    if values.dtype.kind not in "iu" or (values.size and not -(1 << 31) <= values.min() <= values.max() < 1 << 31):
        raise ExampleError("this cannot be looked up", expected="integers of 32 bits", got=values.dtype)
    return values.astype(np.int32)
