"""Fixtures of the references' tests."""

from typing import Any

import pytest
import torch

from dpo_fast.reference.scored import ScoredReference


@pytest.fixture
def forwards(monkeypatch: Any) -> list[int]:
    """Pairs of each reference forward of the test."""
    seen: list[int] = []
    original = ScoredReference.token_logps

    def counted(self: ScoredReference, batch: Any) -> torch.Tensor:
        seen.append(len(batch["seq_lens"]) // 2)
        return original(self, batch)

    monkeypatch.setattr(ScoredReference, "token_logps", counted)
    return seen
