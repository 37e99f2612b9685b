"""Real ranks: one process each, gloo between them, as torchrun would start them."""

import atexit
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.nursery import Child, rank_environments

TIMEOUT = 540.0
# `make test` puts DeepSpeed into a folder of its own: where it can be imported, accelerate and TRL
# do so in every process, and it costs seconds.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
_MARK = "DS_ACCELERATOR"  # set where DeepSpeed is found
_helper: subprocess.Popen[str] | None = None


def has_deepspeed() -> bool:
    """Whether launches of ZeRO can run here."""
    return (DEEPSPEED / "deepspeed").is_dir() or find_spec("deepspeed") is not None


def launch(
    ranks: int, worker: str, spec: dict[str, Any], folder: Path, *, alone: bool = False
) -> list[Any]:
    """Run ``tests.distributed.<worker>`` on so many ranks; return what each saved.

    Args:
        alone: a process without a launcher around it.
        worker: a module with ``main(spec, rank) -> Any`` (tensors and plain containers).
        folder: where results and outputs go.

    Raises:
        AssertionError: a rank failed; with the end of its output. The others are stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = [str(folder / f"result{rank}.pt") for rank in range(ranks)]
    zero = spec["engine"].startswith("zero")
    if zero and os.environ.get(_MARK) != "cpu":
        _with_deepspeed([ranks, worker, spec, str(folder)])
        return [torch.load(result) for result in results]
    environments = [{"ACCELERATE_USE_CPU": "true"}] if alone else rank_environments(ranks)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    for result, log, env in zip(results, logs, environments, strict=True):
        if zero:
            del env["ACCELERATE_USE_CPU"]
        processes.append(Child(log, _rank, worker, spec, result, env=env))
    _wait(processes, logs)
    return [torch.load(result) for result in results]


def _with_deepspeed(arguments: list[Any]) -> None:
    """Launch by the helper, which finds DeepSpeed; it is started once a process."""
    global _helper
    if _helper is None:
        paths = [str(DEEPSPEED), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, _MARK: "cpu", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "tests.distributed.deepspeed_helper"]
        _helper = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_helper.kill)
    assert _helper.stdin is not None and _helper.stdout is not None
    print(json.dumps(arguments), file=_helper.stdin, flush=True)
    answer = _helper.stdout.readline()
    assert answer, f"the helper ended with {_helper.wait()}"
    error = json.loads(answer)
    assert not error, error


def _wait(processes: list[Child], logs: list[Path]) -> None:
    """Until all are done, or one has failed."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(process.poll() is None for process in processes):
            failed = [i for i, p in enumerate(processes) if p.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
        if codes != [0] * len(codes):
            worst = next((i for i, code in enumerate(codes) if code not in (None, 0)), 0)
            raise AssertionError(f"exit codes {codes}; rank {worst}:\n{_tail(logs[worst])}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]


def _rank(worker: str, spec: dict[str, Any], result: str) -> None:
    module = import_module(f"tests.distributed.{worker}")
    torch.set_num_threads(1)
    torch.save(module.main(spec, int(os.environ.get("RANK", "0"))), result)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
