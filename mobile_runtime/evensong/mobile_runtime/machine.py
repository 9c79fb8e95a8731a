"""What an engine offers to its host: memory, and a way to run one program over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.session import Array


class Prepared(Protocol):
    """A prepared run; the arguments and errors are those of :meth:`Machine.run`.

    It also looks at its inputs, sooner than a host could: float32 ones that are not finite raise :class:`ExampleError`.
    """

    def __call__(
        self, inputs: Sequence[Array], *, learning_rate: float = 0.0, step: int = 1, seed: int = 0
    ) -> None: ...


class Machine(Protocol):
    """A verified artifact with its mutable memory; :class:`.host.HostSession` adds everything else.

    A machine trusts its caller: arrays are C-contiguous and have the live size and dtype of their port. It is not safe
    for use from two threads at once.
    """

    @property
    def engine(self) -> str:
        """ "native" or "twin"."""
        ...

    @property
    def state(self) -> npt.NDArray[np.uint8]:
        """The STATE region: live and writable."""
        ...

    @property
    def slots(self) -> npt.NDArray[np.uint8]:
        """The SLOTS region: live and writable."""
        ...

    def run(
        self,
        program: int,
        batch: int,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        *,
        learning_rate: float = 0.0,
        step: int = 1,
        seed: int = 0,
    ) -> None:
        """Runs ``artifact.programs[program]`` on ``1 <= batch <= max_batch`` examples and fills ``outputs``.

        Raises :class:`ExampleError` where an embedding id, label or pooling index is out of range, and
        :class:`DivergedError` where a loss, a gradient or an updated weight is not finite. The loss's output is then
        finite only if the loss was; what else may have changed is in docs/artifact.md.
        """
        ...

    def prepare(self, program: int, batch: int, inputs: Sequence[Array], outputs: Sequence[Array]) -> Prepared:
        """A call that runs the program as :meth:`run` would: over inputs like these, into these very outputs.

        For runs of microseconds: everything that does not change between calls is done once.
        """
        ...

    def freeze(self, variables: Sequence[int]) -> None:
        """Skips the optimiser operations of these variables (indices into ``artifact.variables``) from now on."""
        ...

    def close(self) -> None:
        """Frees the memory; :attr:`state` and :attr:`slots` must not be used afterwards."""
        ...
