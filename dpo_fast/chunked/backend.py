"""The LM head over chunks of rows: torch GEMMs and an epilogue in place.

Nothing ``[N, V]``-sized exists beyond the workspace.

Legend: N scored tokens, n rows of a chunk, H hidden, V vocabulary, r rank of the head's adapter.

The forward stores ``E`` (epilogue_torch) in its GEMM's output. dX needs no loss: ``E W`` is taken
at once and kept ``[N, H]``, and the backward only scales rows by ``v = -dlogp * scale / S``. A
frozen head therefore recomputes nothing. The gradients of the head are ``E^T (v X)``: from the
stored E if it fits into the workspace, else from E computed again, chunk by chunk (one more GEMM).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.chunked.chunks import row_bytes
from dpo_fast.chunked.epilogue import epilogue_, exponentials_
from dpo_fast.chunked.epilogue_torch import EpilogueRows
from dpo_fast.chunked.frame import HeadShare, add_products, keep, walk, walk_back
from dpo_fast.chunked.gemm import wide_dtype
from dpo_fast.chunked.head_grads import weighted
from dpo_fast.naive import LinearLogprobs

WORKSPACE_BYTES = {"cpu": 64 * 2**20}
OTHER_WORKSPACE_BYTES = 2**30


class _Own(NamedTuple):
    """What it takes to compute E once more, ``[N]`` each; None where E is stored."""

    target: Tensor | None = None
    shift: Tensor | None = None
    rest: Tensor | None = None


class ChunkedBackend:
    """See the module's text. Deterministic: equal shapes and inputs give equal bits."""

    name = "chunked"
    gradients_may_wait = False

    def row_bytes(self, head: LinearHead) -> int:
        return row_bytes(head.weight.shape[0], wide_dtype(head.weight.dtype))

    def default_workspace(self, head: LinearHead) -> int:
        weight = head.weight
        floor = WORKSPACE_BYTES.get(weight.device.type, OTHER_WORKSPACE_BYTES)
        # The gradient of a trained head occupies as much anyway.
        return max(floor, weight.numel() * wide_dtype(weight.dtype).itemsize)

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
        def epilogue(chunk: Tensor, part: slice) -> EpilogueRows:
            return epilogue_(
                chunk,
                target[part],
                bias=head.bias,
                softcap=head.softcap,
                scale=head.scale,
                store=any(needs),
                outputs=outputs,
            )

        walked = walk(hidden, head, epilogue, needs=needs, store=store, buffer=buffer)
        columns = _join(walked.rows, walked.x, outputs)
        result = LinearLogprobs(columns.logps, **{n: getattr(columns, n) for n in outputs})
        if not any(needs):
            return HeadForward(result, None)
        own = _Own()
        if needs.head and walked.memory is None:
            own = _Own(target, columns.shift, columns.rest)
        return HeadForward(result, keep(walked, hidden, head, columns.total, needs, own))

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        return walk_back(saved, dlogps, into, _add_share)


def _add_share(total: HeadGrads, share: HeadShare) -> None:
    """``E^T`` times the factors."""
    own, meta = _Own(*share.own), share.meta

    def epilogue(chunk: Tensor, part: slice, head: LinearHead) -> None:
        assert own.target is not None and own.shift is not None and own.rest is not None
        exponentials_(
            chunk,
            own.target[part],
            shift=own.shift[part],
            rest=own.rest[part],
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
        )

    factors = weighted(share.x, share.v, share.kept.lora_a, meta.needs, meta.lora_scale)
    add_products(total, share, factors, epilogue)


def _join(parts: list[EpilogueRows], x: Tensor, outputs: tuple[str, ...]) -> EpilogueRows:
    names = ("logps", "shift", "rest", "total", *outputs)
    if not parts:
        empty = x.new_empty(0)
        return EpilogueRows(**{n: empty.bool() if n == "is_top1" else empty for n in names})
    if len(parts) == 1:
        return parts[0]
    return EpilogueRows(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
