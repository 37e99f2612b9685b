"""The compiled LM head of the CPU: GEMMs and softmax in one walk over the vocabulary (csrc/head.h).

Legend: N scored tokens, H hidden, V vocabulary, r rank of the head's adapter.

An adapter is a second pair of factors: logits are ``[x | s x A^T] [W | B]^T``, so that every
product of the head serves it too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.adapter_grad import lora_a_grad
from dpo_fast.backends.compiled import compiled
from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.backends.scratch import scratch
from dpo_fast.naive import HeadLoRA, LinearLogprobs

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_COLUMNS = (  # of the compiled head's results
    *("logps", "shift", "rest", "total"),
    *("entropy", "mean_logit", "is_top1", "log_sum_sq_probs"),
    "slope",
)
WORKSPACE_BYTES = 64 * 2**20


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the compiled head cannot run such inputs here; None if it can."""
    if device_type != "cpu":
        return f"the tensors are on {device_type!r}, and it runs on the CPU"
    if dtype not in _TYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    module = compiled()
    if module is None:
        return "the compiled module dpo_fast._C is missing (`dpo-fast doctor`)"
    if not module.head_isas():
        return "this processor has neither AVX-512 nor AVX2"
    return None


class _Kept(NamedTuple):
    """Tensors for the backward; None where it does without."""

    row_scale: Tensor  # [N]: -scale / S
    dx: Tensor | None = None  # [N, H], unscaled
    eb: Tensor | None = None  # [N, r], unscaled
    columns: Tensor | None = None  # [9, N]
    target: Tensor | None = None
    memory: Tensor | None = None  # uint8: stored probabilities
    hidden: Tensor | None = None
    lora_a: Tensor | None = None
    weight: Tensor | None = None  # this and what follows: to compute probabilities again
    bias: Tensor | None = None
    lora_b: Tensor | None = None


class _Meta(NamedTuple):
    needs: Needs
    softcap: float | None
    scale: float
    lora_scale: float
    vocab: int


