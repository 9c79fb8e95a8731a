"""The root of the one exception tree: every error says what was expected, what came, and what to do."""

from __future__ import annotations


class EvensongError(Exception):
    """Base of every exception that evensong raises on purpose.

    ``what`` names the failure; ``expected``, ``got`` and ``fix`` complete the sentence and are kept as attributes, so
    that a program can read them and a log line needs no parsing.
    """

    def __init__(self, what: str, *, expected: object = None, got: object = None, fix: str | None = None) -> None:
        self.what = what
        self.expected = expected
        self.got = got
        self.fix = fix
        sentence = [what]
        if expected is not None:
            sentence.append(f"expected {expected}")
        if got is not None:
            sentence.append(f"got {got}")
        text = "; ".join(sentence)
        super().__init__(f"{text}. {fix}" if fix else text)


class WireError(EvensongError):
    """Bytes that crossed a network or came from a disk are not what their format says."""


class CorruptError(WireError):
    """Truncated, overlong or damaged bytes: a length, a magic number or a checksum does not match."""


class ArtifactError(WireError):
    """An artifact is well framed but its content breaks a rule of ``docs/artifact.md``."""


class UpdateError(WireError):
    """A model update does not fit the layout, the codec or the bounds of its task."""


class SignatureError(WireError):
    """A signature is missing, malformed, or not made by the expected key."""


class UnreachableError(EvensongError):
    """The other side did not answer: network down, deadline passed, server overloaded or draining. Try again later."""
