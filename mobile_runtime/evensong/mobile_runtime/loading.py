"""From an artifact to a session: which engine runs it, and a loud word if that is not the compiled one."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from evensong.mobile_runtime import native
from evensong.mobile_runtime.errors import RuntimeFault
from evensong.mobile_runtime.host import HostSession
from evensong.mobile_runtime.machine import Machine
from evensong.mobile_runtime.session import Session
from evensong.mobile_runtime.twin import TwinMachine
from evensong.wire.artifact import artifact_hash, decode_artifact, encode_artifact
from evensong.wire.program import Artifact

Engine = Literal["auto", "native", "twin"]

ENGINE_VARIABLE = "EVENSONG_ENGINE"  #: environment variable that decides where the caller leaves it at "auto"

_ENGINES = ("auto", "native", "twin")
_HOW_TO_GET_IT = (
    "Install a C++17 compiler and run: pip install --force-reinstall --no-deps evensong "
    "(from a source tree: python mobile_runtime/engine/build.py)."
)


@runtime_checkable
class HasBytes(Protocol):
    """Something that holds an artifact, such as what ``compile`` returns."""

    def to_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class EngineInfo:
    """The engine that ``load`` takes by default."""

    engine: Literal["native", "twin"]
    instruction_set: str  #: what the kernels were picked for, e.g. "avx2"; "numpy" for the twin
    library: Path | None  #: the shared library; None for the twin
    reason: str = ""  #: why it is not the compiled engine


def load(
    artifact: bytes | str | os.PathLike[str] | Artifact | HasBytes, *, engine: Engine = "auto", seed: int = 0
) -> Session:
    """Verifies ``artifact`` (its bytes, a file, or what ``compile`` returned) and starts from its initial weights.

    ``engine`` "native" is the compiled engine and raises :class:`RuntimeFault` where that is missing, "twin" is its
    NumPy reference; "auto" takes the compiled one if it can and warns once if it cannot. ``EVENSONG_ENGINE`` decides
    for "auto". ``seed`` (unsigned 64 bits) drives dropout.

    Raises :class:`CorruptError` (damaged bytes), :class:`ArtifactError` (a broken rule of the format) or
    :class:`ProgramError` (an operation whose operands do not fit).
    """
    data = _bytes_of(artifact)
    parsed = decode_artifact(data)
    return HostSession(parsed, _machine(parsed, data, _chosen(engine)), artifact_hash(data), seed=seed)


def engine_info() -> EngineInfo:
    """What :func:`load` would use now."""
    chosen = _chosen("auto")
    if chosen == "twin":
        return EngineInfo("twin", "numpy", None, f"{ENGINE_VARIABLE}=twin")
    missing = _missing_native()
    if missing is None:
        return EngineInfo("native", native.instruction_set(), native.library_path())
    if chosen == "native":
        raise missing
    return EngineInfo("twin", "numpy", None, str(missing.got))


def _bytes_of(artifact: bytes | str | os.PathLike[str] | Artifact | HasBytes) -> bytes:
    if isinstance(artifact, bytes | bytearray | memoryview):
        return bytes(artifact)
    if isinstance(artifact, Artifact):
        return encode_artifact(artifact)
    if isinstance(artifact, HasBytes):
        return artifact.to_bytes()
    return Path(artifact).read_bytes()


def _chosen(engine: str) -> str:
    chosen = os.environ.get(ENGINE_VARIABLE, "auto") if engine == "auto" else engine
    if chosen not in _ENGINES:
        raise RuntimeFault("unknown engine", expected=f"one of {_ENGINES}", got=chosen)
    return chosen


def _machine(artifact: Artifact, data: bytes, engine: str) -> Machine:
    if engine == "twin":
        return TwinMachine(artifact)
    missing = _missing_native()
    if missing is None:
        return native.NativeMachine(artifact, data)
    if engine == "native":
        raise missing
    _warn_once(str(missing.got))
    return TwinMachine(artifact)


def _missing_native() -> RuntimeFault | None:
    """Why the compiled engine cannot be used, or None if it can."""
    try:
        native.instruction_set()
    except (OSError, RuntimeFault) as error:
        return RuntimeFault("the compiled engine is not available", got=error, fix=_HOW_TO_GET_IT)
    return None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        "EVENSONG RUNS WITHOUT ITS COMPILED ENGINE: the NumPy twin gives the same results, many times slower. "
        f"Reason: {reason}. {_HOW_TO_GET_IT}",
        RuntimeWarning,
        stacklevel=4,
    )
