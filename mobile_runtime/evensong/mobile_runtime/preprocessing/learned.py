"""What layers that learn from data share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from evensong.mobile_runtime.errors import CompileError


class Learned(nn.Module):
    """A module whose buffers get their sizes from data: ``adapt`` sets them, and so does ``load_state_dict``."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and buffer is not None and found.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._loaded()

    def _loaded(self) -> None:
        """Brings what follows from the buffers up to date."""


def fail_unlearned(layer: nn.Module, what: str) -> NoReturn:
    raise CompileError(
        f"{type(layer).__name__} has no {what} yet", fix=f"Give the {what}, or call adapt(data) before the first use."
    )
