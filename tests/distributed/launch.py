"""Real ranks: one process each, gloo between them, as torchrun would start them."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 540.0
# `make test` puts DeepSpeed into a folder of its own: where it can be imported, accelerate and TRL
# do so in every process, and it costs seconds.
DEEPSPEED = Path(sys.prefix) / "deepspeed"


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.distributed.launch", worker, json.dumps(spec)]
    logs, processes = [], []
    for rank in range(ranks):
        ours = {"RESULT": str(folder / f"result{rank}.pt")}
        if not alone:
            ours |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        env = {**os.environ, **ours, **_engine_environment(spec)}
        logs.append(folder / f"rank{rank}.log")
        with open(logs[-1], "wb") as out:
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    _wait(processes, logs)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(ranks)]


def _engine_environment(spec: dict[str, Any]) -> dict[str, str]:
    if not spec["engine"].startswith("zero"):
        return {"ACCELERATE_USE_CPU": "true"}
    paths = [str(DEEPSPEED), os.environ.get("PYTHONPATH", "")]
    return {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(paths)}


def _wait(processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
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


def _main() -> None:
    from importlib import import_module

    worker, spec = sys.argv[1], json.loads(sys.argv[2])
    module = import_module(f"tests.distributed.{worker}")
    torch.set_num_threads(1)
    result = module.main(spec, int(os.environ.get("RANK", "0")))
    torch.save(result, os.environ["RESULT"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
