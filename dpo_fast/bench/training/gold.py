"""A training step in float64: its loss, and the clipped gradients of all parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dpo_fast.bench.gate import Errors, Gate
from dpo_fast.bench.training.stepper import CLIP, Loop
from dpo_fast.bench.workload import Row

# Relative errors of the loss and of all gradients together (L2 norm).
SOFT = {
    torch.float32: {"loss": 1e-5, "gradient": 1e-3},
    torch.bfloat16: {"loss": 2e-2, "gradient": 5e-2},
}
HARD = {
    torch.float32: {"loss": 1e-4, "gradient": 1e-2},
    torch.bfloat16: {"loss": 0.2, "gradient": 0.6},
}
Step = tuple[float, Mapping[str, Tensor]]


def training_gate(gold_loop: Loop, rows: list[Row], dtype: torch.dtype) -> Gate:
    """Compares ``(loss, clipped gradients)`` with those of a loop whose models are float64."""
    wide = gold_loop.policy
    loss = gold_loop.loss(rows)
    loss.backward()
    nn.utils.clip_grad_norm_(wide.parameters(), CLIP)
    gold = {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}
    size = sum(float(g.square().sum()) for g in gold.values()) ** 0.5
    right = float(loss.detach())

    def measure(found: Step) -> Errors:
        value, grads = found
        missing = gold.keys() ^ grads.keys()
        if missing:
            raise RuntimeError(f"gradients of {sorted(missing)[:3]} are on one side only")
        off = sum(float((grads[n].double() - g).square().sum()) for n, g in gold.items())
        return {"loss": abs(value - right) / abs(right), "gradient": off**0.5 / size}

    return Gate(measure, SOFT[dtype], HARD[dtype])
