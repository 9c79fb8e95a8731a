"""The public names of evensong.wire are one list, and importing them needs nothing that a device lacks."""

from __future__ import annotations

import subprocess
import sys

import evensong.wire


def test_the_public_names_are_the_documented_ones() -> None:
    assert sorted(evensong.wire.__all__) == evensong.wire.__all__
    for name in evensong.wire.__all__:
        assert getattr(evensong.wire, name).__doc__ or name.isupper() or name == "Layout"


def test_importing_wire_loads_nothing_that_a_device_lacks() -> None:
    heavy = "{'torch', 'flwr', 'sqlalchemy', 'grpc', 'typer', 'rich'}"
    code = f"import sys, evensong.wire; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
