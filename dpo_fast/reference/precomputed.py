"""The reference as numbers: its log-probs computed once, kept on disk, found again by every run.

P pairs, S = 2P sequences (all chosen first, then all rejected).
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_fast.faults import reasons_shared
from dpo_fast.files import probe_writable
from dpo_fast.models import Head
from dpo_fast.reference.cache import LogpsCache, default_root
from dpo_fast.reference.fingerprint import digest_of
from dpo_fast.reference.precompute import Precompute, compute_missing, share_of_missing
from dpo_fast.reference.protocol import Batch
from dpo_fast.reference.rows import REF_COLUMNS, RowKeys, row_keys, truncation_of
from dpo_fast.reference.scored import Scoring
from dpo_fast.reference.sources import ReferenceSource

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("dpo_fast")


class PrecomputedReference:
    """Log-probs in the dataset; no model on the accelerator while the policy trains.

    :meth:`attach` every dataset, then :meth:`release`, then train. A dataset that comes later (to
    be evaluated on) may be attached then: the source brings the reference back for as long as it
    is needed.

    Args:
        source: who computes what the cache lacks.
        how: batch size, collator, device, ranks.
        scoring: ``ld_alpha`` weighs the stored sums; ``autocast_dtype`` is a part of the key.
        cache_dir: root of the cache; None: beside the datasets cache.
    """

    name = "precomputed"
    module: nn.Module | None = None

    def __init__(
        self,
        source: ReferenceSource,
        how: Precompute,
        scoring: Scoring | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.source, self.how = source, how
        self.scoring = scoring or Scoring()
        self.root = Path(cache_dir) if cache_dir is not None else default_root()
        self.computed = 0  # rows that this process had to compute

    def cache(self) -> LogpsCache:
        """The cache of this reference, precision and truncation; nothing is read yet."""
        return LogpsCache(
            self.root,
            {
                "reference": self.source.fingerprint(),
                "autocast": str(self.scoring.autocast_dtype).removeprefix("torch."),
                "float32_matmul_precision": torch.get_float32_matmul_precision(),
                "truncation": truncation_of(self.how.collator),
            },
        )

    def attach(self, dataset: "Dataset", name: str = "train") -> "Dataset":
        """``dataset`` with ``ref_chosen_logps`` and ``ref_rejected_logps`` (float32).

        Columns of these names that are there already are replaced, whoever made them.

        Raises:
            ValueError: a stream (IterableDataset), columns missing, a cache that cannot be
            trusted, or a
                reference that cannot be had any more; with the remedy.
            OSError: the cache's folder cannot be written; found before any work.
            KeyboardInterrupt: finished parts are kept; the message says how to go on.
        """
        from datasets import Dataset

        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"reference='precomputed' needs a dataset whose rows can be counted, {name!r} is "
                f"a {type(dataset).__name__}: load it without streaming, or use "
                "reference='frozen' (or 'adapter' with PEFT)."
            )
        present = [column for column in REF_COLUMNS if column in dataset.column_names]
        if present:
            logger.info("%s: columns %s are replaced by this run's reference.", name, present)
            dataset = dataset.remove_columns(present)
        keys = row_keys(dataset, self.how.collator)
        cache = self.cache()
        with reasons_shared():
            values = self._values(dataset, keys, cache, name)
        alpha = 1.0 if self.scoring.ld_alpha is None else self.scoring.ld_alpha
        for i, column in enumerate(REF_COLUMNS):
            sums = (values[:, 2 * i] + alpha * values[:, 2 * i + 1]).astype(np.float32)
            fingerprint = digest_of(dataset._fingerprint, cache.key, alpha, column)[:16]
            dataset = dataset.add_column(column, sums, new_fingerprint=fingerprint)
        return dataset

    def _values(
        self, dataset: "Dataset", keys: RowKeys, cache: LogpsCache, name: str
    ) -> np.ndarray:
        cache.refresh()
        ranks = self.how.ranks
        self._refuse_different_ranks(keys, cache, name)
        missing = int(ranks.any(~cache.has(keys.digests)).sum())
        if not missing:
            log = "%s: reference log-probs of %d pairs found in %s"
            logger.info(log, name, len(keys.digests), cache.folder)
        else:
            logger.info("%s: computing reference log-probs of %d pairs", name, missing)
            probe_writable(cache.folder, "reference cache")
            todo = share_of_missing(keys, cache, self.how)
            with self.source.opened(self.how.device) as reference:
                self.computed += compute_missing(
                    reference, dataset, keys, cache, self.how, name, todo
                )
            self._exchange(keys, cache, todo)
        values, found = cache.lookup(keys.digests)
        assert found.all()
        return values

    def _refuse_different_ranks(self, keys: RowKeys, cache: LogpsCache, name: str) -> None:
        """Raise ValueError unless all ranks are about to score the same rows the same way."""
        mine = cache.key, hashlib.sha256(keys.digests.tobytes()).hexdigest()
        for rank, (key, rows) in enumerate(self.how.ranks.gather(mine)):
            if (key, rows) != mine:
                what = (
                    "the reference or its settings" if key != mine[0] else f"the rows of {name!r}"
                )
                raise ValueError(
                    f"reference='precomputed': {what} differ between rank {rank} and rank "
                    f"{self.how.ranks.rank}. Give every rank the same model, arguments and dataset "
                    "in the same order (ranks get different pairs by themselves)."
                )

    def _exchange(self, keys: RowKeys, cache: LogpsCache, todo: list[np.ndarray]) -> None:
        """Wait for all ranks, read what they stored; what is on another machine's disk is sent."""
        ranks = self.how.ranks
        if ranks.size == 1:
            return
        ranks.barrier()
        cache.refresh()
        lacking = ranks.any(~cache.has(keys.digests))
        if not lacking.any():
            return
        own = np.concatenate(todo) if todo else np.zeros(0, dtype=np.int64)
        sent = keys.digests[own[lacking[own]]]
        for digests, values in ranks.gather((sent, cache.lookup(sent)[0])):
            cache.adopt(digests, values, store=ranks.is_local_main)

    def release(self) -> None:
        """Training begins: the reference leaves the accelerator, and the policy is no longer it."""
        self.source.release()
        if self.how.device.type != "cpu":
            torch.accelerator.empty_cache()

    def logps(self, batch: Batch) -> Tensor:
        """``[S]`` float32 from the batch's columns.

        Raises:
            ValueError: the batch has none.
        """
        missing = [column for column in REF_COLUMNS if column not in batch]
        if missing:
            raise ValueError(
                f"the batch lacks {missing}: this dataset was not given to the precomputed "
                "reference. Pass it as train_dataset or eval_dataset, or to "
                f"trainer.evaluate(dataset), and let the data collator keep {list(REF_COLUMNS)}."
            )
        return torch.cat([batch[column] for column in REF_COLUMNS]).float().detach()

    def hidden(self, batch: Batch) -> tuple[Tensor, Head] | None:
        """None: there is no model."""
        return None

    def on_step_end(self, step: int) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: the cache is on disk, and its key is in the checkpoint's fingerprint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError unless the state is empty."""
        if state:
            raise ValueError(
                f"reference='precomputed' keeps no state, but the checkpoint holds {len(state)} "
                "reference tensors: it was written with reference='ema'. Resume with that, or "
                "start a new run."
            )

    def fingerprint(self) -> str:
        """Of the reference that the log-probs are of."""
        return self.source.fingerprint()

    def describe(self) -> str:
        """What is where."""
        return f"precomputed: log-probs in {self.cache().folder} of {self.source.describe()}"
