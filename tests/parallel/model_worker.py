"""One rank of the tests of a tensor-parallel model; each rank also runs the model whole."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo_fast.backends.shard import VocabShard
from dpo_fast.batch import TokenPlan
from dpo_fast.functional import FusedDPOOutput, fused_linear_dpo
from dpo_fast.losses import PairStats, build_loss
from dpo_fast.models import Head, check_head, forward_scored, install_scoring
from tests.layouts.compare import AWKWARD, collators
from tests.tiny import tiny_model
from tests.trainer.parity import perturbed


def by_transformers(model: Any, mesh: DeviceMesh) -> Any:
    """What ``from_pretrained(..., tp_plan="auto")`` does once the weights are there."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = model._expand_parallel_plan(model.tp_plan)
    if model.config.tie_word_embeddings:
        del plan["lm_head.weight"]
    model = apply_tensor_parallelism(model, mesh, plan)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


def by_torch(model: Any, mesh: DeviceMesh) -> Any:
    """torch's own ``parallelize_module``, the head's logits left sharded."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    }
    for i in range(len(model.model.layers)):
        layer = f"model.layers.{i}"
        plan |= {f"{layer}.self_attn.{n}_proj": ColwiseParallel() for n in "qkv"}
        plan |= {f"{layer}.mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")}
        plan |= {f"{layer}.self_attn.o_proj": RowwiseParallel()}
        plan |= {f"{layer}.mlp.down_proj": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def sequence_parallel(model: Any, mesh: DeviceMesh) -> Any:
    """The same with the last norm's output left as ``Shard(1)``: the head must gather it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import PrepareModuleOutput, parallelize_module

    model = by_torch(model, mesh)
    last = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=False
    )
    return parallelize_module(model, mesh, {"model.norm": last})


def step(model: Any, batch: dict[str, Any], ref_logps: Tensor | None, seen: list[Any]) -> Any:
    """Loss and gradients of one batch."""
    plan = TokenPlan.from_batch(batch)
    chosen_len, rejected_len = plan.pair_lengths()

    def score(hidden: Tensor, head: Head) -> FusedDPOOutput:
        seen.append((tuple(head.weight.shape), head.shard is not None))
        return fused_linear_dpo(
            hidden,
            head.weight,
            plan.target,
            plan.cu_seqlens,
            ref_logps=ref_logps,
            seq_lens=plan.seq_lens,
            loss=build_loss(["sigmoid", "sft"], beta=0.5),
            stats=PairStats(chosen_len, rejected_len),
            outputs=("entropy", "is_top1"),
            **head.kwargs(),
        )

    output = forward_scored(model, batch, score).value
    output.loss.backward()
    return output


