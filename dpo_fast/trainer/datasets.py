"""The trainer's data sets: checked, tokenised, and given reference log-probs where those are
computed beforehand.
"""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from dpo_fast.config import DPOConfig
from dpo_fast.data.prepare import prepare_dataset
from dpo_fast.data.report import PrepareReport
from dpo_fast.data.token_range import check_token_range
from dpo_fast.reference import PrecomputedReference, ReferencePlan, build_reference
from dpo_fast.trainer.checkpointing import ReferenceCallback

logger = logging.getLogger("dpo_fast")


class DatasetsMixin:
    """Part of :class:`dpo_fast.Trainer`: raw data sets in, batches' rows out, also for
    ``evaluate``.
    """

    args: Any
    model: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    reference: Any

    @staticmethod
    def check_train_dataset(dataset: Any, args: DPOConfig) -> None:
        """TRL's errors for TRL's mistakes; streams are never dispatched from rank 0 (their batches
        are ragged).

        Raises:
            ValueError: no dataset. TypeError: not a ``datasets`` object.
        """
        from datasets import Dataset, IterableDataset

        if dataset is None:
            raise ValueError(
                "train_dataset is required: pass a datasets.Dataset or IterableDataset."
            )
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                "train_dataset must be a datasets.Dataset or IterableDataset, got "
                f"{type(dataset).__name__}: "
                "datasets.Dataset.from_list(rows) makes one from a list of dicts."
            )
        # Batches that rank 0 reads and cuts up for the others would be cut by the row, plan and
        # all; also a stream that comes later, to be evaluated on.
        accelerator_config: Any = args.accelerator_config
        if accelerator_config.dispatch_batches:
            logger.warning(
                "dispatch_batches=True is set to False: batches are made of whole pairs."
            )
        accelerator_config.dispatch_batches = False

    def configure_data(self, args: DPOConfig, tokenizer: Any, vocab_size: int) -> None:
        """Remember what preparation needs; ``self.args`` does not exist before the base class is
        built.
        """
        self._data_args, self._tokenizer, self._vocab_size = args, tokenizer, vocab_size
        self.prepare_reports: dict[str, PrepareReport] = {}

    def prepare(self, dataset: Any, name: str) -> Any:
        """``dataset`` with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``; see
        :func:`prepare_dataset`.
        """
        args = self._data_args
        prepared, report = prepare_dataset(
            dataset,
            self._tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            name=name,
            tokenise=self.tokenise_with(name),
        )
        self.prepare_reports[name] = report
        if hasattr(prepared, "__len__"):  # a stream is checked batch by batch, by the LM head
            check_token_range(prepared, self._vocab_size, name)
        return prepared

    def tokenise_with(self, name: str) -> Callable[[Any], Any] | None:
        """What tokenises the dataset ``name``; None: :func:`prepare_dataset` itself."""
        return None

    def prepare_eval(self, dataset: Any) -> Any:
        """One evaluation set or a dict of them, prepared; None stays None."""
        if isinstance(dataset, dict):
            return {name: self.prepare(one, name) for name, one in dataset.items()}
        return None if dataset is None else self.prepare(dataset, "eval")

    def start_reference(self, plan: ReferencePlan, ref_model: nn.Module | None) -> None:
        """Build the reference and, where it is precomputed, give its log-probs to every data
        set.
        """
        self.reference = build_reference(
            plan,
            self.args,
            policy=self.model,
            ref_model=ref_model,
            collator=self.batch_collator,  # type: ignore[attr-defined]
            train_dataset=self.train_dataset,
            log=self.is_world_process_zero(),  # type: ignore[attr-defined]
        )
        if self.reference is None:
            return
        self.train_dataset = self.attach(self.train_dataset, "train")
        self.eval_dataset = self.attach(self.eval_dataset, "eval")
        if isinstance(self.reference, PrecomputedReference):
            self.reference.release()
        self.add_callback(ReferenceCallback(self.reference))  # type: ignore[attr-defined]

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference as a model, or None where none is held (adapters, precomputed,
        reference-free).
        """
        return getattr(self.reference, "module", None)

    def attach(self, dataset: Any, name: str) -> Any:
        """Add ``ref_chosen_logps`` and ``ref_rejected_logps`` where the reference is
        precomputed.
        """
        if not isinstance(self.reference, PrecomputedReference) or dataset is None:
            return dataset
        if isinstance(dataset, dict):
            return {key: self.reference.attach(one, key) for key, one in dataset.items()}
        return self.reference.attach(dataset, name)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in transformers; a data set given here may be raw, and is prepared like those of the
        constructor.
        """
        if eval_dataset is None or isinstance(eval_dataset, str):
            return self._evaluate_prepared(eval_dataset, ignore_keys, metric_key_prefix)
        prepared = self.attach(self.prepare_eval(eval_dataset), "eval")
        if not isinstance(prepared, dict):
            return self._evaluate_prepared(prepared, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, one in prepared.items():
            prefix = f"{metric_key_prefix}_{name}"
            metrics |= self._evaluate_prepared(one, ignore_keys, prefix)
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> Any:
        """As in transformers, with logits ``[2P, T, V]`` as predictions; the data set may be raw,
        as for :meth:`evaluate`, and the metrics are those of ``evaluate`` under the prefix.
        """
        prepared = self.attach(self.prepare(test_dataset, "test"), "test")
        output = super().predict(prepared, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        metrics = self.evaluation_metrics()  # type: ignore[attr-defined]
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    def _evaluate_prepared(
        self, dataset: Any, ignore_keys: list[str] | None, prefix: str
    ) -> dict[str, float]:
        return super().evaluate(dataset, ignore_keys, prefix)  # type: ignore[misc]
