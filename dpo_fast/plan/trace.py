"""One training step on fake tensors: the model's own operations, autograd's own saved tensors.

The order is the trainer's: the reference's forward, the policy's forward with the LM head inside,
the backward with its gradients. Only the head is replaced, by its sizes (``plan.head``). What a
step without a reference holds follows from the same trace.

Legend: P pairs, S = 2P sequences, T padded length, N scored tokens, H hidden, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends import Needs
from dpo_fast.batch import TokenPlan
from dpo_fast.functional.autocast import autocast_head, no_autocast
from dpo_fast.layouts import segment_attention_in
from dpo_fast.layouts.joined_rows import has_segments
from dpo_fast.models import Head, forward_scored
from dpo_fast.plan.depth import Stack, find_stack
from dpo_fast.plan.fake import FakeModel
from dpo_fast.plan.flops import count_flops
from dpo_fast.plan.head import HeadMemory, head_memory, planned_backend
from dpo_fast.plan.live import LiveMemory, Moment
from dpo_fast.plan.masks import known_masks
from dpo_fast.reference.inference import inference_pass

REFERENCE_ROWS = "reference rows"  # its hidden states, which wait for the policy's


class Trace(NamedTuple):
    """What a step holds beside weights, reference and optimizer, and what it computes.

    Attributes:
        moments: bytes by part ("gradients", "head", "activations", "reference rows") when their
            sum is largest, of each moment of a step in which a model answers as the reference.
        policy_flops: forward, recomputation and backward of the backbone.
        reference_flops: of the reference's backbone.
        head_flops: ``2 N V H``: one product of the head.
        head_products: such products of the policy.
        tokens: positions that the model computes.
    """

    moments: Mapping[Moment, Mapping[str, int]]
    policy_flops: int
    reference_flops: int
    head_flops: int
    head_products: int
    tokens: int

    def peak(self, with_reference: bool) -> tuple[dict[str, int], str]:
        """Bytes by part ("gradients", "head", "activations") at the peak, and what the step does
        then: "reference", "forward" or "backward".

        Args:
            with_reference: a model answers as the reference in the step.
        """
        best: dict[str, int] = {}
        phase = ""
        for moment, held in self.moments.items():
            if moment.phase == "reference" and not with_reference:
                continue
            parts = dict(held)
            rows = parts.pop(REFERENCE_ROWS, 0)
            parts["activations"] = parts.get("activations", 0) + rows * with_reference
            if sum(parts.values()) > sum(best.values()):
                best, phase = parts, moment.phase
        return best, phase

    def deeper(self, other: "Trace", times: int) -> "Trace":
        """From here ``times`` as far as to ``other``, the same step with some more layers."""

        def line(here: int, there: int) -> int:
            return here + times * (there - here)

        moments = {
            moment: {
                part: line(held.get(part, 0), other.moments[moment].get(part, 0))
                for part in {*held, *other.moments[moment]}
            }
            for moment, held in self.moments.items()
        }
        return self._replace(
            moments=moments,
            policy_flops=line(self.policy_flops, other.policy_flops),
            reference_flops=line(self.reference_flops, other.reference_flops),
        )


class TraceOptions(NamedTuple):
    """``device_kind`` of the run, ``accumulates``: gradients of earlier micro-batches are there."""

    device_kind: str = "cpu"
    accumulates: bool = False
    workspace: int | None = None


def trace_step(
    model: FakeModel,
    batch: Mapping[str, Any],
    *,
    checkpointing: bool,
    options: TraceOptions,
    whole: bool = False,
) -> Trace:
    """Run one micro-batch; of a deep model of like layers, with few of them twice.

    Args:
        batch: of a layout's collator, on the CPU.
        whole: all layers, also where fewer would do.

    Raises:
        ValueError: the model's class computes something that depends on values (such as a routing
            of tokens), which fake tensors do not have; names the operation.
    """
    model.set_checkpointing(checkpointing)
    stack = None if whole else find_stack(model.module)
    if stack is None:
        return _trace(model, batch, options, None)
    traces = []
    for depth in stack.shallow:
        with stack.cut(depth):
            traces.append(_trace(model, batch, options, stack))
    return traces[0].deeper(traces[1], stack.times())


def _trace(
    model: FakeModel, batch: Mapping[str, Any], options: TraceOptions, stack: Stack | None
) -> Trace:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    batch = copy.deepcopy(batch)  # segments remember the masks that a trace has made of them
    memory = LiveMemory(count_flops)
    step = _Step(model, memory, options)
    marks = contextlib.nullcontext() if stack is None else stack.marks(memory)
    try:
        with _attention(model, batch), model.mode, memory, marks:
            return step.run(model.batch(batch))
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ) as error:
        raise ValueError(
            f"{type(model.module).__name__} cannot be planned: what its forward computes depends "
            f"on values that a plan does not have ({error}). Measure a short run instead: "
            "`dpo-fast train ... --max_steps 3` logs perf/peak_mem_gib"
        ) from error
    finally:
        for parameter in model.trained():
            parameter.grad = None


def _attention(
    model: FakeModel, batch: Mapping[str, Any]
) -> contextlib.AbstractContextManager[Any]:
    if not has_segments(batch):
        return known_masks(model, batch)
    # The C++ attention has nothing to read in fake tensors; SDPA keeps as much for its backward.
    return segment_attention_in(model.module, backend="sdpa")


class _Step:
    """The parts of a step, in order."""

    def __init__(self, model: FakeModel, memory: LiveMemory, options: TraceOptions) -> None:
        self.model, self.memory, self.options = model, memory, options
        self.head: HeadMemory | None = None
        self.head_flops = 0
        self.kept: Tensor | None = None  # scratch in the CPU's pool

    def run(self, batch: dict[str, Any]) -> Trace:
        memory, module = self.memory, self.model.module
        for tensor in self.model.tensors():
            memory.ignore(tensor)
        tokens = batch["executed_tokens"]
        for value in batch.values():
            if isinstance(value, Tensor):
                memory.add(value)
        handles = [
            p.register_post_accumulate_grad_hook(lambda p: memory.rename(p.grad, "gradients"))
            for p in self.model.trained()
        ]
        if self.options.accumulates:
            with memory.part("gradients"):
                for p in self.model.trained():
                    p.grad = torch.zeros_like(p)
        with memory.doing("reference"):
            hidden = self._reference(batch)
            memory.rename(hidden, REFERENCE_ROWS)
        reference_flops = memory.flops
        module.train()
        with memory.doing("forward"):
            loss = self._forward(batch)
        del hidden
        with memory.doing("backward"):
            loss.backward()
        for handle in handles:
            handle.remove()
        assert self.head is not None
        return Trace(
            moments=memory.peaks,
            policy_flops=memory.flops - reference_flops,
            reference_flops=reference_flops,
            head_flops=self.head_flops,
            head_products=self.head.products,
            tokens=tokens,
        )

    def _reference(self, batch: dict[str, Any]) -> Tensor:
        module = self.model.module
        with inference_pass(module, self.model.setting.autocast):
            return forward_scored(module, batch, lambda hidden, head: hidden).value

    def _forward(self, batch: dict[str, Any]) -> Tensor:
        dtype = self.model.setting.autocast
        lens = TokenPlan.from_batch(batch).seq_lens
        context = torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()

        def score(hidden: Tensor, head: Head) -> Tensor:
            lora = head.lora
            hidden, weight, _, lora = autocast_head(hidden, head.weight, head.bias, lora)
            factors = () if lora is None else (lora.a, lora.b)
            return _HeadSizes.apply(self, lens, hidden, weight, *factors)

        with context:
            return forward_scored(self.model.module, batch, score).value

    def plan_head(self, weight: Tensor, needs: Needs, lens: Any) -> HeadMemory:
        """Sizes of the head; remembered for the result."""
        options = self.options
        like = weight
        if options.device_kind != "cpu":  # what is not the CPU's is an accelerator's, to the head
            like = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        backend = planned_backend(options.device_kind, weight.dtype)
        self.head = head_memory(backend, like, needs, lens, options.workspace)
        self.head_flops = 2 * sum(lens) * weight.numel()
        return self.head


class _HeadSizes(torch.autograd.Function):
    """In place of the fused head: takes and leaves the memory that it does."""

    @staticmethod
    def forward(
        ctx: Any, step: _Step, lens: Any, hidden: Tensor, weight: Tensor, *lora: Tensor
    ) -> Tensor:
        wants = ctx.needs_input_grad[2:]
        a, b = (*wants[2:], False, False)[:2]
        sizes = step.plan_head(weight, Needs(wants[0], wants[1], False, a, b), lens)
        tensors = (hidden, weight, *lora)
        with no_autocast(hidden), step.memory.part("head"):
            room = torch.empty(sizes.room, dtype=torch.uint8)
            grads: list[Tensor | None] = [_wide(hidden)]
            rows = torch.empty(sizes.rows, dtype=torch.uint8)
            trained = zip(tensors[1:], wants[1:], strict=True)
            grads += [_wide(t) if wanted else None for t, wanted in trained]
            del rows
        step.kept = room if sizes.stays else None
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.wants = wants
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        scaled = [
            g.mul_(dloss).to(d) if wanted and g is not None else None
            for g, d, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        ]
        return (None, None, *scaled)


def _wide(tensor: Tensor) -> Tensor:
    """Float32, as the head accumulates."""
    return torch.empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
