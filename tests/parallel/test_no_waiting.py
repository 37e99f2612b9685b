"""A micro-batch never asks the device for a value.

The whole step of ours (policy, reference, LM head, loss, backward, metrics, counts) runs on the
meta device: its tensors have shapes and no values, so that every host sync (`item`, `bool`,
`tolist`, `nonzero`, a copy to the host) raises, and every device-only branch is taken.
"""

import contextlib
import tempfile
from typing import Any

import pytest
import torch

from dpo_fast.config import DPOConfig
from dpo_fast.metrics import MetricBuffer, micro_batch_sums
from dpo_fast.models import install_scoring
from dpo_fast.trainer.counts import BatchCounts
from dpo_fast.trainer.objective import Objective
from dpo_fast.trainer.setup import build_objective_loss
from tests.layouts.compare import AWKWARD, collators
from tests.tiny import tiny_model

LOSSES: tuple[dict[str, Any], ...] = (
    {"loss_type": ["sigmoid"]},
    {"loss_type": ["sigmoid", "sft"]},
    {"loss_type": ["ipo"], "ld_alpha": 0.5},
    {"loss_type": ["hinge"], "use_weighting": True},
    {"loss_type": ["aot"]},
    {"loss_type": ["simpo"]},
)


class OtherModel:
    """A reference that runs a model of its own."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def hidden(self, batch: Any) -> Any:
        from dpo_fast.models import forward_scored

        return forward_scored(self.model, batch, lambda hidden, head: (hidden, head)).value


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_a_micro_batch_runs_without_values(options, stats, monkeypatch):
    # autocast knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    args = DPOConfig(
        tempfile.mkdtemp(), bf16=False, lm_head_backend="chunked", report_to="none", **options
    )
    objective = Objective(args, build_objective_loss(args))
    models = [tiny_model("llama").train().to("meta") for _ in range(2)]
    for model in models:
        assert model.config._attn_implementation == "sdpa"
        install_scoring(model)
    batch = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in collators()["padded"](AWKWARD).items()
    }
    counts = BatchCounts(*torch.tensor([4, 50]).to("meta").unbind())
    output = objective(models[0], batch, OtherModel(models[1]), counts, token_stats=stats)
    output.loss.backward()
    assert all(p.grad is not None for p in models[0].parameters())
    sums = micro_batch_sums(output.fused, output.plan.seq_lens, [1, 2, 3])
    buffer = MetricBuffer()
    buffer.add("train", sums)
    with pytest.raises(Exception, match="meta"):  # the log step is where it waits
        buffer.pop("train")
