"""``trainer_cls`` for Axolotl: its own DPO trainer and ours, called as its builder calls them."""

import inspect
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from tests.peers import absent
from tests.sgd import run, sgd_arguments
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import perturbed, rows

pytest.importorskip("axolotl", reason="axolotl is not installed: make test-integrations")
NAME = "dpo_fast.integrations.axolotl.FastAxolotlDPOTrainer"


@pytest.fixture(scope="module", autouse=True)
def _without_numba() -> Iterator[None]:
    """Axolotl's packing sampler, which DPO does not use, wants numba's decorator when imported."""
    with pytest.MonkeyPatch.context() as patched:
        absent(patched, "numba", njit=lambda function: function)
        yield


def configuration(**own: Any) -> Any:
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig

    fields = {
        "logging_first_step": True,
        "beta": 0.2,
        "max_length": 24,
        "remove_unused_columns": False,
    }
    return AxolotlDPOConfig(**sgd_arguments(**fields, **own))


def train(cls: Any, **own: Any) -> tuple[Any, list[dict[str, Any]], torch.Tensor]:
    """As ``HFRLTrainerBuilder.build`` calls the class."""
    model = tiny_model()
    assert "tokenizer" not in inspect.signature(cls).parameters
    trainer = cls(
        model,
        perturbed(model),
        args=configuration(**own),
        train_dataset=rows(16),
        callbacks=[],
        processing_class=tiny_tokenizer(),
    )
    return trainer, *run(trainer)


@pytest.mark.parametrize("own", [{}, {"gradient_accumulation_steps": 2, "loss_type": ["ipo"]}])
def test_same_training_as_axolotls_own(own: dict[str, Any]) -> None:
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
    from axolotl.utils.import_helper import get_cls_from_module_str

    cls = get_cls_from_module_str(NAME)
    trainer, log, update = train(cls, **own)
    _, expected, expected_update = train(AxolotlDPOTrainer, **own)
    assert isinstance(trainer, AxolotlDPOTrainer) and isinstance(trainer, dpo_fast.Trainer)
    assert len(log) == len(expected) == 3
    for mine, theirs in zip(log, expected, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5, abs=2e-5), key
    assert (update - expected_update).norm() <= 1e-5 * expected_update.norm()


def test_axolotls_options_reach_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_fast.integrations.axolotl import FastAxolotlDPOTrainer

    class Own(FastAxolotlDPOTrainer):  # type: ignore[misc, valid-type]
        options = {"batch_layout": "shared_prefix", "reference": "precomputed"}

    model = tiny_model()
    monkeypatch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp())
    trainer = Own(
        model,
        None,
        args=configuration(),
        precompute_ref_log_probs=True,  # as Axolotl passes it
        train_dataset=rows(8),
        processing_class=tiny_tokenizer(),
    )
    assert trainer.layout.name == "shared_prefix" and trainer.precompute_ref_logps
    assert trainer.args.lr_scheduler_type == "constant"
    assert hasattr(trainer.args, "loraplus_lr_ratio"), "Axolotl's own fields are gone"
    trainer.train()
    with pytest.raises(ValueError, match="batch_lay"):
        type("Typo", (FastAxolotlDPOTrainer,), {"options": {"batch_lay": 1}})(
            model, None, args=configuration(), train_dataset=rows(8)
        )


def test_no_garbage_collection_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.core.trainers.dpo import trainer as module

    from dpo_fast.integrations.axolotl import FastAxolotlDPOTrainer

    def refuse() -> None:
        raise AssertionError("gc.collect() in a training step")

    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=refuse))
    train(FastAxolotlDPOTrainer)


def test_another_trainer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from axolotl.core.trainers.dpo import trainer as module

    monkeypatch.delitem(sys.modules, "dpo_fast.integrations.axolotl", raising=False)
    monkeypatch.setattr(module, "AxolotlDPOTrainer", None)
    with pytest.raises(InterfaceChanged, match=r"AxolotlDPOTrainer of axolotl 0\.19\.0 is None"):
        __import__("dpo_fast.integrations.axolotl", fromlist=["FastAxolotlDPOTrainer"])
