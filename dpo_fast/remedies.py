"""Out of memory: what a step holds, estimated from shapes, and what costs least to make it less.

Formulas, not measurements: good to about a third for decoder models with attention that keeps no
``[T, T]`` scores (SDPA, FlashAttention). ``dpo-fast plan`` is exact and needs seconds; this needs
none, and no memory, which is all gone.

Legend: N scored tokens, H hidden, V vocabulary, L layers, I width of the MLP.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

GIB = 2**30
_FP32 = 4
SMALL_WORKSPACE = 64 * 2**20
_WORTH = 0.01  # of the whole: what saves less is not named


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward on one rank.

    Attributes:
        pairs: in it.
        positions: that the policy computes, padding included.
        attended: tokens of both sequences of all pairs: what ``packed`` would compute.
        shared: of those, second copies of prompts: what ``shared_prefix`` would not compute.
        scored: N.
    """

    pairs: int
    positions: int
    attended: int
    shared: int
    scored: int


@dataclass(frozen=True)
class StepSetup:
    """What the run decided before the step; bytes are of one rank.

    Attributes:
        weights, trained: bytes of all weights, and of those that get a gradient.
        trained_head: whether the LM head does.
        reference: bytes of a second model; 0 where there is none.
        may_precompute: whether ``reference="precomputed"`` would answer the same.
        itemsize: of activations.
        checkpointing: activations of a layer are computed again in the backward.
        layout: that micro-batches have; may_pack: whether another one was possible and not asked.
        workspace: bytes that the head's probabilities may take.
        accumulation: gradient_accumulation_steps; batch_size: per device.
        token_budget: max_tokens_per_batch.
        on_cuda: device kind; ranks: that hold the same, unsharded.
        offloadable: bytes of the reference that ``ref_offload`` would keep in host memory.
    """

    weights: int
    trained: int
    trained_head: bool
    reference: int
    may_precompute: bool
    itemsize: int
    checkpointing: bool
    may_pack: bool
    workspace: int
    batch_size: int
    accumulation: int
    token_budget: int | None
    on_cuda: bool
    ranks: int
    offloadable: int = 0


class Remedy(NamedTuple):
    """``setting`` to write, bytes that it ``saves``, and what it ``costs`` in words."""

    setting: str
    saves: int
    costs: str


def layer_bytes(config: Any, itemsize: int) -> int:
    """What autograd keeps of one decoder layer a position.

    Two norms keep their input in float32 and their output; attention its input's projections,
    rotated and repeated, and its output; the MLP the gate, its activation, the other factor and
    their product.
    """
    text = config.get_text_config()
    width = text.hidden_size
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    query = heads * head_dim
    key = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(text, "intermediate_size", None) or 4 * width
    active = getattr(text, "num_experts_per_tok", None)
    if active:
        inner = active * (getattr(text, "moe_intermediate_size", None) or inner)
    return 2 * width * (_FP32 + itemsize) + itemsize * (3 * query + 2 * key + 4 * inner)


def activation_bytes(config: Any, positions: int, itemsize: int, *, checkpointing: bool) -> int:
    """Of all layers, or of every layer's input and one layer."""
    text = config.get_text_config()
    layers, one = text.num_hidden_layers, layer_bytes(config, itemsize)
    if not checkpointing:
        return positions * layers * one
    return positions * (layers * text.hidden_size * itemsize + one)


def head_bytes(config: Any, scored: int, workspace: int, itemsize: int, *, trained: bool) -> int:
    """Probabilities within the workspace, float32 gradients of hidden states and of the head."""
    text = config.get_text_config()
    probabilities = min(workspace, scored * text.vocab_size * itemsize)
    gradients = scored * text.hidden_size + trained * text.vocab_size * text.hidden_size
    return probabilities + _FP32 * gradients


def step_bytes(config: Any, batch: MicroBatch, setup: StepSetup) -> dict[str, int]:
    """Bytes of one training step by part. AdamW keeps two states in the weights' own dtype."""
    return {
        "weights": setup.weights,
        "gradients": setup.trained,
        "optimizer": 2 * setup.trained,
        "reference": setup.reference,
        "activations": activation_bytes(
            config, batch.positions, setup.itemsize, checkpointing=setup.checkpointing
        ),
        "LM head": head_bytes(
            config, batch.scored, setup.workspace, setup.itemsize, trained=setup.trained_head
        ),
    }


