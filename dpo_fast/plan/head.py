"""What the LM head holds during a step, from shapes and configuration, backend by backend.

Legend: N scored tokens, n of them in one group of pairs, H hidden, V vocabulary.

The head has no operations to trace: its kernels take addresses. But its memory is a contract: at
most the workspace of probabilities, scratch, and a few matrices of ``[N, H]``; from the forward to
the backward, float32 gradients of the hidden states and of a trained head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends import HeadBackend, LinearHead, Needs, buffer_bytes
from dpo_fast.backends.scratch import KEEP_BYTES
from dpo_fast.functional.groups import plan_groups
from dpo_fast.functional.linear import may_store, spare_bytes


class HeadMemory(NamedTuple):
    """Bytes beside the gradients that autograd keeps, and matrix products of ``2 N V H``.

    Attributes:
        room: probabilities and scratch.
        stays: whether ``room`` outlives the call (the CPU's pool keeps small scratch).
        rows: matrices of ``[n, H]`` that come and go.
        products: with the reference's left out.
    """

    room: int
    stays: bool
    rows: int
    products: int


def planned_backend(kind: str, dtype: torch.dtype) -> HeadBackend:
    """The backend that ``"auto"`` means on a kind of device ("cuda" or "cpu"), not on this one."""
    if kind == "cuda" and find_spec("triton") is not None:
        from dpo_fast.backends.triton_backend import TritonBackend

        return TritonBackend()
    if kind == "cuda":
        from dpo_fast.chunked import ChunkedBackend

        return ChunkedBackend()
    from dpo_fast.backends import choose

    return choose("auto", "cpu", dtype)


def head_memory(
    backend: HeadBackend,
    weight: Tensor,  # [V, H], fake or meta
    needs: Needs,
    seq_lens: Sequence[int],
    workspace: int | None = None,
) -> HeadMemory:
    """Memory of ``fused_linear_dpo`` with a separable loss.

    Args:
        backend: as the run would choose it.
        weight: in the dtype in which the head computes; a meta tensor stands for an accelerator.
        needs: which gradients the policy's head and hidden states get.
        seq_lens: scored tokens of the S sequences.
        workspace: ``lm_head_workspace``; None: the backend's own.
    """
    head = LinearHead(weight, None, None, 1.0, None)
    total = most = sum(seq_lens)
    grouped = False
    if needs.head and not may_store(backend, head, total, None, workspace):
        limit = backend.default_workspace(head) if workspace is None else workspace
        max_rows = limit // backend.row_bytes(head)
        groups = plan_groups([0, *accumulate(seq_lens)], max_rows)
        grouped = len(groups) > 1
        most = max((g.rows for g in groups if g.rows <= max_rows), default=0)
    triton = partial(_triton, spare=spare_bytes(backend, head, None, workspace))
    by_name: dict[str, Callable[..., tuple[int, int]]] = {"cpu": _compiled, "triton": triton}
    measure = by_name.get(backend.name, _chunked)
    room, rows = measure(backend, weight, needs, most)
    if grouped:  # each group's hidden states, and its part of their gradient
        rows += most * weight.shape[1] * (weight.element_size() + 4)
    stays = weight.device.type == "cpu" and room <= KEEP_BYTES
    return HeadMemory(room, stays, rows, 3 if needs.head else 2)


def _matrix(weight: Tensor, rows: int) -> int:
    """Bytes of one float32 ``[n, H]``."""
    return 4 * rows * weight.shape[1]


def _compiled(backend: Any, weight: Tensor, needs: Needs, rows: int) -> tuple[int, int]:
    """The CPU's own head: probabilities in guarded tiles, scratch that it states itself."""
    from dpo_fast.backends.compiled import compiled

    module: Any = compiled()
    vocab, width = weight.shape
    address = 64  # never read: the sizes follow from the shapes
    call = module.Head(
        rows=rows,
        vocab=vocab,
        target=address,
        bias=0,
        softcap=0.0,
        scale=1.0,
        isa="auto",
        num_threads=torch.get_num_threads(),
    )
    types = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    call.add_source(
        weight=address,
        type=types[weight.dtype],
        stride=width,
        cols=width,
        x=address,
        dx=address,
        grad=address if needs.weight else 0,
    )
    room = call.forward_scratch()
    if needs.head:
        # Two buffers: the probabilities are still lent out while the backward borrows its scratch.
        room = max(room, call.backward_scratch())
        room += buffer_bytes(rows, backend.row_bytes(LinearHead(weight, None, None, 1.0, None)))
    copies = 1 + (weight.dtype != torch.float32)  # dX before its row factor; widened X
    return room, copies * _matrix(weight, rows) + 4 * module.head_columns * rows


def _chunked(backend: Any, weight: Tensor, needs: Needs, rows: int) -> tuple[int, int]:
    """torch products over chunks: one chunk of logits, or the group's probabilities."""
    from dpo_fast.chunked.chunks import chunk_rows
    from dpo_fast.chunked.gemm import TILE_BYTES, wide_dtype

    wide = wide_dtype(weight.dtype)
    row = backend.row_bytes(LinearHead(weight, None, None, 1.0, None))
    room = buffer_bytes(rows, row) if needs.head else chunk_rows(rows, weight.shape[0], wide) * row
    narrow = weight.dtype != wide
    room += TILE_BYTES if narrow else 0
    return room, (1 + narrow + needs.weight) * _matrix(weight, rows)


def _triton(
    backend: Any, weight: Tensor, needs: Needs, rows: int, *, spare: int
) -> tuple[int, int]:
    """The Triton kernels: E in the weight's dtype, float32 ``E W``, partial sums by tile."""
    from dpo_fast_kernels.engine import LOGITS_BYTES
    from dpo_fast_kernels.head import group_rows
    from dpo_fast_kernels.scoring import ROW_BLOCK

    row = backend.row_bytes(LinearHead(weight, None, None, 1.0, None))
    room = row * (rows if needs.head else min(rows, group_rows(rows, row, spare)))
    if weight.dtype != torch.bfloat16:  # through a chunk of float32 logits
        room += min(LOGITS_BYTES, 4 * rows * weight.shape[0])
    partial_sums = 2 * 4 * min(rows, ROW_BLOCK) * -(-weight.shape[0] // 128)
    matrices = _matrix(weight, rows)  # E W in float32
    if needs.weight:
        matrices += rows * weight.shape[1] * weight.element_size()  # v X
    if not needs.head and rows * row > room:
        matrices += _matrix(weight, rows)  # the groups' E W, joined
    return room + partial_sums, matrices
