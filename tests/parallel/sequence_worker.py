"""One rank of the tests of sequences cut along their positions; each rank also runs them whole.

The batches are cut by torch's ``context_parallel``, which is what accelerate's
``maybe_context_parallel`` runs: head and tail of the rows to one rank, so that causal attention
costs all ranks the same. Its ring attention needs a GPU; here attention gathers keys and values.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from dpo_fast.batch import SHIFT_KEY, TokenPlan, shifted_batch
from dpo_fast.functional import FusedDPOOutput, fused_linear_dpo
from dpo_fast.functional.segments import sum_over_ranks
from dpo_fast.losses import PairStats, build_loss
from dpo_fast.models import Head, forward_scored, install_scoring
from tests.layouts.compare import AWKWARD, collators
from tests.tiny import tiny_model

# name -> (losses, WPO's weights)
LOSSES = {
    "sigmoid": (["sigmoid"], False),
    "sigmoid, wpo": (["sigmoid"], True),
    "sigmoid + sft": (["sigmoid", "sft"], False),
    "ipo": (["ipo"], False),
    "sigmoid_norm, wpo": (["sigmoid_norm"], True),
    "aot": (["aot"], False),
}
POSITIONS: list[Tensor] = []  # [2P, T / 2] of this rank


class _GatherRows(torch.autograd.Function):
    """All ranks' positions one after the other; each rank's gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]


def gathered_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of this rank's positions to those of all ranks."""
    mine = POSITIONS[-1]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    groups = query.shape[1] // key.shape[1]
    k = _GatherRows.apply(key.contiguous()).repeat_interleave(groups, 1)
    v = _GatherRows.apply(value.contiguous()).repeat_interleave(groups, 1)
    scores = query @ k.transpose(2, 3) * kwargs["scaling"]
    later = torch.cat(everyone, 1)[:, None, None, :] > mine[:, None, :, None]
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2), None


def step(model: Any, batch: dict[str, Any], loss: list[str], group: Any, wpo: bool) -> Any:
    plan = TokenPlan.from_batch(batch)
    lens = sum_over_ranks(torch.tensor(plan.seq_lens, dtype=torch.float32), group)
    chosen_len, rejected_len = lens.chunk(2)

    def score(hidden: Tensor, head: Head) -> FusedDPOOutput:
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(hidden.shape[1], generator=generator)
        return fused_linear_dpo(
            hidden,
            head.weight,
            plan.target,
            plan.cu_seqlens,
            ref_hidden=hidden.detach() + 0.2 * noise,
            seq_lens=plan.seq_lens,
            loss=build_loss(loss, beta=0.5, use_weighting=wpo),
            stats=PairStats(chosen_len, rejected_len),
            sequence_group=group,
            **head.kwargs(),
        )

    output = forward_scored(model, batch, score).value
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    names = ("loss", "losses", "logps", "ref_logps", "chosen_rewards", "rejected_rewards")
    return {n: getattr(output, n).detach() for n in names}, grads


def cut_batch(batch: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """This rank's positions, as accelerate cuts them."""
    pad = -batch["input_ids"].shape[1] % (2 * mesh.size())
    fill = {"input_ids": 0, SHIFT_KEY: -100, "position_ids": 511}
    buffers = {
        key: nn.functional.pad(batch[key], (0, pad), value=value) for key, value in fill.items()
    }
    cut = list(buffers.values())
    with context_parallel(mesh, buffers=cut, buffer_seq_dims=[1] * 3, no_restore_buffers=set(cut)):
        pass
    return buffers


def sequence_cells(rank: int) -> dict[str, Any]:
    from transformers import AttentionInterface

    AttentionInterface.register("gathered", gathered_attention)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    batch = collators()["padded"](AWKWARD)
    parts = cut_batch(shifted_batch(batch), mesh)
    POSITIONS.append(parts["position_ids"])
    plain, cut = tiny_model("llama").train(), tiny_model("llama").train()
    cut.set_attn_implementation("gathered")
    for model in (plain, cut):
        install_scoring(model)
    cells = {}
    for name, (loss, wpo) in LOSSES.items():
        found, grads = step(cut, parts, loss, mesh.get_group(), wpo)
        for grad in grads.values():
            dist.all_reduce(grad)
        right, expected = step(plain, batch, loss, None, wpo)
        cells[name] = (found, right, grads, expected)
    plan = TokenPlan.from_batch(parts)
    dist.destroy_process_group()
    return {
        "cells": cells,
        "tokens": plan.num_tokens,
        "whole": TokenPlan.from_batch(batch).num_tokens,
    }
