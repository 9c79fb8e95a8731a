"""The compiled engine, loaded with ctypes. ``engine/include/evensong.h`` documents the C face behind this file."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.errors import DivergedError, ExampleError, ProgramError, RuntimeFault
from evensong.mobile_runtime.machine import Prepared
from evensong.mobile_runtime.session import Array
from evensong.wire.errors import ArtifactError, CorruptError, EvensongError
from evensong.wire.program import Artifact

ABI_VERSION = 3
LIBRARY_VARIABLE = "EVENSONG_ENGINE_LIBRARY"  #: environment variable that names another build of the library

_MESSAGE_BYTES = 512
_CHECK_INPUTS = 1
_ERRORS: dict[int, type[EvensongError]] = {
    1: CorruptError,
    2: ArtifactError,
    3: ProgramError,
    4: RuntimeFault,  # this file's mistake, or an array that is not what its port says
    5: ExampleError,
    6: DivergedError,
}
_NO_MEMORY = 7


def available() -> bool:
    """Whether the library is there, loads, and speaks this version of the C face."""
    try:
        _library()
    except (OSError, RuntimeFault):
        return False
    return True


def library_path() -> Path:
    """The shared library that this process uses; raises :class:`OSError` where there is none."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named)
    folder = Path(__file__).parent
    names = {"darwin": "libevensong.dylib", "win32": "evensong.dll"}
    for name in (names.get(sys.platform, "libevensong.so"), "libevensong.so"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"the engine's shared library is not in {folder.name}: evensong was installed without it")


def instruction_set() -> str:
    """What the kernels are picked for on this CPU: "avx512", "avx2", "sse2", "neon", ..."""
    name: bytes = _library().evensong_instruction_set()
    return name.decode()


