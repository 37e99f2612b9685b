"""The Triton kernels as a backend of the LM head: an adapter, no arithmetic.

Legend: N scored tokens, H hidden, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.backends.shard import VocabShard
from dpo_fast.naive import LinearLogprobs
from dpo_fast_kernels.ops import (
    Flat,
    linear_logprob_bwd,
    linear_logprob_fwd,
    run_backward,
    run_forward,
)
from dpo_fast_kernels.problem import Gradients, padded
from dpo_fast_kernels.scoring import Vocabulary

WORKSPACE = 2**30  # bytes of stored probabilities; more where a trained head's gradient is larger

_NO_TARGET = -(2**31)  # "ignored": no target is
_PLANES = {"entropy": 0, "log_sum_sq_probs": 1, "is_top1": 2, "mean_logit": 3}


class TritonBackend:
    """Probabilities from the GEMM's epilogue (bfloat16), or from cuBLAS logits (other dtypes).

    ``engine`` fixes the way ("triton" or "cublas"); None decides by dtype.
    """

    name = "triton"
    gradients_may_wait = True

    bound: float | None = None  # of the filtered mode (filtered_backend.py)

    def __init__(self, engine: str | None = None) -> None:
        self.engine = engine

    def row_bytes(self, head: LinearHead) -> int:
        vocab, _ = head.weight.shape
        return padded(vocab) * head.weight.element_size()

    def default_workspace(self, head: LinearHead) -> int:
        # Splitting would hold a float32 gradient of the head, which is as large as its numel * 4.
        return WORKSPACE + 4 * head.weight.numel()

    def check(self, hidden: Tensor, head: LinearHead, needs: Needs, store: bool) -> None:
        """Raises ValueError for a call that cannot run; here any can."""

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
        self.check(hidden, head, needs, store)
        a, b, lora_scale = (None, None, 0.0) if head.lora is None else head.lora
        scalars = (lora_scale, head.softcap, head.scale)
        args: Any = (hidden, head.weight, target, head.bias, a, b, *scalars)
        # Every row is scored here, so no target means "ignored".
        args += (_NO_TARGET, list(needs), bool(outputs), store, self.engine)
        args += (self.bound if any(needs) else None, spare)
        plain: Any = partial(run_forward, buffer=buffer, vocabulary=_vocabulary(head.shard))
        opaque = buffer is None and head.shard is None
        flat = Flat(*(linear_logprob_fwd if opaque else plain)(*args))
        found: dict[str, Any] = {name: flat.stats[_PLANES[name]] for name in outputs}
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"] != 0
        result = LinearLogprobs(flat.logps, **found)
        if not any(needs):
            return HeadForward(result, None)
        weight, bias = head.weight, head.bias
        if store or not needs.head:  # then the backward reads their shapes only
            weight, bias = weight.new_empty(1).expand(weight.shape), None
        kept = (hidden, weight, bias, a, b, *flat[1:3], *flat[4:])
        return HeadForward(result, Saved(kept, (needs, scalars, head.shard is not None, spare)))

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        needs, scalars, sharded, spare = saved.meta
        hidden, weight, bias, a, b, state, col, e, g, eb, mask = saved.tensors
        assert hidden is not None and weight is not None and state is not None
        assert col is not None and e is not None and g is not None and eb is not None
        assert mask is not None
        args: Any = (hidden, weight, bias, a, b, *scalars, list(needs), self.engine)
        if into is None and sharded:
            into = HeadGrads()  # float32: what is summed over the ranks is rounded afterwards
        if into is None:
            kept = (state[0], state, col, e, g, eb, mask, dlogps, spare)
            grads = linear_logprob_bwd(*args, *kept)
            return HeadGrads(*(t if asked else None for t, asked in zip(grads, needs, strict=True)))
        flat = Flat(state[0], state, col, state, e, g, eb, mask)
        plain: Any = partial(
            run_backward, saved=flat, dlogps=dlogps, spare=spare, into=Gradients(*into)
        )
        return HeadGrads(*plain(*args))


def _vocabulary(shard: VocabShard | None) -> Vocabulary | None:
    """Where the shard lies, as the kernels' launchers take it."""
    if shard is None:
        return None

    def reduce(tensor: Tensor, operation: str) -> None:
        (shard.max_ if operation == "max" else shard.sum_)(tensor)

    return Vocabulary(_NO_TARGET, shard.start, shard.total, reduce, shard.longest)


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run such inputs on the current device; None if they can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take bfloat16, float16 and float32, not {dtype}"
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < (8, 0):
            return f"the device has compute capability {major}.{minor}, the kernels need 8.0"
        return None
    from triton import knobs

    if device_type == "cpu" and knobs.runtime.interpret:
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None
    return f"the tensors are on {device_type!r}, and the Triton kernels run on CUDA devices"
