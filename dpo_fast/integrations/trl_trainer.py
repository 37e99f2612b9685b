"""``FastDPOTrainer``: TRL's DPOTrainer to the outside; dpo_fast's step, layouts, references inside.

``isinstance(trainer, trl.DPOTrainer)`` holds, TRL's own data preparation runs, and what subclasses
of TRL's trainer override or read (``_prepare_dataset``, ``_compute_loss``, ``_metrics``,
``compute_ref_log_probs``, ``beta``, ...) means what it means there. TRL's constructor does not run:
it would load a second copy of the reference and replace the model's forward.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn

from dpo_fast.integrations.interface import InterfaceChanged, check_parameters
from dpo_fast.metrics import MetricBuffer
from dpo_fast.reference import PrecomputedReference
from dpo_fast.trainer import Trainer
from dpo_fast.trainer.counts import BatchCounts

try:
    import trl
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(
        "dpo_fast.integrations.FastDPOTrainer needs TRL, which is not installed: pip install "
        "'trl>=1.16', or use dpo_fast.Trainer, which takes the same arguments."
    ) from error

# Methods of TRL's trainer between ours and transformers': those that ours pass on to transformers,
# those that are written anew here or in dpo_fast.Trainer, and those that run as TRL has them.
PASSED_BY = ("__init__", "training_step", "log", "evaluate", "_save_checkpoint")
REPLACED = ("compute_loss", "prediction_step", "_set_signature_columns_if_needed")
PREPARE = ("self", "dataset", "processing_class", "args", "dataset_name")


def check_interface() -> None:
    """TRL's DPOTrainer overrides nothing of transformers' Trainer that is not known here.

    Raises:
        InterfaceChanged: with the version seen.
    """
    seen = f"trl {trl.__version__}"
    prepare = getattr(trl.DPOTrainer, "_prepare_dataset", None)
    check_parameters(prepare, PREPARE, "trl.DPOTrainer._prepare_dataset", seen)
    unknown = [
        name
        for name, value in vars(trl.DPOTrainer).items()
        if inspect.isfunction(value)
        and hasattr(transformers.Trainer, name)
        and name not in PASSED_BY + REPLACED
    ]
    if unknown:
        raise InterfaceChanged(
            f"trl.DPOTrainer of {seen} also overrides {', '.join(unknown)} of transformers' "
            "Trainer, which FastDPOTrainer does not know: use a version of trl that this dpo_fast "
            "was tested with, or dpo_fast.Trainer."
        )


class BelowTrl(trl.DPOTrainer):
    """Stands before TRL's trainer in the order of classes and hands on to what lies behind it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super(trl.DPOTrainer, self).__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers: activation offloading is dpo_fast's."""
        return super(trl.DPOTrainer, self).training_step(*args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers: the metrics are in the line already."""
        super(trl.DPOTrainer, self).log(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers: the data set is prepared already."""
        return super(trl.DPOTrainer, self).evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers: the model card goes into the checkpoint's stage."""
        super(trl.DPOTrainer, self)._save_checkpoint(*args, **kwargs)


class TrlMetrics(MetricBuffer):
    """dpo_fast's sums, and TRL's ``_metrics[mode][key]`` lists for what a subclass adds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lists: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }

    def __getitem__(self, mode: str) -> defaultdict[str, list[float]]:
        return self._lists[mode]

    def pop_lists(self, mode: str) -> dict[str, float]:
        """Mean of each list since the last call."""
        means = {key: sum(values) / len(values) for key, values in self._lists[mode].items()}
        self._lists[mode].clear()
        return means


class TrlInterface(Trainer):
    """What code written for TRL's DPOTrainer calls, reads and overrides, on dpo_fast's step."""

    _is_vlm = _is_vision_dataset = False
    metric_buffer = TrlMetrics
    _metrics: TrlMetrics
    _counts: BatchCounts | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_interface()
        super().__init__(*args, **kwargs)
        own = self.args
        self.precompute_ref_logps = isinstance(self.reference, PrecomputedReference)
        self.beta, self.ld_alpha = own.beta, own.ld_alpha
        self.loss_types = own.loss_type
        self.loss_weights = own.loss_weights or [1.0] * len(own.loss_type)
        self.label_smoothing, self.use_weighting = own.label_smoothing, own.use_weighting
        self.f_divergence_type = own.f_divergence_type
        self.f_alpha_divergence_coef = own.f_alpha_divergence_coef

    def tokenise_with(self, name: str) -> Callable[[Any], Any]:
        """``self._prepare_dataset``: TRL's, or a subclass's."""
        prepare = self._prepare_dataset  # type: ignore[attr-defined]
        return lambda dataset: prepare(dataset, self._tokenizer, self._data_args, name)

    # -- one step ----------------------------------------------------------------------------------

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: BatchCounts | None = None,
    ) -> Any:
        """Calls ``_compute_loss``, which subclasses of TRL's trainer override."""
        self._counts = num_items_in_batch
        return self._compute_loss(model, inputs, return_outputs)

    def _compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> Any:
        """As ``dpo_fast.Trainer.compute_loss``: the micro-batch's share of the step's mean."""
        return super().compute_loss(model, inputs, return_outputs, self._counts)

    def compute_ref_log_probs(
        self, model: nn.Module | None, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """``(chosen [P], rejected [P])`` of the run's reference; ``model`` is not used.

        Raises:
            ValueError: the loss needs no reference, so there is none.
        """
        if self.reference is None:
            raise ValueError(
                f"loss_type={self.args.loss_type} needs no reference, so none is held: set "
                "reference='frozen' to have one."
            )
        chosen, rejected = self.reference.logps(inputs).chunk(2)
        return chosen, rejected

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int | None = None) -> Any:
        """``dataset`` with the columns of precomputed log-probs, of dpo_fast's cache."""
        return self.attach(dataset, name)

    # -- logs --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in ``dpo_fast.Trainer``, with the means of what subclasses put into ``_metrics``."""
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        added = self._metrics.pop_lists(mode)
        # in place: `evaluate` returns this very dict
        logs.update({prefix + key: value for key, value in added.items()})
        super().log(logs, start_time)

    def evaluation_metrics(self) -> dict[str, float]:
        """As in ``dpo_fast.Trainer``, with those means."""
        return super().evaluation_metrics() | self._metrics.pop_lists("eval")


class FastDPOTrainer(TrlInterface, BelowTrl):  # type: ignore[misc]  # ours win
    """A ``trl.DPOTrainer`` with dpo_fast's LM head, batch layouts, references and metrics.

    Same constructor, data formats, metric keys and callbacks as TRL 1.16's, and the same numbers; a
    ``trl.DPOConfig`` does, and a :class:`dpo_fast.DPOConfig` has the options that TRL lacks
    (``reference``, ``batch_layout``, ...). It is a :class:`dpo_fast.Trainer` as well: whatever that
    class documents holds, whole checkpoints and exact resume included. Use this one where code asks
    ``isinstance(trainer, trl.DPOTrainer)``, or where a subclass of TRL's trainer is to be kept: put
    it in the place of its base.

    What differs from ``dpo_fast.Trainer``: the rows are tokenised by TRL's ``_prepare_dataset``,
    and ``_compute_loss`` and ``_metrics`` may be overridden and added to as in TRL.

    Raises:
        InterfaceChanged: TRL's trainer has hooks that this class does not know, with the version.
        Otherwise as :class:`dpo_fast.Trainer`.
    """
