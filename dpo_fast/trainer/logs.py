"""The trainer's metrics and its log lines: TRL's keys, perf/*, one host sync a log step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dpo_fast.functional import filter_report
from dpo_fast.metrics import MetricBuffer, NonFinite, micro_batch_sums
from dpo_fast.perf import PerfMeter
from dpo_fast.trainer.objective import ObjectiveOutput


class LogsMixin:
    """Part of :class:`dpo_fast.Trainer`: collects metrics without syncs and logs them."""

    args: Any
    accelerator: Any
    model: Any
    state: Any

    metric_buffer: type[MetricBuffer] = MetricBuffer

    def init_logs(self) -> None:
        """Called once, when the accelerator exists."""
        ranks = self.accelerator.num_processes
        self._metrics = self.metric_buffer(
            None if ranks == 1 else self._sum_over_ranks,
            rank=self.accelerator.process_index,
            num_ranks=ranks,
            copies=self.ranks_per_pair,  # type: ignore[attr-defined]
            eval_copies=self.ranks_per_eval_pair,  # type: ignore[attr-defined]
        )
        self._perf = PerfMeter(self.model)

    def _sum_over_ranks(self, table: Tensor) -> Tensor:
        return self.accelerator.reduce(table, reduction="sum")

    def wants_token_stats(self) -> bool:
        """Whether this micro-batch's step ends with a log line (or every step shall have the
        statistics).
        """
        mode = self.args.token_stats
        if mode != "log_steps" or not self.model.training:
            return mode != "never"
        return is_log_step(self.args, self.state, self.state.global_step + 1)

    def record(self, output: ObjectiveOutput, token_counts: Sequence[int]) -> None:
        """Keep one micro-batch's sums on the device; ``token_counts`` as in ``COUNT_KEYS``."""
        mode = "train" if self.model.training else "eval"
        sums = micro_batch_sums(output.fused, output.plan.seq_lens, token_counts, output.aux_loss)
        step = self.state.global_step + 1
        self._metrics.add(mode, sums, step=step, has_aux=output.aux_loss is not None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, with TRL's names, and hand over to transformers.

        Raises:
            FloatingPointError: a training loss since the last log was NaN or infinite
                (``logging_nan_inf_filter=True`` lets the run go on).
        """
        mode = "train" if self.model.training else "eval"
        popped = self._metrics.pop(mode)
        if popped is not None:
            metrics, counts = popped
            if mode == "train":
                metrics |= self._perf.lap(counts)
                if self.args.lm_head_filter_bound is not None:
                    metrics |= _filtered_share()
            prefix = "eval_" if mode == "eval" else ""
            logs.update({prefix + key: value for key, value in metrics.items()})
        super().log(logs, start_time)  # type: ignore[misc]
        if popped is not None and mode == "train":
            self._refuse_nonfinite(popped[1].nonfinite)

    def evaluation_metrics(self) -> dict[str, float]:
        """The metrics of an evaluation that nobody logs: taken, so that no later one has them."""
        popped = self._metrics.pop("eval")
        return {} if popped is None else popped[0]

    def refuse_nonfinite_loss(self) -> None:
        """Raise if a training loss since the last log was not finite: before a checkpoint.

        Raises:
            FloatingPointError: as :meth:`log`.
        """
        self._refuse_nonfinite(self._metrics.nonfinite("train"))

    def _refuse_nonfinite(self, found: Sequence[NonFinite]) -> None:
        if not found or self.args.logging_nan_inf_filter or self.args.fp16:
            return  # fp16's loss scaler skips such steps by itself
        first = min(step for _, step in found)
        ranks = [str(rank) for rank, step in found if step == first]
        later = len(found) - len(ranks)
        more = f", later on {later} more" if later else ""
        raise FloatingPointError(
            f"The loss was NaN or infinite at step {first} on rank {', '.join(ranks[:8])}"
            f"{' and others' if len(ranks) > 8 else ''}{more}. "
            "Lower the learning rate or max_grad_norm, look at the rows of that step, or train in "
            "fp32; the last complete checkpoint is untouched. logging_nan_inf_filter=True goes on "
            "regardless."
        )


def _filtered_share() -> dict[str, float]:
    """What the filtered LM head of this rank kept since the last log."""
    report = filter_report()
    return {} if report is None else {f"lm_head/{k}": v for k, v in report._asdict().items()}


def is_log_step(args: TrainingArguments, state: Any, step: int) -> bool:
    """Whether transformers' default flow logs after optimizer step ``step`` (1-based).

    With an epoch strategy the last step of an epoch is not known here: every step counts.
    """
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % max(int(state.logging_steps or 1), 1) == 0
    return args.logging_strategy == IntervalStrategy.EPOCH
