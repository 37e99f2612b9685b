"""The estimate behind the out-of-memory message: exact literals, and real saved tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dpo_fast.remedies import (
    GIB,
    MicroBatch,
    StepSetup,
    activation_bytes,
    explain,
    head_bytes,
    layer_bytes,
    remedies,
    step_bytes,
)
from tests.tiny import tiny_model

BATCH = MicroBatch(pairs=8, positions=16384, attended=12000, shared=4000, scored=4000)


def llama_8b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def setup(**changed: Any) -> StepSetup:
    base = StepSetup(
        weights=16 * GIB,
        trained=16 * GIB,
        trained_head=True,
        reference=16 * GIB,
        may_precompute=True,
        itemsize=2,
        checkpointing=False,
        may_pack=True,
        workspace=GIB,
        batch_size=8,
        accumulation=2,
        token_budget=None,
        on_cuda=True,
        ranks=1,
    )
    return replace(base, **changed)


def test_literals() -> None:
    config = llama_8b()
    # 2 norms x 4096 x (4 + 2) + 2 x (3 x 4096 queries + 2 x 1024 keys and values + 4 x 14336)
    assert layer_bytes(config, 2) == 49152 + 2 * (12288 + 2048 + 57344) == 192512
    assert activation_bytes(config, 10, 2, checkpointing=False) == 10 * 32 * 192512
    assert activation_bytes(config, 10, 2, checkpointing=True) == 10 * (32 * 8192 + 192512)
    # 100 rows of 128256 probabilities fit; gradients of 100 rows and of the weight in float32
    whole = head_bytes(config, 100, GIB, 2, trained=True)
    assert whole == 100 * 128256 * 2 + 4 * (100 * 4096 + 128256 * 4096)
    assert head_bytes(config, 10**6, GIB, 2, trained=False) == GIB + 4 * 10**6 * 4096
    parts = step_bytes(config, BATCH, setup())
    assert parts["optimizer"] == 32 * GIB and parts["reference"] == 16 * GIB


def names(**changed: Any) -> list[str]:
    found = remedies(llama_8b(), BATCH, setup(**changed))
    return [one.setting.partition("=")[0] for one in found]


def test_the_cheapest_come_first() -> None:
    assert names() == [
        "batch_layout",
        "reference",
        "per_device_train_batch_size",
        "gradient_checkpointing",
        "peft_config",
        "a smaller max_length",
    ]
    found = remedies(llama_8b(), BATCH, setup())
    layer_total = 32 * 192512
    assert found[0].saves == (16384 - 8000) * layer_total
    assert found[1].saves == 16 * GIB
    assert found[2].setting == "per_device_train_batch_size=4, gradient_accumulation_steps=4"
    assert found[2].saves >= 8192 * layer_total
    assert found[3].saves == 16384 * (layer_total - 192512 - 32 * 8192)


@pytest.mark.parametrize(
    ("changed", "gone", "comes"),
    [
        ({"may_pack": False}, "batch_layout", None),
        ({"reference": 0}, "reference", None),
        ({"may_precompute": False}, "reference", None),
        ({"checkpointing": True}, "gradient_checkpointing", "activation_offloading"),
        ({"checkpointing": True, "on_cuda": False}, "activation_offloading", None),
        ({"workspace": 8 * GIB, "reference": 0}, None, None),
        ({"token_budget": 16384}, "per_device_train_batch_size", "max_tokens_per_batch"),
        ({"ranks": 8}, None, "FSDP2 or ZeRO-3 in place of DDP"),
        ({"trained": GIB // 10, "trained_head": False}, "peft_config", None),
    ],
)
def test_only_what_would_help_is_named(changed: Any, gone: str | None, comes: str | None) -> None:
    found = names(**changed)
    assert gone not in found
    assert comes is None or comes in found


def test_one_pair_cannot_be_halved_and_a_large_workspace_can() -> None:
    one = replace(BATCH, pairs=1)
    assert not any("batch_size" in r.setting for r in remedies(llama_8b(), one, setup()))
    many = replace(BATCH, scored=100_000)
    found = remedies(llama_8b(), many, setup(workspace=16 * GIB))
    assert "lm_head_workspace=67108864" in [one.setting for one in found[:3]]
    assert found[2].saves == 16 * GIB - 64 * 2**20


def test_the_message_ranks_three_with_gib() -> None:
    text = explain(llama_8b(), BATCH, setup())
    assert "weights 16.0, gradients 16.0, optimizer 32.0, reference 16.0" in text
    assert "8 pairs, 16,384 positions, 4,000 scored tokens" in text
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("  1. batch_layout='auto': 48.1 GiB less; costs nothing")
    assert lines[2].startswith("  2. reference='precomputed': 16.0 GiB less")
    assert lines[3].startswith("  3. per_device_train_batch_size=4")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3"])
def test_activations_against_what_autograd_saves(family: str) -> None:
    """Within a third, beside the embedding and the head: two sizes tell the layers apart."""
    sizes = []
    for layers in (1, 3):
        model = tiny_model(family, num_hidden_layers=layers, hidden_size=64, intermediate_size=160)
        model.train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(
            tensor: torch.Tensor, weights: set[int] = weights, kept: dict[int, int] = kept
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(3, 300, (4, 64))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.model(input_ids=ids, use_cache=False)
        sizes.append(sum(kept.values()))
    measured = (sizes[1] - sizes[0]) / 2
    estimated = 256 * layer_bytes(model.config, 4)
    assert 0.67 < estimated / measured < 1.5, (estimated, measured)


def test_a_frozen_reference_may_wait_on_the_host() -> None:
    assert names(offloadable=12 * GIB)[:3] == ["batch_layout", "reference", "ref_offload"]
    assert "ref_offload" not in names(offloadable=12 * GIB, on_cuda=False) + names()


def test_what_would_wait_is_all_layers_but_two() -> None:
    from dpo_fast.reference.frozen import FrozenReference
    from dpo_fast.trainer.oom import _offloadable

    reference = FrozenReference.copy_of(tiny_model("llama", num_hidden_layers=5))
    layer = sum(p.nbytes for p in reference.model.model.layers[0].parameters())
    assert _offloadable(reference, 1) == 3 * layer
    whole = sum(p.nbytes for p in reference.model.parameters())
    assert _offloadable(reference, 4) == whole // 4  # sharded: every shard
    assert _offloadable(FrozenReference.copy_of(tiny_model("llama")), 1) == 0
    assert _offloadable(None, 1) == 0
