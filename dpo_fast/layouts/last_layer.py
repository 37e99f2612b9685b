"""The last layer computes only what somebody reads.

A loss reads the hidden states that predict a scored token. Up to the last layer all others matter,
too: as keys and values. In the last layer they are needed for nothing else, so its queries, its
output projection and its feed-forward part run on the scored rows alone; what they would have given
to the others is zero. Values and gradients are those of the whole layer: nothing reads the rows
that are left out, and their gradients are zero.

It is done by hooks on the parts of the layer, for passes that carry segments which say that only
scored rows are read (``Segments.scored_pass``); others, compiled ones among them, compute all rows.
A model that runs its last layer more than once reads all rows of it:
:func:`dpo_fast.models.backbone.run_backbone` then runs such a pass again.

Legend: L tokens of the row, K of them scored, H features of a part's input or output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.batch import SEGMENTS_KEY
from dpo_fast.layouts.segments import Segments, to_device
from dpo_fast.models.layers import layer_list
from dpo_fast.models.tensor_parallel import is_dtensor

# Names in transformers of parts that compute each position by itself.
_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe")
_ATTENTION = ("self_attn", "attn", "attention")
_PROJECTIONS = ("q_proj", "o_proj", "out_proj", "c_proj", "dense")
_HOOKED = "_dpo_fast_scored_rows"
# Above this share of scored rows, selecting them costs about what it saves.
_WORTH = 0.9


@contextmanager
def scored_rows_in_last_layer(model: nn.Module) -> Iterator[None]:
    """Inside, the last layer of ``model`` (any wrapper) leaves out what nobody reads.

    A model of other structure is left as it is, and so is one that is inside already. The backward
    of a model with gradient checkpointing runs the layer again: it belongs inside, too.
    """
    layers = layer_list(model)
    layer: Any = layers[-1] if layers else None
    if layer is None or hasattr(layer, _HOOKED):
        yield
        return
    setattr(layer, _HOOKED, True)  # a copy of the layer has this, and copies of the hooks
    handles = _hook(layer)
    try:
        yield
    finally:
        delattr(layer, _HOOKED)
        for handle in handles:
            handle.remove()


def _hook(layer: nn.Module) -> list[Any]:
    """The handles of the hooks of a layer and its parts."""
    current = _CurrentPass()
    handles: list[Any] = [
        layer.register_forward_pre_hook(current.begin),
        layer.register_forward_hook(current.end, always_call=True),
    ]
    for attention in attentions(layer):
        handles.append(attention.register_forward_pre_hook(current.attend, with_kwargs=True))
    for part in position_wise_parts(layer):
        narrowed = _NarrowedPart(current)
        handles.append(part.register_forward_pre_hook(narrowed.narrow))
        handles.append(part.register_forward_hook(narrowed.widen))
    return handles


def attentions(layer: nn.Module) -> list[nn.Module]:
    """The attention of a decoder layer, by its usual names."""
    found = [getattr(layer, name, None) for name in _ATTENTION]
    return [module for module in found if isinstance(module, nn.Module)]


def position_wise_parts(layer: nn.Module) -> list[nn.Module]:
    """Of a decoder layer: feed-forward part, projection to queries, output projection."""
    parts = [getattr(layer, name, None) for name in _FEED_FORWARD]
    for attention in attentions(layer):
        parts += [getattr(attention, name, None) for name in _PROJECTIONS]
    return [part for part in parts if isinstance(part, nn.Module)]


class _CurrentPass:
    """The segments of the pass that the layer runs now.

    They are read where the layer calls its attention, because a checkpoint that runs the layer
    again, with the arguments of that pass, may run its forward only, without the layer's hooks. A
    part that runs before the attention computes all rows.
    """

    def __init__(self) -> None:
        self.segments: Segments | None = None
        self.attended = False
        self.repeats = False

    def begin(self, layer: nn.Module, args: Any) -> None:
        self.segments, self.attended = None, False

    def attend(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.segments, self.attended = kwargs.get(SEGMENTS_KEY), True
        scored_pass = None if self.segments is None else self.segments.scored_pass
        if scored_pass is not None and not scored_pass.is_over:
            scored_pass.last_layer_runs += 1
            self.repeats |= scored_pass.last_layer_runs > 1

    def end(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.segments = None


class _NarrowedPart:
    """Hooks of one part: scored rows in, all rows out, zero where they are not scored."""

    def __init__(self, current: _CurrentPass) -> None:
        self.current = current
        self.index: Tensor | None = None
        self.length = 0
        self.comes_first = False

    def narrow(self, part: nn.Module, args: tuple[Any, ...]) -> Any:
        self.index = None
        # Once seen, it holds for this layer: segments found here would be of another pass.
        self.comes_first |= not self.current.attended
        segments, given = self.current.segments, args[0] if args else None
        if segments is None or self.comes_first or self.current.repeats:
            return None
        if torch.compiler.is_compiling():
            return None
        if not isinstance(given, Tensor) or is_dtensor(given):
            return None
        if given.dim() != 3 or given.shape[:2] != (1, segments.length):
            return None
        self.index = scored_index(segments, given.device)
        if self.index is None:
            return None
        self.length = segments.length
        assert segments.scored_pass is not None
        segments.scored_pass.left_out = True
        return (_TakeRows.apply(given, self.index), *args[1:])

    def widen(self, part: nn.Module, args: Any, output: Any) -> Any:
        index, self.index = self.index, None
        if index is None:
            return None
        if isinstance(output, tuple):
            return (_PutRows.apply(output[0], index, self.length), *output[1:])
        return _PutRows.apply(output, index, self.length)


def scored_index(segments: Segments, device: torch.device) -> Tensor | None:
    """``[K]`` int64, the positions that somebody reads; None where all are to be computed."""
    scored = segments.scored
    if segments.scored_pass is None or scored is None:
        return None
    if not 0 < len(scored) <= _WORTH * segments.length:
        return None
    return segments.derived(("scored", device), lambda: to_device(scored, device))


class _TakeRows(torch.autograd.Function):
    """``[1, L, H]`` to the ``[1, K, H]`` of an index without repeats."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = rows.shape[1]
        return rows[0].index_select(0, index).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _placed(grad, index, ctx.length), None


class _PutRows(torch.autograd.Function):
    """``[1, K, H]`` to ``[1, L, H]``, zero at rows that the index does not name."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(index)
        return _placed(rows, index, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad[0].index_select(0, index).unsqueeze(0), None, None


def _placed(rows: Tensor, index: Tensor, length: int) -> Tensor:
    out = rows.new_zeros(length, rows.shape[2])
    return out.index_copy_(0, index, rows[0]).unsqueeze(0)
