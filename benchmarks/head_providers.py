"""What benchmarks/head_gpu.py compares: the heads of ``dpo_fast.bench.heads`` on a GPU, the floor
under them, and the parts of our scoring pass.

Legend: N scored tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.bench.case import Step
from dpo_fast.bench.heads.inputs import HeadShape, Inputs
from dpo_fast.bench.heads.inputs import make_inputs as make_rows
from dpo_fast.bench.heads.variants import HEADS, compact, ours

PROMPT_SHARE = 0.4  # of the real tokens; only Liger's padded rows hold prompts


class Shape(NamedTuple):
    """Of a model's head."""

    hidden: int
    vocab: int
    softcap: float | None = None


MODELS = {  # in the order of what the goals name
    "llama-3-8b": Shape(4096, 128256),
    "qwen3-0.6b": Shape(1024, 151936),
    "qwen2.5-7b": Shape(3584, 152064),
    "gemma-2-9b": Shape(3584, 256000, 30.0),
}


def make_inputs(
    model: Shape,
    rows: int,
    pairs: int,
    *,
    frozen: bool,
    online: bool,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """One batch of ``rows`` scored tokens, spread evenly over the sequences."""
    shape = HeadShape(
        rows, model.vocab, model.hidden, pairs, PROMPT_SHARE, model.softcap, frozen, online, dtype
    )
    return make_rows(shape, device)


def gemms(x: Inputs) -> Step:
    """The floor: the GEMMs that the setting needs, at cuBLAS speed, and nothing else."""
    probabilities = torch.randn(x.shape.rows, x.shape.vocab, device=x.hidden.device).to(x.hidden)
    w, h = x.weight.detach(), x.hidden.detach()

    def step() -> list[Tensor]:
        for _ in range(1 + x.shape.online):
            torch.mm(h, w.T, out=probabilities)
        found = [torch.mm(probabilities, w)]
        return found if x.shape.frozen else [*found, torch.mm(probabilities.T, h)]

    return step


def naive(x: Inputs) -> Step:
    """Full logits of the scored rows, log-softmax, gather: without prompts and padding."""
    from dpo_fast.naive import naive_linear_logprobs

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        found = naive_linear_logprobs(hidden, weight, x.target, softcap=x.shape.softcap)
        assert isinstance(found, Tensor)
        return found

    return compact(x, logps_of)


def liger_cross_entropy(x: Inputs) -> Step:
    """Not DPO: cross entropy over the same rows, no reference."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_of = LigerFusedLinearCrossEntropyLoss(softcap=x.shape.softcap)
    leaves = [x.hidden] if x.shape.frozen else [x.hidden, x.weight]
    return lambda: list(torch.autograd.grad(loss_of(x.weight, x.hidden, x.target), leaves))


PROVIDERS: dict[str, Callable[[Inputs], Step]] = {
    "gemms": gemms,
    "ours": partial(ours, backend="triton"),
    "ours-composed": HEADS["dpo_fast per token"],
    "ours-min-memory": partial(ours, backend="triton", mode="min-memory"),
    "trl": HEADS["TRL"],
    "liger-dpo": HEADS["Liger"],
    "liger-ce": liger_cross_entropy,
    "cce": HEADS["cut-cross-entropy"],
    "compiled": HEADS["torch.compile"],
    "naive": naive,
}


def gemm(x: Inputs) -> Step:
    """One GEMM of the logits' size, in the inputs' dtype."""
    out = x.hidden.new_empty(x.shape.rows, x.shape.vocab)
    w, h = x.weight.detach(), x.hidden.detach()
    return lambda: [torch.mm(h, w.T, out=out)]


def scoring(x: Inputs, hidden: Tensor, target: Tensor, *, store: bool, engine: str | None) -> Step:
    """Log-probs, with E kept for the head's gradient or without."""
    from dpo_fast_kernels.ops import run_forward

    wanted = [False, store, False, False, False]
    weight, cap = x.weight.detach(), x.shape.softcap
    return lambda: list(
        run_forward(
            hidden, weight, target, None, None, None, 0.0, cap, 1.0, -100, wanted, False, store,
            engine,
        )
    )  # fmt: skip


def forward_of(x: Inputs, *, store: bool = False, engine: str | None = None) -> Step:
    return scoring(x, x.hidden.detach(), x.target, store=store, engine=engine)


def policy_and_reference(x: Inputs, *, stacked: bool) -> Step:
    """Both models' rows over one weight: one launch or two."""
    hidden, target = x.hidden.detach(), x.target
    if stacked:
        both = torch.cat((hidden, x.ref_hidden))
        return scoring(x, both, torch.cat((target, target)), store=False, engine=None)
    calls = [scoring(x, rows, target, store=False, engine=None) for rows in (hidden, x.ref_hidden)]
    return lambda: [out for call in calls for out in call()]


FORWARD: dict[str, Callable[[Inputs], Step]] = {
    "gemms": gemm,
    "ours": partial(forward_of, store=True),
    "ours-no-store": forward_of,
    "ours-triton": partial(forward_of, store=True, engine="triton"),
    "ours-cublas": partial(forward_of, store=True, engine="cublas"),
    "ours-two-launches": partial(policy_and_reference, stacked=False),
    "ours-one-launch": partial(policy_and_reference, stacked=True),
}
