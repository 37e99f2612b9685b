"""What the engines refuse, and what they leave as it is, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo_fast.trainer.engines import has_empty_shards, refuse_alike_shards
from tests.parallel.context_worker import make


@pytest.mark.parametrize("ranks", range(1, 9))
def test_empty_shards_are_those_that_chunk_leaves_out(ranks: int) -> None:
    for length in range(1, 40):
        parts = torch.arange(length).chunk(ranks)
        assert has_empty_shards(length, ranks) == (len(parts) < ranks), length


def test_shards_that_accelerate_could_not_tell_apart_are_refused() -> None:
    """One parameter without a shard on some rank is still known by having none; two are not."""
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False))
    refuse_alike_shards(model, 4)
    with pytest.raises(RuntimeError, match=r"over 5 ranks 2 parameters \(0\.weight.*eval_on_start"):
        refuse_alike_shards(model, 5)


def test_stored_logps_stay_float32_under_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers casts what DeepSpeed's bf16 models are given: half a nat of a log-prob of
    -150.
    """
    trainer = make("precomputed, accumulated")
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    trainer.is_deepspeed_enabled = True
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    prepared = trainer._prepare_inputs({**batch, "other": torch.ones(2)})
    assert prepared["other"].dtype == torch.bfloat16
    for key in ("ref_chosen_logps", "ref_rejected_logps"):
        assert torch.equal(prepared[key], batch[key]) and prepared[key].dtype == torch.float32
