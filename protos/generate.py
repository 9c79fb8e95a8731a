"""Regenerates the committed protobuf code: ``python protos/generate.py [--check]``.

Needs the grpcio-tools that the extra ``dev`` pins: another release writes other code.
"""

from __future__ import annotations

import filecmp
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parent
PACKAGE = Path("evensong/v1")


def generate(output: Path) -> None:
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).glob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={output}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *sources]):
        raise SystemExit("protoc failed")
    for path in (output / PACKAGE).glob("*_pb2_grpc.py"):
        if "class " not in path.read_text().split("# This class is part of an EXPERIMENTAL API.")[0]:
            path.unlink()  # a file of messages only


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        made = {path.name for path in (fresh / PACKAGE).iterdir()}
        if "--check" not in sys.argv:
            for name in made:
                shutil.copy(fresh / PACKAGE / name, ROOT / PACKAGE / name)
            return 0
        committed = {path.name for pattern in ("*_pb2*.py", "*_pb2.pyi") for path in (ROOT / PACKAGE).glob(pattern)}
        stale = made ^ committed
        stale |= {
            n for n in made & committed if not filecmp.cmp(fresh / PACKAGE / n, ROOT / PACKAGE / n, shallow=False)
        }
        for name in sorted(stale):
            print(f"{PACKAGE / name} is not what the .proto files give: run python protos/generate.py", file=sys.stderr)
        return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
