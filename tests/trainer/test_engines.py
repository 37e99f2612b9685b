"""What the engines refuse, without an engine."""

import pytest

from dpo_fast.trainer.engines import EnginesMixin


class Base:
    def train(self) -> str:
        return "trained"


class Engines(EnginesMixin, Base):
    pass


def test_training_after_an_evaluation_that_sharded_the_model_is_refused() -> None:
    engines = Engines()
    assert engines.train() == "trained"
    engines._sharded_early = True
    with pytest.raises(RuntimeError, match="eval_on_start=True"):
        engines.train()
