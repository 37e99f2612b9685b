"""Ranks that fill one cache, as functions of plain arguments."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from dpo_fast.ranks import all_ranks
from dpo_fast.reference.precompute import Precompute
from dpo_fast.reference.precomputed import PrecomputedReference
from dpo_fast.reference.scored import ScoredReference
from dpo_fast.reference.sources import PolicySource
from tests.reference.common import collator, token_rows
from tests.tiny import tiny_model

ROWS, BATCH, PART = 41, 4, 8


def fill(out: str, cache: str, options: dict[str, Any]) -> None:
    """Attach ``ROWS`` rows; leaves values and counts in ``<out>.<rank>.json``.

    Options: ``dies``, {rank: forwards after which it is killed}; ``fails``, the rank whose
    log-probs are NaN; ``own_disk``, every rank's cache in a folder of its own; ``other_data``, the
    rank that has other rows; ``batch``; ``meet``, a folder in which so many processes wait for each
    other before their first forward.
    """
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    ranks = all_ranks()
    _arm(options, ranks.rank)
    root = f"{cache}{ranks.rank}" if options.get("own_disk") else cache
    seed = 1 if options.get("other_data") == ranks.rank else 0
    how = Precompute(
        collator(14), options.get("batch", BATCH), torch.device("cpu"), ranks, part_rows=PART
    )
    reference = PrecomputedReference(PolicySource(tiny_model()), how, None, root)
    data = reference.attach(Dataset.from_list(token_rows(ROWS, seed)))
    values = [np.array(data[c]).tolist() for c in ("ref_chosen_logps", "ref_rejected_logps")]
    facts = {"values": values, "computed": reference.computed, "tokens": sum(_POSITIONS)}
    Path(f"{out}.{ranks.rank}.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.destroy_process_group()


_POSITIONS: list[int] = []


def _arm(options: dict[str, Any], rank: int) -> None:
    original = ScoredReference.token_logps
    dies = {int(r): n for r, n in options.get("dies", {}).items()}
    meet: Callable[[], None] = _meeting(*options["meet"]) if "meet" in options else lambda: None

    def watched(self: Any, batch: Any) -> torch.Tensor:
        if not _POSITIONS:
            meet()
        _POSITIONS.append(batch["executed_tokens"])
        if len(_POSITIONS) > dies.get(rank, 10**9):
            os.kill(os.getpid(), signal.SIGKILL)
        logps = original(self, batch)
        return logps * float("nan") if options.get("fails") == rank else logps

    ScoredReference.token_logps = watched  # type: ignore[method-assign]


def _meeting(folder: str, size: int) -> Callable[[], None]:
    def wait() -> None:
        (Path(folder) / str(os.getpid())).touch()
        while len(list(Path(folder).iterdir())) < size:
            time.sleep(0.005)

    return wait
