"""Child processes that are never forgotten: watched while they run, always stopped, and quoted when they fail."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from evensong.wire.errors import EvensongError

_TAIL_LINES = 15
_GRACE_S = 5.0
_LEASH = (sys.executable, "-I", "-S", str(Path(__file__).with_name("leash.py")))


class ChildError(EvensongError):
    """A process of the demo ended when it should not have, or did not end when it should have."""


class Children:
    """Processes, each with a log file in ``folder``. Leaving the ``with`` block ends those that still run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts ``arguments`` under ``name``; what it writes goes to ``name.log``.

        It gets a session of its own, so that Ctrl-C reaches only the demo, which then ends its children in order; and
        the kernel ends it should the demo itself be killed.
        """
        with self.log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [*_LEASH, str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def log(self, name: str) -> Path:
        """Where a process writes."""
        return self._folder / f"{name}.log"

    def check(self) -> None:
        """Raises :class:`ChildError` if a process failed; those that ended well are not missed."""
        for name, process in self._processes.items():
            if process.poll() not in (None, 0):
                raise ChildError(f"{name} ended early", got=_reason(process.returncode), fix=self._quote(name))

    def require(self, name: str) -> None:
        """Raises :class:`ChildError` if the process has ended at all."""
        self.check()
        if self._processes[name].poll() is not None:
            raise ChildError(
                f"{name} ended early", got=_reason(self._processes[name].returncode), fix=self._quote(name)
            )

    def running(self) -> list[str]:
        """Names of those that have not ended."""
        return [name for name, process in self._processes.items() if process.poll() is None]

    def wait(self, names: Iterable[str], timeout_s: float) -> None:
        """Until all of ``names`` have ended well; :class:`ChildError` if one fails or the time is up."""
        deadline, names = time.monotonic() + timeout_s, list(names)
        while waiting := [name for name in names if name in self.running()]:
            self.check()
            if time.monotonic() > deadline:
                raise ChildError(
                    f"{', '.join(waiting)} did not end", expected=f"within {timeout_s:g} s", fix=self._quote(waiting[0])
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[waiting[0]].wait(0.1)
        self.check()

    def stop(self) -> None:
        """SIGTERM to all that run, SIGKILL to those that are still there after a while."""
        for name in self.running():
            self._processes[name].terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _quote(self, name: str) -> str:
        """The end of a log, for the error that a person reads."""
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines:
            return "It wrote nothing."
        return "\n".join(["It wrote at the end:", *(f"  {line}" for line in lines[-_TAIL_LINES:])])


def _reason(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