def reference_logps(model: Any, batch: dict[str, Any]) -> Tensor:
    from dpo_fast.reference.frozen import FrozenReference

    return FrozenReference(model, tiny_model("gemma2", vocab_size=model.config.vocab_size)).logps(
        batch
    )


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def cell(family: str, parallelize: Callable[..., Any], mesh: DeviceMesh, **config: Any) -> Any:
    batch = collators()["padded"](AWKWARD)
    plain = tiny_model(family, **config).train()
    install_scoring(plain)
    ref_logps = torch.linspace(-40, -20, 2 * len(AWKWARD))
    seen: list[Any] = []
    right = step(plain, batch, ref_logps, seen)
    split = parallelize(tiny_model(family, **config).train(), mesh)
    install_scoring(split)
    difference = check_head(split)
    found = step(split, batch, ref_logps, seen)
    grads = {n: whole(p.grad) for n, p in split.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    numel = {
        n: (p.to_local().numel(), p.numel())
        for n, p in split.named_parameters()
        if hasattr(p, "to_local")
    }
    values = ("loss", "losses", "logps", "chosen_rewards")
    return {
        "found": {n: getattr(found, n).detach() for n in values} | {
            "entropy": found.token_stats.entropy, "top1": found.token_stats.is_top1.float()
        },
        "right": {n: getattr(right, n).detach() for n in values} | {
            "entropy": right.token_stats.entropy, "top1": right.token_stats.is_top1.float()
        },
        "grads": grads,
        "expected": expected,
        "numel": numel,
        "seen": seen,
        "check_head": difference,
    }  # fmt: skip


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """Messages for heads that cannot be scored."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    from dpo_fast.models.head import head_of
    from dpo_fast.models.tensor_parallel import local_head

    def message(model: nn.Module) -> str:
        try:
            local_head(head_of(model), model)
        except ValueError as error:
            return str(error)
        return ""

    rows = tiny_model("llama")
    rows.lm_head.weight = nn.Parameter(distribute_tensor(rows.lm_head.weight, mesh, [Shard(1)]))
    sharded = tiny_model("llama")
    fully_shard(sharded)
    return {"rowwise": message(rows), "fsdp": message(sharded)}


def frozen_reference(mesh: DeviceMesh) -> tuple[list[Tensor], Tensor, str]:
    """Log-probs of frozen references that are split, those of the same one whole, and why a copy
    was refused.
    """
    from dpo_fast.reference.frozen import FrozenReference

    batch = collators()["padded"](AWKWARD)
    policy = tiny_model("llama")
    model = perturbed(policy)
    right = FrozenReference(copy.deepcopy(model), policy).logps(batch)
    split = by_transformers(copy.deepcopy(model), mesh)
    found = [FrozenReference(split, policy).logps(batch)]
    try:
        FrozenReference.copy_of(split)
    except ValueError as error:
        message = str(error)
    policy = by_torch(model, mesh)
    reference = FrozenReference.copy_of(policy)
    with torch.no_grad():
        for param in policy.parameters():
            param.mul_(1.5)
    found.append(reference.logps(batch))
    return found, right, message


def whole_bias_and_adapter(mesh: DeviceMesh) -> dict[str, Any]:
    """A split weight beside a bias and an adapter that every rank holds whole: their gradients."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from dpo_fast.functional import HeadLoRA, linear_logprobs
    from dpo_fast.models.tensor_parallel import local_head

    g = torch.Generator().manual_seed(4)
    hidden, weight, bias, a, b = (
        torch.randn(*shape, generator=g) for shape in ((9, 8), (31, 8), (31,), (2, 8), (31, 2))
    )
    target = torch.randint(31, (9,), generator=g)
    dlogps = torch.linspace(-1, 1, 9)
    found = []
    for split in (False, True):
        leaves = [t.clone().requires_grad_() for t in (bias, a, b)]
        w: Any = distribute_tensor(weight, mesh, [Shard(0)]) if split else weight
        head = Head(w, leaves[0], lora=HeadLoRA(leaves[1], leaves[2], 0.5))
        if split:
            head = local_head(head, nn.Module())
        logps = linear_logprobs(hidden, head.weight, target, **head.kwargs())
        found.append([logps.detach(), *torch.autograd.grad(logps, leaves, dlogps)])
    return {"right": found[0], "found": found[1]}


def model_cells(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    unnamed = init_device_mesh("cpu", (2,))
    found = {
        "llama, transformers": cell("llama", by_transformers, mesh),
        "llama, tied, transformers": cell("llama", by_transformers, mesh, tie_word_embeddings=True),
        "llama, torch": cell("llama", by_torch, unnamed),
        "llama, sequence parallel norm": cell("llama", sequence_parallel, unnamed),
        "gemma2, transformers": cell("gemma2", by_transformers, mesh),
        "uneven vocabulary": cell("llama", by_torch, mesh, vocab_size=321),
    }
    found["refusals"] = refusals(unnamed)
    found["whole beside split"] = whole_bias_and_adapter(unnamed)
    found["frozen"] = frozen_reference(mesh)
    from tests.parallel.volume_worker import volumes

    found["volumes"] = volumes()
    assert VocabShard.even(mesh.get_group(), 321).start == 161 * rank
    dist.destroy_process_group()
    return found