def remedies(config: Any, batch: MicroBatch, setup: StepSetup) -> list[Remedy]:
    """All that would help, the cheapest first.

    The order is by what they cost: nothing; time only, little before much; then those that train
    something else.
    """
    least = _WORTH * sum(step_bytes(config, batch, setup).values())
    return [one for one in _all_remedies(config, batch, setup) if one.saves >= least]


def _all_remedies(config: Any, batch: MicroBatch, setup: StepSetup) -> Iterator[Remedy]:
    now = sum(step_bytes(config, batch, setup).values())

    def saved(batch_: MicroBatch = batch, **changed: Any) -> int:
        return now - sum(step_bytes(config, batch_, replace(setup, **changed)).values())

    if setup.may_pack:
        packed = replace(batch, positions=batch.attended - batch.shared)
        yield Remedy("batch_layout='auto'", saved(packed), "nothing: padding and second copies go")
    if setup.may_precompute and setup.reference:
        yield Remedy(
            "reference='precomputed'",
            saved(reference=0),
            "one pass over the data beforehand; every step is faster",
        )
    if setup.workspace > SMALL_WORKSPACE:
        yield Remedy(
            f"lm_head_workspace={SMALL_WORKSPACE}",
            saved(workspace=SMALL_WORKSPACE),
            "some speed of the LM head",
        )
    if setup.offloadable and setup.on_cuda:
        yield Remedy(
            "ref_offload=True",
            setup.offloadable,
            "the reference's layers cross the bus in every micro-batch, while it computes",
        )
    if batch.pairs > 1:
        yield Remedy(_smaller(batch, setup), saved(_half(batch)), "some speed; the same steps")
    if setup.ranks > 1:
        yield Remedy(
            "FSDP2 or ZeRO-3 in place of DDP",
            (now - saved_activations(config, batch, setup)) * (setup.ranks - 1) // setup.ranks,
            "communication",
        )
    if not setup.checkpointing:
        yield Remedy(
            "gradient_checkpointing=True", saved(checkpointing=True), "20 to 30 % of the speed"
        )
    elif setup.on_cuda:
        text = config.get_text_config()
        kept = batch.positions * text.num_hidden_layers * text.hidden_size * setup.itemsize
        yield Remedy("activation_offloading=True", kept, "transfers to host memory and back")
    if 2 * setup.trained > setup.weights:
        yield Remedy(
            "peft_config=LoraConfig(...)",
            3 * setup.trained + setup.reference,
            "another training: adapters instead of all weights",
        )
    yield Remedy("a smaller max_length", saved(_half(batch)), "the ends of long answers (at half)")


def saved_activations(config: Any, batch: MicroBatch, setup: StepSetup) -> int:
    """What sharding the weights leaves as it is: activations and the head's work."""
    parts = step_bytes(config, batch, setup)
    return parts["activations"] + parts["LM head"]


def _half(batch: MicroBatch) -> MicroBatch:
    return MicroBatch(*(value // 2 for value in vars(batch).values()))


def _smaller(batch: MicroBatch, setup: StepSetup) -> str:
    if setup.token_budget is not None:
        return f"max_tokens_per_batch={max(setup.token_budget // 2, 1)}"
    size = max(setup.batch_size // 2, 1)
    steps = -(-setup.batch_size * setup.accumulation // size)
    return f"per_device_train_batch_size={size}, gradient_accumulation_steps={steps}"


def explain(config: Any, batch: MicroBatch, setup: StepSetup, count: int = 3) -> str:
    """The message: what the step holds and the ``count`` cheapest remedies."""
    parts = step_bytes(config, batch, setup)
    held = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    lines = [
        f"This step holds about {_gib(sum(parts.values()))} GiB, by its shapes ({held}): "
        f"{batch.pairs} pairs, {batch.positions:,} positions, {batch.scored:,} scored tokens. The "
        "cheapest remedies first:"
    ]
    for number, one in enumerate(remedies(config, batch, setup)[:count], 1):
        lines.append(f"  {number}. {one.setting}: {_gib(one.saves)} GiB less; costs {one.costs}")
    return "\n".join(lines)


def _gib(size: int) -> str:
    gib = size / GIB
    return f"{gib:,.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.01 else f"{gib:.5f}"
