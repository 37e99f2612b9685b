"""The trainer under accelerate's context parallelism: two ranks share each row, one process has the
same losses, metrics and updates.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_fast.batch import SHIFT_KEY, WHOLE_LENS_KEY, TokenPlan
from dpo_fast.trainer.cut_rows import cuttable, refuse_options
from tests.layouts.compare import AWKWARD, collators
from tests.parallel.context_worker import CELLS, make, trained
from tests.parallel.launch import run_ranks
from tests.trainer.parity import METRICS, Run, relative_update_error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("context")
    return run_ranks("tests.parallel.context_worker:context_cells", 2, folder)


@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_train_and_evaluate_as_one_process(ranks: list[Any], name: str) -> None:
    one = trained(make(name))
    for found in (rank[name] for rank in ranks):
        assert len(found["log"]) == len(one["log"]) == 3
        for ours, right in zip(found["log"], one["log"], strict=True):
            for key in METRICS:
                assert ours[key] == pytest.approx(right[key], rel=1e-5, abs=2e-6), key
        runs = (Run(r["before"], r["after"], r["log"], None) for r in (found, one))
        assert relative_update_error(*runs) < 1e-4
        for key in ("eval_loss", *(f"eval_{key}" for key in METRICS if key != "grad_norm")):
            if key in one["eval"]:
                assert found["eval"][key] == pytest.approx(one["eval"][key], rel=1e-5, abs=2e-6), (
                    key
                )
        # each rank had half of the positions
        assert max(found["widths"]) <= 12 and all(width % 2 == 0 for width in found["widths"])


def test_a_batch_that_may_be_cut() -> None:
    batch = collators()["padded"](AWKWARD)
    plan = TokenPlan.from_batch(batch)
    cut = cuttable(batch, 6, pad_token_id=7)
    width = cut["input_ids"].shape[1]
    assert width % 6 == 0 and width - batch["input_ids"].shape[1] < 6
    assert cut[SHIFT_KEY].shape == cut["position_ids"].shape == cut["input_ids"].shape
    assert "attention_mask" not in cut and (cut["position_ids"] == torch.arange(width)).all()
    again = TokenPlan.from_batch(cut)
    assert torch.equal(again.target, plan.target) and again.seq_lens == plan.seq_lens
    assert cut[WHOLE_LENS_KEY] == list(plan.completion_lens) == list(again.completion_lens)
    part = {**cut, **{k: cut[k][:, : width // 2] for k in ("input_ids", SHIFT_KEY)}}
    assert list(TokenPlan.from_batch(part).completion_lens) == list(plan.completion_lens)


def test_left_padding_is_refused() -> None:
    batch = collators()["padded"](AWKWARD)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match=r"padded on the left.*pads on the right"):
        cuttable(batch, 2, pad_token_id=0)


def test_other_tensors_of_whole_rows_are_refused() -> None:
    batch = collators()["padded"](AWKWARD)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(ValueError, match=r"'token_type_ids'.*only input_ids.*leave it out"):
        cuttable(batch, 2, pad_token_id=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_layout", "packed"),
        ("ld_alpha", 0.5),
        ("max_tokens_per_batch", 100),
        ("router_aux_loss_coef", 0.01),
        ("activation_offloading", True),
    ],
)
def test_options_that_need_whole_rows_are_refused(name: str, value: Any) -> None:
    fine = {
        "batch_layout": "auto",
        "ld_alpha": None,
        "max_tokens_per_batch": None,
        "router_aux_loss_coef": None,
        "activation_offloading": False,
    }
    refuse_options(SimpleNamespace(**fine), "cp_size=2")
    for cut_by, size in (("cp_size=2", "cp_size at 1"), ("sp_size=4", "sp_size at 1")):
        rule = f"{name}={value!r} needs whole rows .*{cut_by} cuts.*{size}"
        with pytest.raises(ValueError, match=rule):
            refuse_options(SimpleNamespace(**{**fine, name: value}), cut_by)
