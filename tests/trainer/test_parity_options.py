"""Parity with TRL 1.16: divergences, length weights, WPO, several losses, experts, accumulation,
evaluation.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model
from tests.trainer.cells import STRATEGIES, check_five_adamw_steps, check_one_sgd_step, run_cell
from tests.trainer.parity import METRICS, Run, rows
from tests.trainer.parity_float64 import assert_log_of_trl

OPTIONS: dict[str, dict[str, Any]] = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence", "loss_type": ["ipo"]},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ld": {"ld_alpha": 0.4},
    "ld_sft": {"ld_alpha": 0.4, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "wpo": {"use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "keep_end": {"truncation_mode": "keep_end"},
    "checkpointing": {"gradient_checkpointing": True},
}


# what makes no difference to the reference's log-probs needs no cell of every reference
OF_THE_POLICY = {
    "keep_end": ("frozen",),
    "checkpointing": ("frozen",),
}
CELLS = [(strategy, name) for name in OPTIONS for strategy in OF_THE_POLICY.get(name, STRATEGIES)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("strategy", "name"), CELLS)
def test_one_sgd_step(strategy: str, name: str, tmp_path: Path) -> None:
    check_one_sgd_step(strategy, OPTIONS[name], tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("strategy", "name"), CELLS)
def test_five_adamw_steps(strategy: str, name: str, tmp_path: Path) -> None:
    check_five_adamw_steps(strategy, OPTIONS[name], tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("check", [check_one_sgd_step, check_five_adamw_steps])
def test_mixture_of_experts(strategy: str, check: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    ours, theirs = check(strategy, {}, tmp_path, model=model)
    for mine, expected in zip(ours.log, theirs.log, strict=True):
        assert expected["aux_loss"] > 0
        assert mine["aux_loss"] == pytest.approx(expected["aux_loss"], rel=1e-5)


EVALUATED = [(strategy, {}) for strategy in STRATEGIES]
EVALUATED += [("frozen", OPTIONS[name]) for name in ("forward_kl", "ld", "wpo", "mpo")]


@pytest.mark.parametrize(("strategy", "options"), EVALUATED)
def test_evaluation(strategy: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Two sets after each of two steps, in whole batches: TRL weighs a part of one as a whole."""
    config = {**options, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    sets = {"a": rows(8, seed=5), "b": rows(4, seed=6)}
    ours, theirs, gold = run_cell(strategy, config, tmp_path, eval_dataset=sets)
    measured = tuple(key for key in METRICS if key != "grad_norm")
    assert_log_of_trl(evaluations(ours), evaluations(theirs), lambda: evaluations(gold()), measured)
    for entry in evaluations(theirs).log:  # nothing that TRL reports goes uncompared
        clock = {k for k in entry if k.endswith(("runtime", "per_second", "preparation_time"))}
        assert entry.keys() - clock == set(measured)


def evaluations(run: Run) -> Run:
    """``run`` with the lines of its evaluations as log, without ``eval_`` and the set's name."""
    log = [
        {re.sub("^eval_([ab]_)?", "", k): v for k, v in line.items() if k.startswith("eval_")}
        for line in run.trainer.state.log_history
    ]
    log = [line for line in log if line]
    assert len(log) == 4
    return dataclasses.replace(run, log=log)
