"""Checks of every operation's operands, before the first kernel runs."""

from __future__ import annotations

from evensong.wire.program import Artifact


def verify(artifact: Artifact) -> None:
    """Raises :class:`ProgramError` unless every program of ``artifact`` can be run without touching foreign memory."""
