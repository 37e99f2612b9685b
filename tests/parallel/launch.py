"""Runs a function of the tests in several gloo processes and gives back what each of them found."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.nursery import Child, ends, rank_environments


def run_ranks(target: str, ranks: int, folder: Path, *args: Any, **env: str) -> list[Any]:
    """``module:function(rank, *args)`` on each rank, its result saved and loaded.

    Environment variables of ``env`` are set in all of them. A rank that fails shows its output.
    """
    function = target.partition(":")[2]
    results = [str(folder / f"{function}.{rank}") for rank in range(ranks)]
    children = [
        Child(folder / f"{function}.{rank}.txt", _rank, target, rank, result, *args, env=own | env)
        for rank, (result, own) in enumerate(zip(results, rank_environments(ranks), strict=True))
    ]
    codes = ends(children)
    assert codes == [0] * ranks, "\n".join([f"exit codes {codes}", *(c.text() for c in children)])
    return [torch.load(result, weights_only=False) for result in results]


def _rank(target: str, rank: int, result: str, *args: Any) -> None:
    module, function = target.split(":")
    torch.set_num_threads(1)
    torch.save(getattr(import_module(module), function)(rank, *args), result)
