"""Sessions for developers: ``nox --list`` names them."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@nox.session
def tests(session: nox.Session) -> None:
    """The default suite."""
    session.install(".[dev]")
    session.run("pytest", "-n", "auto", *session.posargs, env=QUIET)


@nox.session
def slow(session: nox.Session) -> None:
    """The long tests; real data where EVENSONG_DATA names it."""
    session.install(".[dev]")
    session.run("pytest", "-n", "auto", "-m", "slow", "--timeout", "1500", *session.posargs, env=QUIET)


@nox.session
def lint(session: nox.Session) -> None:
    """Everything that CI checks besides tests."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    listed = session.run("git", "ls-files", "*.c", "*.cpp", "*.hpp", "*.h", external=True, silent=True)
    session.run("clang-format", "--dry-run", "--Werror", *str(listed).split())
    session.run("mypy")
    session.run("lint-imports")
    session.run("python", "protos/generate.py", "--check")


@nox.session
def generate(session: nox.Session) -> None:
    """Regenerates committed files: protobuf code, opcode header, operation table, the demo's artifacts."""
    session.install(".[dev]")
    session.run("python", "protos/generate.py")
    session.run("python", "mobile_runtime/engine/opcodes_header.py")
    session.run("python", "docs/artifact_doc.py")
    session.run("python", "-m", "evensong.simulations.demo.build")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Ratios against peers, measured in the same run: ``nox -s benchmarks -- runtime``."""
    session.install(".[bench]")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["runtime"]), env=QUIET)
