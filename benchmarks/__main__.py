"""``python -m benchmarks NAME [--json FILE] [--only PATTERN]``: prints a table and writes its rows as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from benchmarks.harness import Row, format_table

NAMES = ("runtime", "coordinator", "secagg", "pruning", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="run only rows whose name fits this shell pattern"
    )
    arguments = parser.parse_args()
    rows: list[Row] = []
    for row in importlib.import_module(f"benchmarks.{arguments.name}").run(arguments.only):
        print(row, flush=True)
        rows.append(row)
    print("\n" + format_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
