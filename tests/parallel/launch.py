"""Runs a function of the tests in several gloo processes and gives back what each of them found."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 400  # seconds; the machine may be busy


def run_ranks(target: str, ranks: int, folder: Path, *args: Any, **env: str) -> list[Any]:
    """``module:function(rank, *args)`` on each rank, its result saved and loaded.

    Environment variables of ``env`` are set in all of them. A rank that fails shows its output.
    """
    module, function = target.split(":")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ", ".join(map(repr, args))
    processes = []
    for rank in range(ranks):
        code = (
            f"import torch; from {module} import {function}\n"
            f"found = {function}({rank}, {arguments})\n"
            f"torch.save(found, {str(folder / f'{function}.{rank}')!r})"
        )
        variables = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            **env,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-6000:]}"
    return [torch.load(folder / f"{function}.{rank}", weights_only=False) for rank in range(ranks)]
