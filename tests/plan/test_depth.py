"""A trace of few layers, stretched, against one of all layers: the same to the byte."""

from typing import Any

import pytest
import torch
from torch import nn

from dpo_fast.plan import Setting, batches_of_lengths
from dpo_fast.plan.batches import collate
from dpo_fast.plan.depth import find_stack
from dpo_fast.plan.fake import FakeModel
from dpo_fast.plan.trace import REFERENCE_ROWS, TraceOptions, trace_step
from tests.plan.cases import Case

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 9}),
    "two kinds in turn": ("gemma2", {"num_hidden_layers": 11, "head_dim": 8}),
    "a lead of its own": (
        "qwen2",
        {
            "num_hidden_layers": 10,
            "use_sliding_window": True,
            "sliding_window": 64,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 8,
        },
    ),
}
WAYS = [
    ("full", "mixed", False, "padded", "cpu"),
    ("full", "mixed", True, "shared_prefix", "cuda"),
    ("full", "bf16", True, "padded", "cuda"),
    ("lora", "bf16", False, "packed", "cuda"),
    ("lora", "fp32", True, "padded", "cpu"),
]


def fake_model(family: str, way: tuple[Any, ...]) -> FakeModel:
    name, own = FAMILIES[family]
    kind, precision, checkpointing, layout, _ = way
    setting = Setting(kind, precision, checkpointing, layout, "frozen")
    case = Case(setting, family=name, overrides={**SIZES, **own})
    return FakeModel(case.config(), setting, case.lora())


@pytest.mark.parametrize(
    ("family", "way", "accumulates"),
    [
        *(("llama", way, False) for way in WAYS),
        ("llama", WAYS[1], True),
        *((family, way, False) for family in list(FAMILIES)[1:] for way in WAYS[:2]),
    ],
    ids=str,
)
def test_stretched_is_whole(family: str, way: tuple[Any, ...], accumulates: bool) -> None:
    model = fake_model(family, way)
    _, _, checkpointing, layout, device = way
    rows = batches_of_lengths(4, [40, 25, 60], [30, 44], [12, 50, 33]).largest
    batch = collate(
        rows,
        layout,
        max_length=None,
        truncation_mode="keep_start",
        on_accelerator=device == "cuda",
        joins_rows=False,
    )
    options = TraceOptions(device, accumulates)
    found, expected = (
        trace_step(model, batch, checkpointing=checkpointing, options=options, whole=whole)
        for whole in (False, True)
    )
    assert len(found.moments) > len(expected.moments)
    for with_reference in (False, True):
        (parts, phase), (gold, gold_phase) = (t.peak(with_reference) for t in (found, expected))
        assert (parts, phase) == (gold, gold_phase)
    assert found._replace(moments={}) == expected._replace(moments={})
    assert expected.policy_flops > 2 * expected.reference_flops > 0


def test_the_depths_of_each_kind_of_stack() -> None:
    def depths(family: str) -> tuple[int, int, int, int]:
        stack = find_stack(fake_model(family, WAYS[0]).module)
        assert stack is not None
        first, second = stack.shallow
        assert first + stack.times() * (second - first) == stack.depth
        return stack.lead, stack.period, first, second

    assert depths("llama") == (0, 1, 3, 4)
    assert depths("two kinds in turn") == (0, 2, 5, 7)
    assert depths("a lead of its own") == (2, 1, 5, 6)


def test_layers_that_differ_in_anything_are_no_stack() -> None:
    model = fake_model("llama", WAYS[0]).module
    layers = model.model.layers
    assert find_stack(model) is not None
    layers[7].mlp.act_fn = nn.Tanh()
    assert find_stack(model) is None
    layers[7].mlp.act_fn = layers[6].mlp.act_fn
    assert find_stack(model) is not None
    layers[7].self_attn.scaling *= 2.0
    assert find_stack(model) is None
    layers[7].self_attn.scaling /= 2.0
    layers[7].mlp.up_proj.weight = nn.Parameter(torch.empty(3, 4, device="meta"))
    assert find_stack(model) is None


def test_cut_is_undone() -> None:
    model = fake_model("llama", WAYS[0])
    stack = find_stack(model.module)
    assert stack is not None
    before, size = list(stack.layers), model.weight_bytes
    with stack.cut(3):
        assert list(stack.layers) == before[:3]
        assert model.weight_bytes < size
    assert list(stack.layers) == before and model.weight_bytes == size


def test_the_references_rows_count_only_with_a_reference() -> None:
    model = fake_model("llama", WAYS[0])
    batch = collate(
        batches_of_lengths(2, [5], [40], [40]).largest,
        "padded",
        max_length=None,
        truncation_mode="keep_start",
        on_accelerator=True,
        joins_rows=False,
    )
    trace = trace_step(model, batch, checkpointing=False, options=TraceOptions("cuda"))
    # 4 answers of 40 tokens, H = 32, bf16 or float32
    assert max(held.get(REFERENCE_ROWS, 0) for held in trace.moments.values()) >= 160 * 32 * 2
    with_it, without = (trace.peak(there)[0] for there in (True, False))
    assert with_it["activations"] >= without["activations"]
