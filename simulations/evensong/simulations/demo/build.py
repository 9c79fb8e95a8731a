"""Builds the artifacts that ship with the demo from the models in this repository, or checks that they are what is
built.

    python -m evensong.simulations.demo.build [--check]

The same source gives the same bytes on every machine, so a difference means that source and artifact are of different
times.
"""

from __future__ import annotations

import sys
from pathlib import Path

from evensong.simulations.demo.scenarios import SCENARIOS

FOLDER = Path(__file__).parent


def main(argv: list[str]) -> int:
    """0: everything is written or identical; 1: ``--check`` found a difference."""
    if argv not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = 0
    for scenario in SCENARIOS.values():
        path, built = FOLDER / f"{scenario.name}.evsg", scenario.compile()
        if not argv:
            built.save(path)
            print(f"{path.name}: {len(built.to_bytes()):,} bytes, SHA-256 {built.hash}")
        elif not path.is_file() or path.read_bytes() != built.to_bytes():
            stale += 1
            print(
                f"{path.name} is not what its source gives; run python -m evensong.simulations.demo.build",
                file=sys.stderr,
            )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
