"""Bytes of the collectives of a real step, to hold the weak-scaling model against."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from dpo_fast.models import install_scoring
from tests.layouts.compare import AWKWARD, collators
from tests.parallel.instrument import CountCollectives
from tests.parallel.model_worker import step
from tests.tiny import tiny_model


def volumes() -> dict[str, Any]:
    """``{engine: {operator: [bytes, ...]}}`` of one step of a tiny llama on the ranks there are."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    batch, ref_logps = collators()["padded"](AWKWARD), torch.zeros(2 * len(AWKWARD))
    mesh = init_device_mesh("cpu", (2,))
    sharded = tiny_model("llama").train()
    install_scoring(sharded)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    plain = tiny_model("llama").train()
    install_scoring(plain)
    found = {}
    for name, model in (("fsdp2", sharded), ("ddp", DistributedDataParallel(plain))):
        step(model, batch, ref_logps, [])  # DDP arranges its buckets after the first step
        with CountCollectives() as counter:
            step(model, batch, ref_logps, [])
        found[name] = counter.take()
    layer = sum(p.numel() for p in plain.model.layers[0].parameters())
    layers = len(plain.model.layers)
    total = sum(p.numel() for p in plain.parameters())
    found["params"] = {"layer": layer, "layers": layers, "root": total - layers * layer}
    return found
