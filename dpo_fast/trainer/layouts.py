"""The trainer's batch layout: chosen at construction, its attention set while it is needed.

Legend: P pairs, K micro-batches of an optimizer step.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpo_fast.batch import PlannedCollator
from dpo_fast.layouts import (
    LayoutChoice,
    TokenBalancedSampler,
    TokenBudget,
    choose_layout,
    collect_rows,
    make_collator,
    pair_lengths,
    segment_attention_in,
)
from dpo_fast.layouts.choose import why_not_joined
from dpo_fast.layouts.joined_rows import join_rows
from dpo_fast.layouts.lengths import PairLengths
from dpo_fast.models.attention_softcap import warn_if_softcap_is_left_out
from dpo_fast.row_groups import group_rows
from dpo_fast.trainer.counts import BatchCounts, local_counts, on_device

MICRO_BATCHES = "micro_batches"
Collator = Callable[[list[Any]], Any]


class LayoutsMixin:
    """Part of :class:`dpo_fast.Trainer`: collators, attention, micro-batches by token budget."""

    args: Any
    accelerator: Any
    model: Any
    compute_metrics: Any
    reference: Any = None
    data_collator: Any
    train_dataset: Any
    layout: LayoutChoice
    batch_collator: Collator
    _joins_rows: bool

    def init_layout(self, data_collator: Collator | None, ref_model: nn.Module | None) -> None:
        """Choose layout and collators; called when the model is on its device and not sharded.

        Sets ``layout``; ``batch_collator``, which makes the batches of every forward;
        ``data_collator``, which the training loader calls.

        Raises:
            ValueError: a token budget that cannot work with this run.
        """
        args = self.args
        lengths = self._train_lengths() if args.batch_layout != "padded" else None
        self.layout = choose_layout(
            args.batch_layout,
            self.model,
            ref_model=ref_model,
            lengths=lengths,
            batch_size=args.per_device_train_batch_size,
            unsupported=self._why_padded(data_collator),
        )
        self._joins_rows = (
            not self.layout.is_packed
            and self._plans_rows()
            and self._why_padded(data_collator) is None
            and why_not_joined(self.model, ref_model) is None
        )
        if not self.layout.is_packed and not self._joins_rows:
            for model in filter(None, (self.model, ref_model)):
                warn_if_softcap_is_left_out(model)
        if data_collator is not None:
            self.batch_collator = PlannedCollator(data_collator, plan_rows=self._row_planner())
        else:
            self.batch_collator = self._collator(self.layout)
        self.data_collator = self.loader_collator(self.batch_collator)  # type: ignore[attr-defined]
        self._budget = self._token_budget()
        if self._budget is not None:
            self.data_collator = collect_rows

    def _collator(self, layout: LayoutChoice) -> Collator:
        args, tokenizer = self.args, self.processing_class  # type: ignore[attr-defined]
        return make_collator(
            layout,
            pad_token_id=tokenizer.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
            few_shapes=args.device.type != "cpu",
            plan_rows=self._row_planner(),
        )

    def _row_planner(self) -> Callable[[Tensor, Tensor], Any] | None:
        """How padded rows go through the backbone; None: all at once."""
        if not self._plans_rows():
            return None
        return join_rows if self._joins_rows else group_rows

    def _plans_rows(self) -> bool:
        """Whether padded rows run joined, or in groups: on a CPU, with the weights whole."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # type: ignore[attr-defined]
        return self.args.device.type == "cpu" and not sharded

    def _why_padded(self, data_collator: Collator | None) -> str | None:
        if data_collator is not None:
            return "the data collator is the caller's own"
        if self.cut_by is not None:  # type: ignore[attr-defined]
            return f"{self.cut_by} cuts rows along their positions"  # type: ignore[attr-defined]
        return None

    def _train_lengths(self) -> PairLengths | None:
        if not hasattr(self.train_dataset, "__len__"):
            return None
        return pair_lengths(self.train_dataset, self.args.max_length, self.args.truncation_mode)

    # -- attention ---------------------------------------------------------------------------------

    def layout_attention(self) -> contextlib.AbstractContextManager[None]:
        """Inside, policy and reference attend within the segments of packed or joined rows.

        ``train``, ``evaluate`` and ``predict`` are inside by themselves; whoever calls
        ``compute_loss`` or a model on packed batches enters it, backward included.
        """
        if not self.layout.is_packed and not self._joins_rows:
            return contextlib.nullcontext()
        return segment_attention_in(self.model, getattr(self.reference, "module", None))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the models' attention is what it was afterwards."""
        with self.layout_attention():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, in the run's layout."""
        with self.layout_attention():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    # -- loaders -----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in transformers; with a token budget ranks get about as many tokens in every step."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        lengths = self._train_lengths() if self._budget is not None else None
        num_ranks = getattr(getattr(loader, "batch_sampler", None), "num_processes", 1)
        if lengths is None or num_ranks == 1:
            return loader
        from accelerate.data_loader import get_sampler

        shares = self.layout.name == "shared_prefix"
        weights = lengths.shared_prefix if shares else lengths.packed
        sampler = TokenBalancedSampler(
            get_sampler(loader),
            weights.tolist(),
            batch_size=self.args.per_device_train_batch_size,
            num_ranks=num_ranks,
            accumulation=self.args.gradient_accumulation_steps,
        )
        loader.set_sampler(sampler)
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """As in transformers; rows are padded where ``compute_metrics`` wants their logits."""
        with self._evaluation_collator(logits=self.compute_metrics is not None):
            return super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """As in transformers; rows are padded, since predictions are logits."""
        with self._evaluation_collator(logits=True):
            return super().get_test_dataloader(*args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _evaluation_collator(self, *, logits: bool) -> Iterator[None]:
        before = self.data_collator
        padded = LayoutChoice("padded", "logits are [2P, T, V]")
        self.data_collator = (
            self._collator(padded) if logits and self.layout.is_packed else self.batch_collator
        )
        try:
            yield
        finally:
            self.data_collator = before

    # -- token budget ------------------------------------------------------------------------------

    def _token_budget(self) -> TokenBudget | None:
        limit = self.args.max_tokens_per_batch
        if limit is None:
            return None
        if not self.loss.separable:  # type: ignore[attr-defined]
            raise ValueError(
                f"max_tokens_per_batch={limit} cuts micro-batches by tokens, but the loss "
                f"{', '.join(map(str, self.args.loss_type))} couples the pairs of a micro-batch: "
                "leave max_tokens_per_batch unset"
            )
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            raise ValueError(
                f"max_tokens_per_batch={limit} runs a varying number of micro-batches a step, and "
                "DeepSpeed counts them itself: leave it unset, or use FSDP2 or DDP"
            )
        return TokenBudget(self.batch_collator, limit)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of an optimizer step, and its counts over all ranks.

        With a token budget, the rows of all of them are cut into K micro-batches, as many on every
        rank, that run in the last one's ``training_step``.
        """
        if self._budget is None:
            return super().get_batch_samples(  # type: ignore[misc]
                epoch_iterator, num_batches, device
            )
        loaded = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not loaded:
            return [], None
        rows = [row for batch in loaded for row in batch["rows"].rows]
        batches = self._budget.cut(rows)
        counts, most = self._exchange(batches, device)
        batches = self._budget.fill(batches, most)
        return [{MICRO_BATCHES: []} for _ in loaded[1:]] + [{MICRO_BATCHES: batches}], counts

    def _exchange(self, batches: list[Any], device: torch.device) -> tuple[BatchCounts, int]:
        """Counts over the ranks, and the largest K of any rank: one collective, and one wait,
        since the host must know how often to forward.
        """
        mine = local_counts(batches)
        ranks = self.accelerator.num_processes
        if ranks == 1:
            return BatchCounts(*mine), len(batches)
        table = self.accelerator.gather(on_device((*mine, len(batches)), device)).view(ranks, 3)
        pairs, tokens = table[:, :2].sum(dim=0) // self.ranks_per_pair  # type: ignore[attr-defined]
        return BatchCounts(pairs, tokens), int(table[:, 2].max())

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One forward and backward, or those of all micro-batches that a token budget made."""
        step = super().training_step  # type: ignore[misc]
        if MICRO_BATCHES not in inputs:
            return step(model, inputs, num_items_in_batch)
        total = torch.zeros((), device=self.args.device)
        batches = inputs[MICRO_BATCHES]
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            unsynced = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with unsynced:
                total = total + step(model, batch, num_items_in_batch)
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate, of all micro-batches."""
        estimate = super().floating_point_ops  # type: ignore[misc]
        return sum(estimate(batch) for batch in inputs.get(MICRO_BATCHES, [inputs]))
