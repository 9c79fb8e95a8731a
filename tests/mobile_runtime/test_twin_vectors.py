"""The golden artifacts: both engines give what the vectors say, and the script still makes the same files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_artifact_vectors
import numpy as np
import numpy.typing as npt
import pytest
from engines import ENGINES, assert_close, machine

from evensong.wire.artifact import decode_artifact, encode_artifact

artifact_doc = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "docs" / "artifact_doc.py")))

VECTORS = sorted(make_artifact_vectors.VECTORS.glob("*.evsg"))


def test_the_script_makes_these_files() -> None:
    made = make_artifact_vectors.vectors()
    assert {path.stem for path in VECTORS} == made.keys()
    for path in VECTORS:
        assert path.read_bytes() == encode_artifact(made[path.stem][1]), path.name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_engine_gives_the_expected_values(path: Path, engine: str) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    artifact = decode_artifact(path.read_bytes())
    names = [program.name for program in artifact.programs]
    engine_under_test = machine(engine, path.read_bytes())
    for number, run in enumerate(expected["runs"]):
        outputs = [np.empty_like(_array(o)) for o in run["outputs"]]
        engine_under_test.run(
            names.index(run["program"]),
            run["batch"],
            [_array(i) for i in run["inputs"]],
            outputs,
            learning_rate=run["learning_rate"],
            step=run["step"],
            seed=run["seed"],
        )
        for output, wanted in zip(outputs, run["outputs"], strict=True):
            assert_close(output, _array(wanted), what=f"run {number}")
    for region in ("state", "slots"):
        memory = getattr(engine_under_test, region).view(np.float32)
        assert_close(memory, np.array(expected[f"{region}_float32"], np.float32), what=region)


def _array(described: dict[str, Any]) -> npt.NDArray[Any]:
    return np.array(described["data"], described["dtype"]).reshape(described["shape"])


def test_the_document_is_current() -> None:
    text = artifact_doc.DOCUMENT.read_text()
    assert artifact_doc.filled_in(text) == text, "run python docs/artifact_doc.py"


def test_the_annotation_covers_every_byte() -> None:
    for path in VECTORS:
        data = path.read_bytes()
        end = 0
        for offset, length, _ in artifact_doc._fields(data):
            assert offset == end, path.name
            end += length
        assert end == len(data), path.name