class NativeMachine:
    """Implements :class:`evensong.mobile_runtime.machine.Machine` over the shared library.

    ``data`` are the bytes of ``artifact``; the engine checks them on its own and keeps no reference to them. Raises
    :class:`CorruptError`, :class:`ArtifactError` or :class:`ProgramError` with the engine's words where it refuses
    them, and :class:`OSError` where there is no library. ``instruction_set`` is for tests: None takes the best.
    """

    engine = "native"

    def __init__(self, artifact: Artifact | None, data: bytes, *, instruction_set: str | None = None) -> None:
        self._library = _library()
        self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        self._handle: ctypes.c_void_p | None = None
        handle = ctypes.c_void_p()
        name = instruction_set.encode() if instruction_set else None
        self._check(
            self._library.evensong_open_on(
                name, data, len(data), 0, ctypes.byref(handle), self._message, _MESSAGE_BYTES
            )
        )
        self._handle = handle
        self._run = self._library.evensong_run
        self._options = _Options()
        self._options_pointer = ctypes.byref(self._options)
        self._buffers: dict[tuple[int, bool], Any] = {}
        self.state = self._region(self._library.evensong_state)
        self.slots = self._region(self._library.evensong_slots)

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
        """See :meth:`.machine.Machine.run`."""
        options = self._options
        options.learning_rate = learning_rate
        options.step = step
        options.seed = seed
        status = self._run(
            self._live_handle(),
            program,
            batch,
            self._fill((program, False), inputs),
            len(inputs),
            self._fill((program, True), outputs),
            len(outputs),
            self._options_pointer,
            self._message,
            _MESSAGE_BYTES,
        )
        if status:
            self._check(status)

    def prepare(self, program: int, batch: int, inputs: Sequence[Array], outputs: Sequence[Array]) -> Prepared:
        """See :meth:`.machine.Machine.prepare`."""
        sources, targets = _described(inputs), _described(outputs)
        options = _Options(flags=_CHECK_INPUTS, step=1)
        arguments = (
            *(self._live_handle(), ctypes.c_uint32(program), ctypes.c_uint32(batch)),
            *(sources, ctypes.c_uint32(len(inputs)), targets, ctypes.c_uint32(len(outputs))),
            *(ctypes.byref(options), self._message, ctypes.c_size_t(_MESSAGE_BYTES)),
        )
        function, check = self._run, self._check
        buffers = list(sources)  # they share its memory

        def run(inputs: Sequence[Array], *, learning_rate: float = 0.0, step: int = 1, seed: int = 0) -> None:
            for buffer, array in zip(buffers, inputs, strict=True):
                buffer.data = _address(array)
            options.learning_rate = learning_rate
            options.step = step
            options.seed = seed
            status = function(*arguments)
            if status:
                check(status)

        run.outputs = outputs  # type: ignore[attr-defined]  # alive as long as their addresses
        return run

    def freeze(self, variables: Sequence[int]) -> None:
        """See :meth:`.machine.Machine.freeze`."""
        indices = (ctypes.c_uint32 * len(variables))(*variables)
        self._check(
            self._library.evensong_freeze(self._live_handle(), indices, len(variables), self._message, _MESSAGE_BYTES)
        )

    @property
    def memory_bytes(self) -> int:
        """Bytes that the engine holds for this artifact."""
        return int(self._library.evensong_memory_bytes(self._live_handle()))

    def close(self) -> None:
        """Frees the engine's memory. Views of :attr:`state` and :attr:`slots` taken before are no longer valid."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self.state = self.slots = self.state[:0].copy()
            self._library.evensong_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _live_handle(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise RuntimeFault("the session is closed", fix="Load the artifact again.")
        return self._handle

    def _fill(self, key: tuple[int, bool], arrays: Sequence[Array]) -> Any:
        """The C array of buffers that describes ``arrays``; kept per program, since building one costs microseconds."""
        buffers = self._buffers.get(key)
        if buffers is None or len(buffers) != len(arrays):
            buffers = self._buffers[key] = _described(arrays)
            return buffers
        for buffer, array in zip(buffers, arrays, strict=True):
            buffer.data = _address(array)
            buffer.size = array.nbytes
        return buffers

    def _region(self, function: Any) -> npt.NDArray[np.uint8]:
        size = ctypes.c_size_t()
        address = function(self._handle, ctypes.byref(size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(address))

    def _check(self, status: int) -> None:
        if status == 0:
            return
        message = self._message.value.decode(errors="replace")
        if status == _NO_MEMORY:
            raise MemoryError(message)
        raise _ERRORS.get(status, RuntimeFault)(message)


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Options(ctypes.Structure):
    _fields_ = (
        ("learning_rate", ctypes.c_float),
        ("flags", ctypes.c_uint32),
        ("step", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
    )


def _described(arrays: Sequence[Array]) -> Any:
    """The C array of buffers that describes ``arrays``; they have to outlive its use."""
    return (_Buffer * len(arrays))(*(_Buffer(_address(array), array.nbytes) for array in arrays))


def _address(array: Any) -> int:
    """Of the first element, in a third of the time that ``__array_interface__`` takes."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError):  # read-only, or empty
        address: int = array.__array_interface__["data"][0]
        return address


def _library() -> ctypes.CDLL:
    return _load(library_path())


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    version = library.evensong_abi_version()
    if version != ABI_VERSION:
        raise RuntimeFault(
            "the engine's library is another version",
            expected=f"C face {ABI_VERSION}",
            got=version,
            fix="Install evensong again, or in a source tree run python mobile_runtime/engine/build.py.",
        )
    pointer, size, u32, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_char_p
    message = [text, size]
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "evensong_instruction_set": (text, []),
        "evensong_open_on": (ctypes.c_int, [text, text, size, u32, pointer, *message]),
        "evensong_close": (None, [pointer]),
        "evensong_memory_bytes": (size, [pointer]),
        "evensong_state": (pointer, [pointer, pointer]),
        "evensong_slots": (pointer, [pointer, pointer]),
        "evensong_freeze": (ctypes.c_int, [pointer, pointer, size, *message]),
        "evensong_run": (ctypes.c_int, [pointer, u32, u32, pointer, u32, pointer, u32, pointer, *message]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
