"""One rank of the tests of a vocabulary split over processes; each rank also computes it whole."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.functional import (
    HeadLoRA,
    VocabShard,
    fused_linear_dpo,
    linear_logprobs,
    sequence_logprobs,
)
from dpo_fast.losses import build_loss

ROWS, WIDTH = 37, 16
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven": {"vocab": 61},
    "odd split": {"vocab": 61, "split": 17},
    "bias, scale": {"bias": True, "logit_scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 3.0, "bias": True},
    "adapter": {"rank": 3},
    "adapter, softcap": {"rank": 3, "softcap": 3.0, "vocab": 61},
    "off range": {"magnify": 60.0},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "computed again": {"mode": "min-memory", "bias": True, "rank": 3, "softcap": 3.0},
    "frozen head": {"frozen": True},
    "ignored rows": {"ignore": True},
    "no rows": {"rows": 0},
    "a shard of -inf": {"masked": True, "bias": True},
}


def inputs(
    *,
    vocab: int = 64,
    bias: bool = False,
    rank: int = 0,
    magnify: float = 1.0,
    dtype: torch.dtype = torch.float32,
    ignore: bool = False,
    rows: int = ROWS,
    masked: bool = False,
    frozen: bool = False,
    **_: Any,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    hidden, weight = randn(rows, WIDTH), randn(vocab, WIDTH)
    target = torch.randint(vocab, (rows,), generator=g)
    if rows:
        target[:4] = torch.tensor([0, vocab // 2 - 1, vocab // 2, vocab - 1])
        hidden[:8] *= magnify
        hidden[9] = 3 * weight[target[9]]  # a confident row
        weight[5] = weight[vocab - 4] = weight[target[8]]  # ties across the shards
    if ignore:
        target[::5] = -100
    found: dict[str, Any] = {"hidden": hidden, "weight": weight, "target": target}
    if bias:
        found["bias"] = randn(vocab)
        if masked:
            found["bias"][vocab // 2 :] = -torch.inf
            found["target"] %= vocab // 2
    if rank:
        found["lora_a"], found["lora_b"] = randn(rank, WIDTH), randn(vocab, rank)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            tensor.requires_grad_(not frozen or name == "hidden")
    return found


def score(found: dict[str, Any], options: dict[str, Any], dlogps: Tensor) -> dict[str, Tensor]:
    """Log-probs, statistics and gradients of all leaves."""
    leaves = {k: t for k, t in found.items() if isinstance(t, Tensor) and t.requires_grad}
    lora = None
    if "lora_a" in found:
        lora = HeadLoRA(found["lora_a"], found["lora_b"], 0.5)
    result: Any = linear_logprobs(
        found["hidden"],
        found["weight"],
        found["target"],
        bias=found.get("bias"),
        lora=lora,
        outputs=STATS,
        **options,
    )
    grads = torch.autograd.grad(result.logps, list(leaves.values()), dlogps.to(result.logps.dtype))
    values = {name: value.detach() for name, value in result._asdict().items()}
    return values | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}


def shard_of(found: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """This rank's leaves."""
    cut = {"weight", "bias", "lora_b"}
    return {
        name: (t[start:stop] if name in cut else t).detach().clone().requires_grad_(t.requires_grad)
        for name, t in found.items()
    }


def check_case(rank: int, case: dict[str, Any], backend: str = "auto") -> dict[str, Any]:
    whole = inputs(**case)
    vocab = whole["weight"].shape[0]
    split = case.get("split", -(-vocab // 2))
    start, stop = (0, split) if rank == 0 else (split, vocab)
    keys = ("softcap", "logit_scale", "temperature", "mode")
    options = {k: case[k] for k in keys if k in case}
    dlogps = torch.linspace(-1, 1.5, whole["hidden"].shape[0])
    right = score(whole, options, dlogps)
    group: Any = VocabShard.even(dist.group.WORLD, vocab)
    if "split" in case:
        group = dist.group.WORLD  # the ranks tell each other
    options |= {"group": group, "backend": backend}
    found = score(shard_of(whole, start, stop), options, dlogps)
    for key in ("d weight", "d bias", "d lora_b"):
        if key in right:
            right[key] = right[key][start:stop]
    return {"found": found, "right": right}


def fused(found: dict[str, Any], group: Any, mode: str | None, workspace: int | None) -> Any:
    lens = [3, 9, 2, 5, 4, 7, 1, 6]
    assert sum(lens) == ROWS
    cu = torch.tensor([0, *lens]).cumsum(0)
    g = torch.Generator().manual_seed(5)
    ref_hidden = found["hidden"].detach() + 0.3 * torch.randn(ROWS, WIDTH, generator=g)
    output = fused_linear_dpo(
        found["hidden"],
        found["weight"],
        found["target"],
        cu,
        ref_hidden=ref_hidden,
        ref_weight=found["weight"].detach() * 0.9,
        loss=build_loss("sigmoid", beta=0.5),
        seq_lens=lens,
        outputs=("entropy",),
        group=group,
        mode=mode,
        workspace=workspace,
    )
    grads = torch.autograd.grad(3.0 * output.loss, [found["hidden"], found["weight"]])
    assert output.ref_logps is not None and output.token_stats is not None
    entropy = output.token_stats.entropy
    assert entropy is not None
    return {
        "loss": output.loss.detach(),
        "logps": output.logps,
        "ref_logps": output.ref_logps,
        "entropy": entropy,
        "d hidden": grads[0],
        "d weight": grads[1],
    }


def counted(rank: int) -> list[int]:
    """Numbers in each all-reduce of a forward and a backward, in order."""
    sizes: list[int] = []
    plain = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    whole = inputs()
    own = shard_of(whole, 32 * rank, 32 * rank + 32)
    dist.all_reduce = counting
    try:
        cu = torch.tensor([0, 20, ROWS])
        group = VocabShard.even(dist.group.WORLD, 64)
        sequence_logprobs(
            own["hidden"], own["weight"], own["target"], cu, group=group
        ).sum().backward()
    finally:
        dist.all_reduce = plain
    return sizes


def vocab_cells(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    cells = {name: check_case(rank, case) for name, case in CASES.items()}
    for mode, workspace in ((None, None), ("min-memory", None), (None, 12 * 32 * 4), ("store", 1)):
        whole = inputs()
        own = shard_of(whole, 32 * rank, 32 * rank + 32)
        right = fused(whole, None, mode, workspace)
        right["d weight"] = right["d weight"][32 * rank : 32 * rank + 32]
        group = VocabShard.even(dist.group.WORLD, 64)
        found = fused(own, group, mode, workspace)
        cells[f"fused {mode} {workspace}"] = {"found": found, "right": right}
    sizes = counted(rank)
    dist.destroy_process_group()
    return {"cells": cells, "sizes": sizes}


KERNEL_CASES = ("uneven", "adapter, softcap", "computed again", "frozen head", "ignored rows")


def kernel_cells(rank: int) -> dict[str, Any]:
    """The Triton kernels in their interpreter (TRITON_INTERPRET=1), float32."""
    dist.init_process_group("gloo")
    found = {name: check_case(rank, CASES[name], "triton") for name in KERNEL_CASES}
    dist.destroy_process_group()
    return {"cells": found}
