"""A folder with a model, another one, and pairs; and a logger that is left as it was."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import save_tiny, tiny_preferences


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``other`` (different weights), ``train.jsonl`` (12 pairs), ``eval.jsonl`` (4)."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=5)
    for name, count, seed in (("train", 12, 0), ("eval", 4, 1)):
        rows = tiny_preferences(count, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("dpo_fast")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
