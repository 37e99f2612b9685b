"""Processes that can be killed, made cheaply: forked from a server that has imported everything."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.jobs"])

PATIENCE = 240.0


class Child:
    """A running process; its output is in ``log``."""

    def __init__(
        self, log: Path, job: Callable[..., None], *args: Any, env: dict[str, str] | None = None
    ) -> None:
        self.log = log
        self._process = CONTEXT.Process(target=_run, args=(str(log), env or {}, job, args))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self, after: float = 0.0) -> None:
        """SIGKILL, as soon as ``after`` seconds have passed or it has ended by itself."""
        self._process.join(after)
        if self._process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit code, negative for signals; a process that hangs fails the test."""
        self._process.join(patience)
        if self._process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {patience:.0f} s:\n{self.text()}")
        return self._process.exitcode

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""


def run(folder: Path, job: Callable[..., None], *args: Any) -> str:
    """Run a job to its end; returns what it printed."""
    child = Child(folder / "log.txt", job, *args)
    assert child.wait() == 0, child.text()
    return child.text()


def launch(folder: Path, size: int, job: Callable[..., None], *args: Any) -> list[Child]:
    """``size`` ranks of a gloo launch."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    children = []
    for rank in range(size):
        env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(Child(folder / f"rank{rank}.txt", job, *args, env=env))
    return children


def ends(children: Sequence[Child]) -> list[int]:
    """Exit codes of all."""
    return [child.wait() for child in children]


def wait_until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Fails if ``condition`` does not come true."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def _run(log: str, env: dict[str, str], job: Callable[..., None], args: tuple[Any, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    job(*args)
