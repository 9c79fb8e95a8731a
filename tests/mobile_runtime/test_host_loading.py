"""``load``: what it takes, which engine it picks, and what it says when that is not the compiled one."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import needs_native
from program_builder import classifier

import evensong.mobile_runtime as runtime
from evensong.mobile_runtime import loading
from evensong.wire.artifact import encode_artifact
from evensong.wire.errors import ArtifactError, CorruptError

ARTIFACT = classifier()
DATA = encode_artifact(ARTIFACT)

PUBLIC_NAMES = {
    "Adam",
    "BudgetError",
    "CheckpointError",
    "CompileError",
    "CompiledArtifact",
    "DivergedError",
    "EngineInfo",
    "Evaluation",
    "ExampleError",
    "Int8Training",
    "KerasModule",
    "LoRA",
    "MemoryReport",
    "OperationTime",
    "PostTrainingInt8",
    "ProgramError",
    "QuantizationAwareTraining",
    "QuantizationReport",
    "RuntimeFault",
    "SGD",
    "Session",
    "StepResult",
    "StructuredPruning",
    "UnsupportedOperation",
    "VariableError",
    "compile",
    "engine_info",
    "load",
    "memory_report",
    "profile",
    "prune_channels",
    "quantization_report",
    "to_onnx",
}


def test_public_names() -> None:
    assert set(runtime.__all__) == PUBLIC_NAMES
    with pytest.raises(AttributeError):
        runtime.nothing  # noqa: B018


class Holder:
    def to_bytes(self) -> bytes:
        return DATA


def test_load_takes_bytes_files_artifacts_and_their_holders(tmp_path: Path) -> None:
    path = tmp_path / "model.evsg"
    path.write_bytes(DATA)
    x = np.ones((1, 4), np.float32)
    sources: list[Any] = [DATA, bytearray(DATA), memoryview(DATA), path, str(path), ARTIFACT, Holder()]
    expected = runtime.load(DATA, engine="twin").predict(x)
    for source in sources:
        session = runtime.load(source, engine="twin")
        np.testing.assert_array_equal(session.predict(x), expected)
        assert session.artifact == ARTIFACT and session.engine == "twin"


def test_damaged_and_foreign_bytes_are_refused() -> None:
    with pytest.raises(CorruptError):
        runtime.load(DATA[:-1])
    with pytest.raises(CorruptError):
        runtime.load(b"PK\x03\x04" + DATA[4:])
    with pytest.raises(ArtifactError, match="another runtime"):
        runtime.load(DATA[:4] + b"\x02" + DATA[5:])


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVENSONG_ENGINE_LIBRARY", str(tmp_path / "missing.so"))
    monkeypatch.delenv(loading.ENGINE_VARIABLE, raising=False)
    loading._warn_once.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_compiled_engine_the_twin_runs_and_says_so_once() -> None:
    with pytest.warns(RuntimeWarning, match="WITHOUT ITS COMPILED ENGINE") as caught:
        session = runtime.load(DATA)
    assert session.engine == "twin"
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.load(DATA)
        runtime.load(DATA, engine="twin")
    info = runtime.engine_info()
    assert (info.engine, info.instruction_set, info.library) == ("twin", "numpy", None)
    assert "missing.so" in info.reason


@pytest.mark.usefixtures("no_library")
def test_a_demanded_engine_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(runtime.RuntimeFault, match="not available"):
        runtime.load(DATA, engine="native")
    monkeypatch.setenv(loading.ENGINE_VARIABLE, "native")
    with pytest.raises(runtime.RuntimeFault, match="not available"):
        runtime.load(DATA)
    with pytest.raises(runtime.RuntimeFault, match="not available"):
        runtime.engine_info()
    assert runtime.load(DATA, engine="twin").engine == "twin"


def test_the_environment_decides_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loading.ENGINE_VARIABLE, "twin")
    assert runtime.load(DATA).engine == "twin"
    assert runtime.engine_info().engine == "twin"
    monkeypatch.setenv(loading.ENGINE_VARIABLE, "abacus")
    with pytest.raises(runtime.RuntimeFault, match="abacus"):
        runtime.load(DATA)


@needs_native
def test_the_compiled_engine_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loading.ENGINE_VARIABLE, raising=False)
    info = runtime.engine_info()
    assert info.engine == "native" and info.library is not None and info.library.exists()
    assert runtime.load(DATA).engine == "native"


def test_importing_and_running_needs_no_torch_and_compile_says_what_to_install() -> None:
    script = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name="torch")
sys.meta_path.insert(0, NoTorch())
import evensong.mobile_runtime as runtime
try:
    runtime.compile
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'compile needs torch: pip install "evensong[compile]"'
