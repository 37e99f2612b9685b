"""Processes that can be killed, and ranks, made cheaply: forked from a server that has imported
everything (8 s of CPU time a process otherwise).
"""

import gc
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.faults.jobs"]
CONTEXT.set_forkserver_preload(PRELOADED)

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

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

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
    """``size`` ranks of a gloo launch, each with the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Child(folder / f"rank{rank}.txt", job, *args, env=env)
        for rank, env in enumerate(rank_environments(size))
    ]


def rank_environments(size: int) -> list[dict[str, str]]:
    """What torchrun would set in each rank of one launch, over a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


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
    gc.freeze()  # accelerate collects before each training: not what was imported
    job(*args)
