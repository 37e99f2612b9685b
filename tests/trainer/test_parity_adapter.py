"""Parity with TRL 1.16, every loss, reference strategy: adapter."""

from pathlib import Path

import pytest

from tests.trainer.cells import LOSSES, check_five_adamw_steps, check_one_sgd_step


@pytest.mark.parametrize("loss", LOSSES)
def test_one_sgd_step(loss: str, tmp_path: Path) -> None:
    check_one_sgd_step("adapter", LOSSES[loss], tmp_path)


@pytest.mark.parametrize("loss", LOSSES)
def test_five_adamw_steps(loss: str, tmp_path: Path) -> None:
    check_five_adamw_steps("adapter", LOSSES[loss], tmp_path)
