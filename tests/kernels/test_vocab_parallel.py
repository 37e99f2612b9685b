"""A vocabulary split over two processes equals one process: values, gradients, off-range rows."""

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.kernels.support import interpreted

pytestmark = interpreted

ROWS, WIDTH, VOCAB, SPLIT = 21, 16, 61, 27


def _inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g)
    target = torch.randint(VOCAB, (ROWS,), generator=g)
    target[:4] = torch.tensor([0, SPLIT - 1, SPLIT, VOCAB - 1])
    hidden[:6] *= 60.0  # off range, in both shards
    weight[5] = weight[40] = weight[target[8]]  # ties across the shards
    return hidden, weight, target


def _run(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, engine: str, vocabulary: Any
) -> tuple[torch.Tensor, ...]:
    from dpo_fast_kernels.head import backward, forward
    from dpo_fast_kernels.problem import Wanted, make_problem

    wanted = Wanted(True, True)
    problem = make_problem(
        hidden, weight, None, None, 300.0, 0.9, stats=True, engine=engine, e_dtype=torch.bfloat16
    )
    held = forward(problem, target, wanted=wanted, stats=True, store=True, vocabulary=vocabulary)
    dlogps = torch.linspace(-1, 1, ROWS)
    grads = backward(problem, held, dlogps, wanted)
    assert grads.hidden is not None and grads.weight is not None
    stats = held.scored.state.stats
    assert stats is not None
    return held.scored.state.logps, stats, grads.hidden.float(), grads.weight.float()


def _worker(rank: int, port: int, engine: str, path: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from dpo_fast_kernels.scoring import Vocabulary

    def reduce(tensor: torch.Tensor, operation: str) -> None:
        op = dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM
        dist.all_reduce(tensor, op)

    hidden, weight, target = _inputs()
    start = rank * SPLIT
    shard = weight[start : SPLIT if rank == 0 else VOCAB]
    logps, stats, dhidden, dweight = _run(
        hidden, shard, target, engine, Vocabulary(-100, start, VOCAB, reduce)
    )
    dist.all_reduce(dhidden)
    torch.save((logps, stats, dhidden, dweight), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_two_processes_equal_one(engine, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port, engine, str(tmp_path)), nprocs=2)
    from dpo_fast_kernels.scoring import Vocabulary

    logps, stats, dhidden, dweight = _run(*_inputs(), engine, Vocabulary())
    assert (logps < -85).sum() > 2
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part[0], logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part[1], stats, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(parts[0][0], parts[1][0], rtol=0, atol=0)
    both = torch.cat((parts[0][3], parts[1][3]))
    for found, right in ((parts[0][2], dhidden), (both, dweight)):
        assert (found - right).norm() <= 3e-3 * right.norm()
