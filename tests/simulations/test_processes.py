"""Children of the demo: none is forgotten, and one that fails is quoted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evensong.simulations.demo.processes import ChildError, Children

SLEEP = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)",
]


def test_leaving_the_block_ends_them_all_even_the_stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evensong.simulations.demo.processes._GRACE_S", 0.5)
    pids: list[int] = []

    def interrupted() -> None:
        with Children(tmp_path) as children:
            pids.append(_started(children, tmp_path, "mild", SLEEP))
            pids.append(_started(children, tmp_path, "stubborn", STUBBORN))
            assert children.running() == ["mild", "stubborn"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2 and not any(_exists(pid) for pid in pids)


def test_a_failing_child_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.start("fine", [sys.executable, "-c", "pass"])
        children.wait(["fine"], 30)
        children.check()
        children.start("broken", [sys.executable, "-c", "import sys; print('the disk is full'); sys.exit(3)"])
        with pytest.raises(ChildError, match=r"broken ended early; got exit status 3.*\n.*the disk is full"):
            children.wait(["broken"], 30)


def test_a_child_that_is_killed_or_ends_too_soon_is_noticed(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        os.kill(_started(children, tmp_path, "victim", SLEEP), signal.SIGKILL)
        with pytest.raises(ChildError, match="signal SIGKILL"):
            children.wait(["victim"], 30)
    with Children(tmp_path) as children:
        children.start("brief", [sys.executable, "-c", "pass"])
        children.wait(["brief"], 30)
        with pytest.raises(ChildError, match="brief ended early; got exit status 0"):
            children.require("brief")


def test_waiting_ends(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.start("slow", SLEEP)
        with pytest.raises(ChildError, match=r"slow did not end; expected within 0\.2 s"):
            children.wait(["slow"], 0.2)


def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from evensong.simulations.demo.processes import Children\n"
        f"with Children(Path({str(tmp_path)!r})) as children:\n"
        f"    children.start('orphan', {SLEEP!r})\n"
        "    print(children._processes['orphan'].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    _wait_for(lambda: "ready" in (tmp_path / "orphan.log").read_text())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_for(lambda: not _exists(orphan))


def _started(children: Children, folder: Path, name: str, arguments: list[str]) -> int:
    children.start(name, arguments)
    _wait_for(lambda: "ready" in (folder / f"{name}.log").read_text())
    return children._processes[name].pid


def _exists(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _wait_for(condition: object, limit_s: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
