"""The naive twin as a backend: full logits, autograd's own backward; by name only."""

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.naive import HeadLoRA, LinearLogprobs, naive_linear_logprobs


def _run(
    hidden: Tensor, head: LinearHead, target: Tensor, outputs: tuple[str, ...]
) -> LinearLogprobs:
    out = naive_linear_logprobs(
        hidden,
        head.weight,
        target,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.scale,
        lora=head.lora,
        outputs=outputs,
    )
    return out if isinstance(out, LinearLogprobs) else LinearLogprobs(out)


class NaiveBackend:
    """Full ``[N, V]`` logits; the backward runs the forward once more, under autograd."""

    name = "naive"
    gradients_may_wait = False

    def row_bytes(self, head: LinearHead) -> int:
        return 8 * head.weight.shape[0]

    def default_workspace(self, head: LinearHead) -> int:
        return 2**62  # nothing to plan: it always holds everything

    def forward(
        self,
        hidden: Tensor,
        head: LinearHead,
        target: Tensor,
        *,
        needs: Needs,
        outputs: tuple[str, ...],
        store: bool,
        buffer: Tensor | None = None,
        spare: int = 0,
    ) -> HeadForward:
        result = _run(hidden, head, target, outputs)
        if not any(needs):
            return HeadForward(result, None)
        lora = head.lora or (None, None, 0.0)
        tensors = (hidden, head.weight, head.bias, lora[0], lora[1], target)
        return HeadForward(result, Saved(tensors, (needs, head.softcap, head.scale, lora[2])))

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        needs, softcap, scale, lora_scale = saved.meta
        inputs = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(saved.tensors[:5], needs, strict=True)
        ]
        hidden, weight, bias, a, b = inputs
        target = saved.tensors[5]
        assert hidden is not None and weight is not None and target is not None
        lora = HeadLoRA(a, b, lora_scale) if a is not None and b is not None else None
        with torch.enable_grad():
            head = LinearHead(weight, bias, softcap, scale, lora)
            logps = _run(hidden, head, target, ()).logps
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(logps, leaves, dlogps.to(logps.dtype)))
        wide = logps.dtype
        found = [
            next(grads).to(wide) if t is not None and t.requires_grad else None for t in inputs
        ]
        if into is not None:
            for i, total in enumerate(into[1:], start=1):
                new = found[i]
                if total is not None and new is not None:
                    found[i] = total.add_(new)
        return HeadGrads(*found)
