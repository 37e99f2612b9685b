"""Parity with TRL 1.16, every loss, reference strategy: frozen."""

from pathlib import Path

import pytest

from tests.trainer.cells import LOSSES, check_five_adamw_steps, check_one_sgd_step


@pytest.mark.parametrize("loss", LOSSES)
def test_one_sgd_step(loss: str, tmp_path: Path) -> None:
    check_one_sgd_step("frozen", LOSSES[loss], tmp_path)


@pytest.mark.parametrize("loss", LOSSES)
def test_five_adamw_steps(loss: str, tmp_path: Path) -> None:
    check_five_adamw_steps("frozen", LOSSES[loss], tmp_path)
