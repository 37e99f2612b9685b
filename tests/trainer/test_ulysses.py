"""What DeepSpeed's sequence parallelism needs of batches, config and attention, without DeepSpeed;
its trainings are in tests/distributed/test_ulysses.py.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpo_fast.batch import SHIFT_KEY, TokenPlan
from dpo_fast.models import forward_scored, install_scoring
from dpo_fast.reference.inference import eval_mode
from dpo_fast.trainer import ulysses
from dpo_fast.trainer.cut_rows import CUT_KEYS
from tests.layouts.compare import AWKWARD, collators
from tests.parallel.context_worker import make
from tests.tiny import tiny_model


def adapter_collator(ranks: int = 2) -> ulysses.AdapterCollator:
    return ulysses.AdapterCollator(collators()["padded"], ranks, pad_token_id=7)


def part_of(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """What ``UlyssesSPDataLoaderAdapter`` makes of a batch for one rank (deepspeed 0.19.8)."""
    batch = dict(batch)
    batch[SHIFT_KEY] = F.pad(batch.pop("labels"), (0, 1), value=-100)[..., 1:]
    tensors = {k: v.chunk(ranks, dim=1)[rank] for k, v in batch.items() if torch.is_tensor(v)}
    return {**batch, **tensors}


def test_a_batch_of_the_loader_holds_cuttable_tensors_alone() -> None:
    batch = adapter_collator(3)(AWKWARD)
    shapes = {key: value.shape for key, value in batch.items() if torch.is_tensor(value)}
    assert set(shapes) == {"input_ids", "position_ids", "labels"} and len(set(shapes.values())) == 1
    assert shapes["labels"][1] % 3 == 0
    assert not any(torch.is_tensor(value) for value in batch[ulysses.CARRIED].values())


def test_the_parts_of_a_batch_plan_its_tokens_and_keep_its_pairs() -> None:
    rows = [
        row | {"ref_chosen_logps": 0.1 * i, "ref_rejected_logps": -1.0 * i}
        for i, row in enumerate(AWKWARD)
    ]
    whole = collators()["padded"](rows)
    plan = TokenPlan.from_batch(whole)
    found: list[tuple[int, int]] = []
    for rank in range(2):
        part = ulysses.unpack(part_of(adapter_collator()(rows), rank, 2))
        assert part["seq_lens"] == plan.seq_lens  # of whole sequences, for the counts of the step
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            assert torch.equal(part[key], whole[key]) and part[key].dtype == torch.float32
        assert part["num_tokens"] == whole["num_tokens"]
        own = TokenPlan.from_batch(ulysses.plan_positions(part))
        assert list(own.completion_lens) == list(plan.completion_lens)
        width = part["input_ids"].shape[1]
        assert set(CUT_KEYS) <= set(part) and own.width == width
        row, column = own.token_index // width, own.token_index % width + rank * width
        found += list(
            zip(
                (row * whole["input_ids"].shape[1] + column).tolist(),
                own.target.tolist(),
                strict=True,
            )
        )
    assert sorted(found) == list(zip(plan.token_index.tolist(), plan.target.tolist(), strict=True))


def test_sp_size_without_deepspeed_is_refused() -> None:
    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(sp_size=2), state=SimpleNamespace()
    )
    with pytest.raises(
        ValueError, match=r"sp_size=2.*DeepSpeed is not in use.*ulysses\.yaml.*cp_size"
    ):
        ulysses.prepare(accelerator, SimpleNamespace(), tiny_model("llama"))


@pytest.mark.parametrize(
    "name,value", [("auto_find_batch_size", True), ("split_batches", True), ("even_batches", False)]
)
def test_micro_batches_of_varying_size_are_refused(name: str, value: bool) -> None:
    loaders = {"split_batches": False, "even_batches": True}
    args = {"auto_find_batch_size": False, "per_device_train_batch_size": 4}
    fine = SimpleNamespace(**args, accelerator_config=SimpleNamespace(**loaders))
    ulysses.refuse_varying_batches(fine)
    setattr(fine if name in args else fine.accelerator_config, name, value)
    with pytest.raises(
        ValueError, match=rf"{name}={value}.*per_device_train_batch_size=4.*default"
    ):
        ulysses.refuse_varying_batches(fine)


def test_gradients_of_two_scales_are_refused() -> None:
    ulysses.refuse_two_scales({})
    ulysses.refuse_two_scales({"zero_optimization": {"stage": 2, "reduce_scatter": False}})
    ulysses.refuse_two_scales({"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"reduce_scatter=false.*leave reduce_scatter at true"):
        ulysses.refuse_two_scales({"zero_optimization": {"stage": 3, "reduce_scatter": False}})


def model_with(implementation: str, **config: Any) -> Any:
    model = tiny_model("llama")
    model.config._attn_implementation = implementation
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def test_the_attention_that_is_wrapped_is_the_models() -> None:
    assert ulysses.choose_attention(model_with("sdpa"), None) == "sdpa"
    assert ulysses.choose_attention(model_with("flash_attention_2"), "flash_attention_2")
    assert ulysses.choose_attention(model_with("sdpa", layer_types=["full_attention"]), "sdpa")
    with pytest.raises(ValueError, match=r"attends by 'sdpa'.*'flash_attention_2'.*set"):
        ulysses.choose_attention(model_with("sdpa"), "flash_attention_2")
    with pytest.raises(ValueError, match=r"'eager' needs a mask of whole rows"):
        ulysses.choose_attention(model_with("eager"), None)


@pytest.mark.parametrize("config", [{"sliding_window": 8}, {"layer_types": ["sliding_attention"]}])
def test_windows_that_are_masks_are_refused(config: dict[str, Any]) -> None:
    assert ulysses.choose_attention(model_with("flash_attention_2", **config), None)
    with pytest.raises(ValueError, match=r"layers of sliding_attention.*flash"):
        ulysses.choose_attention(model_with("sdpa", **config), None)


def test_a_reference_of_other_heads_is_refused() -> None:
    policy = model_with("sdpa")
    ulysses.refuse_other_attention(model_with("sdpa"), policy)
    for name, value in (("attn_implementation", "eager"), ("num_key_value_heads", 4)):
        key = "_attn_implementation" if name == "attn_implementation" else name
        reference = model_with("sdpa")
        setattr(reference.config, key, value)
        with pytest.raises(ValueError, match=rf"ref_model has {name}={value!r}.*precomputed"):
            ulysses.refuse_other_attention(reference, policy)


def test_a_reference_in_eval_mode_attends_as_in_training() -> None:
    """Its dropout stays off, and its modules are in eval mode again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[bool, float]] = []
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((module.training, kwargs["dropout"]))
        return usual(module, *args, **kwargs)

    model = tiny_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    install_scoring(model)
    batch = collators()["padded"](AWKWARD)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        with eval_mode(model), ulysses.exchanged_in_eval_mode("sdpa"):
            forward_scored(model, batch, lambda hidden, head: hidden)
            assert not any(module.training for module in model.modules())
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is spy
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert seen == [(True, 0.0)] * 2


def test_key_value_heads_are_those_of_whole_rows_again() -> None:
    model = tiny_model("llama")
    modules = [layer.self_attn for layer in model.model.layers]
    assert [module.num_key_value_groups for module in modules] == [2, 2]
    for module in modules:
        module.num_key_value_groups = 1  # as DeepSpeed leaves it
    ulysses.undo_replication(model, None)
    assert [module.num_key_value_groups for module in modules] == [2, 2]


def test_an_evaluation_before_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("frozen, ipo")
    monkeypatch.setattr(type(trainer), "_ranks_by", lambda self, name: 1 + (name == "sp_size"))
    with pytest.raises(ValueError, match=r"under sp_size=2 come after train.*eval_on_start"):
        trainer.evaluate()
