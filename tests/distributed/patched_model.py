"""One rank: log-probs and gradients of a patched model whose weights are cut over two ranks, with a
plain loop around DeepSpeed or ``fully_shard`` and no trainer.
"""

from typing import Any

import torch
from torch import Tensor, nn

import dpo_fast
from tests.integrations.test_patch_model import batch, from_logits
from tests.tiny import tiny_model

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def weighted(logps: Tensor) -> Tensor:
    return (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum()


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """Log-probs and gradients by name, of one process and of the ranks."""
    plain = tiny_model()
    expected = from_logits(plain, batch())
    weighted(expected).backward()
    whole = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
    model = dpo_fast.patch_model(tiny_model())
    run = zero3 if spec["engine"] == "zero3" else fsdp2
    logps, grads = run(model)
    return {
        "expected": expected.detach(), "whole": whole, "logps": logps.detach(), "grads": grads,
    }  # fmt: skip


def zero3(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed(dist_backend="gloo")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)
    assert all(p.ds_tensor.ds_numel < p.ds_numel for p in model.parameters())
    logps = engine(**batch(), return_logprobs=True).logps
    engine.backward(weighted(logps))
    return logps, {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()}


def fsdp2(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for p in model.parameters():
        assert isinstance(p, DTensor) and p.to_local().numel() < p.numel()
    logps = model(**batch(), return_logprobs=True).logps
    weighted(logps).backward()
    return logps, {n: p.grad.full_tensor() for n, p in model.named_parameters()}
