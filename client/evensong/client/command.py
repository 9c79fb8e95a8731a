"""``evensong``: one command whose verbs come from whichever parts are installed.

A part adds a verb through the entry-point group ``evensong.commands``: a name and a ``main(argv) -> int``. Nothing of a
verb is imported before it is called: ``evensong --help`` is quick and works on a device without torch or Flower.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from evensong.client import __version__
from evensong.wire.errors import EvensongError

GROUP = "evensong.commands"
FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130

_OWN = {"device": "evensong.client.device_command:main"}

#: Which extra brings a missing package. What a device needs itself is not here: it is always installed.
_EXTRAS = {
    "torch": "compile",
    "datasets": "simulations",
    "flwr_datasets": "simulations",
    "ray": "simulations",
    "sklearn": "demo",
    "onnx": "bench",
    "onnxruntime": "bench",
    "dp_accounting": "privacy",
    "alembic": "coordinator",
    "flwr": "coordinator",
    "fsspec": "coordinator",
    "grpc_health": "coordinator",
    "grpc_reflection": "coordinator",
    "prometheus_client": "coordinator",
    "pydantic": "coordinator",
    "pydantic_settings": "coordinator",
    "rich": "coordinator",
    "sqlalchemy": "coordinator",
    "structlog": "coordinator",
    "typer": "coordinator",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit codes: the verb's own, 1 failed, 2 wrong use, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = find_verbs()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(verbs))
        return 0 if arguments else WRONG_USE
    if arguments[0] in ("-V", "--version"):
        print(f"evensong {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in verbs:
        return _unknown(verb, verbs)
    return run(verb, verbs[verb], rest)


def find_verbs() -> dict[str, str]:
    """Each verb and where its function is, as ``package.module:function``."""
    return _OWN | {point.name: point.value for point in metadata.entry_points(group=GROUP)}


def run(verb: str, target: str, arguments: list[str]) -> int:
    """Imports and calls one verb; every failure that we foresee is one line."""
    try:
        return int(_load(target)(arguments) or 0)
    except EvensongError as error:
        print(f"evensong {verb}: {error}", file=sys.stderr)
        return FAILED
    except ImportError as error:
        print(f"evensong {verb}: {_missing(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        sys.stderr.close()
        return FAILED


def describe(target: str) -> str:
    """The first line of the docstring of a verb's module, read from its source without importing anything of it."""
    module = target.partition(":")[0]
    try:
        path = _source_of(module)
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else None
    except (OSError, SyntaxError, ValueError, ImportError):
        docstring = None
    return docstring.strip().splitlines()[0] if docstring else ""


def _load(target: str) -> Callable[[list[str]], int | None]:
    module, _, name = target.partition(":")
    function: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), name or "main")
    return function


def _source_of(module: str) -> Path | None:
    """The file of ``a.b.c``, found by a walk over folders: not even ``a`` is imported."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None or not rest:
        return Path(found.origin) if found and found.origin else None
    roots = [(folder, rest) for folder in found.submodule_search_locations or ()]
    if found.origin is None:  # a namespace: an editable install may only know where each of its packages is
        inner = importlib.util.find_spec(f"{top}.{rest[0]}")
        roots += [(folder, rest[1:]) for folder in (inner and inner.submodule_search_locations) or ()]
    for folder, names in roots:
        path = Path(folder, *names)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.exists():
                return candidate
    return None


def _help(verbs: dict[str, str]) -> str:
    width = max(map(len, verbs))
    lines = [
        "usage: evensong VERB ...",
        "",
        "Federated and on-device learning: devices learn where the data lives.",
        "",
        "verbs (each has a --help of its own):",
        *(f"  {verb:<{width}}  {describe(target)}".rstrip() for verb, target in sorted(verbs.items())),
        "",
        "  --version   what is installed",
    ]
    return "\n".join(lines)


def _unknown(verb: str, verbs: dict[str, str]) -> int:
    near = difflib.get_close_matches(verb, verbs, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "`evensong --help` lists the verbs."
    print(f"evensong: there is no verb {verb!r}. {hint}", file=sys.stderr)
    return WRONG_USE


def _missing(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in _EXTRAS:
        return f'this needs {package}, which is not installed: pip install "evensong[{_EXTRAS[package]}]"'
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