class CpuBackend:
    """See the module's text. A row's log-prob depends on that row alone, bit for bit."""

    name = "cpu"
    gradients_may_wait = False

    def __init__(self, isa: str = "auto") -> None:
        module = compiled()
        assert module is not None, "refusal() was not asked"
        self._c: Any = module
        self._isa = isa

    def row_bytes(self, head: LinearHead) -> int:
        tiles = -(-head.weight.shape[0] // self._c.head_tile)
        return 4 * tiles * (self._c.head_tile + 1)

    def default_workspace(self, head: LinearHead) -> int:
        # The gradient of a trained head occupies as much anyway.
        return max(WORKSPACE_BYTES, 4 * head.weight.numel())

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
        x = hidden.float().contiguous()
        lora = head.lora
        xa = None if lora is None else torch.mm(x, lora.a.float().t()).mul_(lora.scale)
        dx = torch.empty_like(x) if needs.hidden else None
        eb = torch.empty_like(xa) if xa is not None and (needs.hidden or needs.lora_a) else None
        target = target.contiguous()
        call = _Call(self._c, self._isa, x, target, head)
        call.add(head.weight, x, dx=dx)
        if lora is not None and xa is not None:
            call.add(lora.b, xa, dx=eb)
        memory = None
        if store and needs.head:
            size = call.head.stored_bytes()
            memory = x.new_empty(size, dtype=torch.uint8) if buffer is None else buffer
        columns = call.forward(memory, statistics=bool(outputs))
        result = self._result(columns, outputs, call)
        if not any(needs):
            return HeadForward(result, None)
        if dx is not None and eb is not None and lora is not None:
            dx.addmm_(eb, lora.a.float(), alpha=lora.scale)
        kept = _Kept(columns[3].reciprocal().mul_(-head.scale), dx=dx)
        if needs.lora_a:
            kept = kept._replace(eb=eb)
        if needs.head or needs.lora_a:
            kept = kept._replace(hidden=hidden, lora_a=None if lora is None else lora.a)
        if needs.head:
            kept = kept._replace(columns=columns, target=target, memory=memory)
            if memory is None:
                b = None if lora is None else lora.b
                kept = kept._replace(weight=head.weight, bias=head.bias, lora_b=b)
        lora_scale = 0.0 if lora is None else lora.scale
        meta = _Meta(needs, head.softcap, head.scale, lora_scale, head.weight.shape[0])
        return HeadForward(result, Saved(tuple(kept), meta))

    def _result(self, columns: Tensor, outputs: tuple[str, ...], call: "_Call") -> LinearLogprobs:
        by_name = dict(zip(_COLUMNS, columns.unbind(), strict=True))
        stats = {name: by_name[name].clone() for name in outputs}
        if "is_top1" in stats:
            top1 = stats["is_top1"] != 0
            odd = ~(by_name["total"].isfinite() & by_name["shift"].isfinite())
            if bool(odd.any()):  # NaN or infinite logits: the order of the tiles knows no NaN
                top1[odd] = call.argmax_is_target(odd)
            stats["is_top1"] = top1
        return LinearLogprobs(by_name["logps"].clone(), **stats)

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        kept, meta = _Kept(*saved.tensors), saved.meta  # type: ignore[arg-type]
        needs: Needs = meta.needs
        v = kept.row_scale * dlogps
        grads = HeadGrads()
        if kept.dx is not None:
            grads = grads._replace(hidden=v.unsqueeze(1) * kept.dx)
        if kept.hidden is None:
            return grads
        x = kept.hidden.float().contiguous()
        if kept.eb is not None:
            grads = grads._replace(lora_a=lora_a_grad(v, kept.eb, x, meta.lora_scale, into))
        if not needs.head:
            return grads
        return self._head_grads(kept, meta, x, v, into or HeadGrads(), grads)

    def _head_grads(
        self, kept: _Kept, meta: _Meta, x: Tensor, v: Tensor, into: HeadGrads, grads: HeadGrads
    ) -> HeadGrads:
        """dW, db and dB, written into new tensors or added to those of ``into``."""
        assert kept.columns is not None and kept.target is not None
        needs: Needs = meta.needs
        accumulate = any(t is not None for t in (into.weight, into.bias, into.lora_b))
        weight, bias, lora_b = into.weight, into.bias, into.lora_b
        # without rows nothing is written
        new = torch.empty if len(x) and not accumulate else torch.zeros
        if needs.weight and weight is None:
            weight = new(meta.vocab, x.shape[1])
        if needs.bias and bias is None:
            bias = new(meta.vocab)
        lora = None
        if kept.lora_a is not None:
            xa = torch.mm(x, kept.lora_a.float().t()).mul_(meta.lora_scale)
            if needs.lora_b and lora_b is None:
                lora_b = new(meta.vocab, xa.shape[1])
            b = kept.lora_b if kept.lora_b is not None else xa  # not read: stored
            lora = HeadLoRA(kept.lora_a, b, meta.lora_scale)
        again = kept.weight if kept.weight is not None else x
        head = LinearHead(again, kept.bias, meta.softcap, meta.scale, lora)
        call = _Call(self._c, self._isa, x, kept.target, head, vocab=meta.vocab)
        call.add(again, x, grad=weight)
        if lora is not None:
            call.add(lora.b, xa, grad=lora_b)
        call.backward(v, kept.columns, kept.memory, bias, accumulate)
        return grads._replace(weight=weight, bias=bias, lora_b=lora_b)


class _Call:
    """One ``_C.Head``: addresses for the compiled code, tensors kept alive meanwhile."""

    def __init__(
        self,
        module: Any,
        isa: str,
        x: Tensor,
        target: Tensor,
        head: LinearHead,
        vocab: int | None = None,
    ) -> None:
        bias = None if head.bias is None else head.bias.float().contiguous()
        self.x, self.target, self.linear = x, target, head
        self.held: list[Tensor | None] = [x, target, bias]
        self.head = module.Head(
            rows=x.shape[0],
            vocab=vocab or head.weight.shape[0],
            target=target.data_ptr(),
            bias=_address(bias),
            softcap=head.softcap or 0.0,
            scale=head.scale,
            isa=isa,
            num_threads=torch.get_num_threads(),
        )
        self.num_columns = module.head_columns

    def add(
        self, weight: Tensor, x: Tensor, *, dx: Tensor | None = None, grad: Tensor | None = None
    ) -> None:
        """A pair of factors of the logits, with the gradients it shall get."""
        weight = weight.detach()
        if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
            weight = weight.contiguous()
        self.held += [weight, x, dx, grad]
        self.head.add_source(
            weight=weight.data_ptr(),
            type=_TYPES[weight.dtype],
            stride=max(weight.stride(0), weight.shape[1]),
            cols=x.shape[1],
            x=x.data_ptr(),
            dx=_address(dx),
            grad=_address(grad),
        )

    def forward(self, memory: Tensor | None, *, statistics: bool) -> Tensor:
        """Columns [9, N]: see ``_COLUMNS``; statistics unspecified unless asked for."""
        columns = self.x.new_empty(self.num_columns, self.x.shape[0])
        with scratch.borrow(self.head.forward_scratch(), self.x.device) as room:
            self.head.forward(
                out=columns.data_ptr(),
                stored=_address(memory),
                statistics=statistics,
                scratch=room.data_ptr(),
            )
        return columns

    def backward(
        self,
        v: Tensor,
        columns: Tensor,
        memory: Tensor | None,
        bias_grad: Tensor | None,
        accumulate: bool,
    ) -> None:
        """Gradients of the head into the tensors that ``add`` was given, and ``bias_grad``."""
        v = v.contiguous()
        with scratch.borrow(self.head.backward_scratch(), self.x.device) as room:
            self.head.backward(
                v=v.data_ptr(),
                shift=columns[1].data_ptr(),
                rest=columns[2].data_ptr(),
                slope=columns[8].data_ptr(),
                stored=_address(memory),
                bias_grad=_address(bias_grad),
                accumulate=accumulate,
                scratch=room.data_ptr(),
            )

    def argmax_is_target(self, rows: Tensor) -> Tensor:
        """``is_top1`` of some rows from their full logits."""
        from dpo_fast.naive import naive_logits

        head = self.linear
        z = naive_logits(
            self.x[rows],
            head.weight.float(),
            bias=None if head.bias is None else head.bias.float(),
            softcap=head.softcap,
            logit_scale=head.scale,
            lora=None
            if head.lora is None
            else HeadLoRA(head.lora.a.float(), head.lora.b.float(), head.lora.scale),
        )
        return z.argmax(-1) == self.target[rows]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
