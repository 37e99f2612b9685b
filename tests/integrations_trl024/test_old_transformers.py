"""What of dpo_fast works with the transformers that these frameworks pin, and what refuses it."""

import pytest
import transformers

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from tests.integrations_trl024.support import classic_trl

classic_trl()


def test_everything_is_imported() -> None:
    for name in ("functional", "losses", "batch", "models", "integrations", "data"):
        getattr(dpo_fast, name)
    for name in dpo_fast.integrations.__all__:
        getattr(dpo_fast.integrations, name)


def test_the_trainers_name_the_version_that_they_need() -> None:
    assert transformers.__version__.startswith("4.")
    found = rf"transformers >= 5\.\d+, found {transformers.__version__}"
    with pytest.raises(ImportError, match=found):
        dpo_fast.Trainer("no-model")
    with pytest.raises(InterfaceChanged, match=r"trl\.DPOTrainer of trl 0\.\S+ also overrides"):
        dpo_fast.integrations.FastDPOTrainer("no-model")
