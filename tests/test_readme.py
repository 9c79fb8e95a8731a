"""The README is run by people; what it names must exist."""

from __future__ import annotations

import ast
import importlib
import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_parse_and_import_what_exists(block: str) -> None:
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        for alias in node.names:
            assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_there_is_one_command_to_run_and_one_to_test() -> None:
    commands = re.findall(r"^pip install .*&&.*$", README, re.MULTILINE)
    assert [command.split("&&")[1].split()[0] for command in commands] == ["evensong", "pytest"]


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_a_device_install_lists_what_it_brings() -> None:
    listed = set(re.search(r"\$ pip list\n(.*?)\n", README)[1].split())  # type: ignore[index]
    direct = {
        re.split(r"[<>=!~; \[]", requirement)[0]
        for requirement in metadata.requires("evensong") or []
        if "extra ==" not in requirement
    }
    assert direct | {"evensong"} <= listed
    assert not listed & {"torch", "flwr", "sqlalchemy", "typer", "rich", "pydantic"}


def test_the_changelog_tells_of_this_version() -> None:
    assert f"## [{metadata.version('evensong')}]" in (ROOT / "CHANGELOG.md").read_text()
