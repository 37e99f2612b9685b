"""Two processes with FSDP2 on gloo: the bits of one process, local shards only, no collective."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from dpo_fast.functional.ema import EmaPlan, make_shadow
from tests.ema.common import assert_same_bits

UPDATES = 3
MODES = ("stochastic", "shadow", "nearest")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo: not in this torch")


def build(seed: int) -> nn.Sequential:
    """Rows that two ranks cannot share evenly, and one that leaves a rank with nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1), nn.Linear(1, 130)).to(torch.bfloat16)


def first_weight(seed: int) -> Tensor:
    return next(build(seed).parameters()).detach()


def train_a_little(policy: nn.Module) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.25)


def average(ref: nn.Module, policy: nn.Module, mode: str) -> EmaPlan:
    refs = dict(ref.named_parameters())
    shadow = make_shadow(refs.values()) if mode == "shadow" else None
    plan = EmaPlan(refs, dict(policy.named_parameters()), shadow=shadow)
    for step in range(UPDATES):
        train_a_little(policy)
        rounding = "stochastic" if mode == "stochastic" else "nearest"
        plan.update_(0.1, rounding=rounding, seed=9, step=step)  # type: ignore[arg-type]
    return plan


def _worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for mode in MODES:
        policy, ref = build(0), build(1)
        for layer in policy:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        fully_shard(ref, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in (*ref.parameters(), *policy.parameters()))
        with CommDebugMode() as communication:
            plan = average(ref, policy, mode)
        assert communication.get_total_counts() == 0
        local = sum(p.to_local().numel() for p in ref.parameters())  # type: ignore[attr-defined]
        assert f" {local} elements" in plan.describe()
        results[mode] = {n: p.full_tensor() for n, p in ref.named_parameters()}  # type: ignore[attr-defined]
    whole = [first_weight(1), first_weight(0)]
    for name, placement in (("columns", Shard(1)), ("replicas", Replicate())):
        ref_column, column = (distribute_tensor(t, mesh, [placement]) for t in whole)
        EmaPlan([ref_column], [column]).update_(0.1)
        results[name] = {"weight": ref_column.full_tensor()}
    wrong = distribute_tensor(whole[0].clone(), mesh, [Shard(0)])
    for policy_tensor, message in ((column, "split differently"), (whole[1], "is not; shard")):
        with pytest.raises(ValueError, match=message):
            EmaPlan([wrong], [policy_tensor])
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_give_the_bits_of_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    results: dict[str, dict[str, Tensor]] = torch.load(tmp_path / "results.pt")
    for mode in MODES:
        policy, ref = build(0), build(1)
        start = [p.detach().clone() for p in ref.parameters()]
        average(ref, policy, mode)
        assert_same_bits(list(results[mode].values()), list(ref.parameters()), mode)
        assert not any(torch.equal(a, b) for a, b in zip(start, ref.parameters(), strict=True))
    expected = first_weight(1)
    EmaPlan([expected], [first_weight(0)]).update_(0.1)
    for name in ("columns", "replicas"):
        assert_same_bits([results[name]["weight"]], [expected], name)
