"""`dpo-fast precompute`: the reference's log-probs, computed once, for every training to come."""

import logging
import tempfile
from typing import TYPE_CHECKING, Any

from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.logs import is_main_process, show_logs

if TYPE_CHECKING:
    from dpo_fast.cli.parser import Arguments
    from dpo_fast.trainer import Trainer

logger = logging.getLogger("dpo_fast")

DESCRIPTION = (
    "Compute the reference's log-probs of the pairs and store them, as `dpo-fast train --reference "
    "precomputed` would before its first step. Takes the options of train; those that do not "
    "change the values (learning rate, batch size, output folder) do not matter. What is there "
    "already is not computed again."
)


def run(words: list[str]) -> int:
    """Fill the cache and say what was done."""
    show_logs()
    from dpo_fast.cli.build import build_trainer
    from dpo_fast.cli.parser import parse

    with tempfile.TemporaryDirectory(prefix="dpo-fast-") as scratch:
        nowhere = {"output_dir": scratch, "push_to_hub": False}
        arguments = parse("dpo-fast precompute", DESCRIPTION, words, **nowhere)
        check_reference(arguments)
        arguments.training.reference = "precomputed"
        trainer = build_trainer(arguments, counting_trainer())
        report(trainer)
    return 0


def check_reference(arguments: "Arguments") -> None:
    """The training to come must read what is written here.

    Raises:
        UsageError: its reference is another one, or its loss needs none.
    """
    from dpo_fast.trainer.setup import build_objective_loss

    args = arguments.training
    if args.reference not in ("auto", "precomputed"):
        raise UsageError(
            f"reference={args.reference!r} never reads precomputed log-probs: train with "
            "reference='precomputed', or do without precompute."
        )
    if not build_objective_loss(args).needs_reference:
        raise UsageError(f"loss_type={args.loss_type} needs no reference: nothing to precompute.")


def counting_trainer() -> "type[Trainer]":
    """A trainer class whose instances know how many rows each data set made them compute."""
    from dpo_fast.trainer import Trainer

    class PrecomputeTrainer(Trainer):
        """Is built, and never trains."""

        counts: dict[str, tuple[int, int]]

        def attach(self, dataset: Any, name: str) -> Any:
            """As in the trainer; notes ``(pairs, computed)``."""
            if dataset is None or isinstance(dataset, dict):
                return super().attach(dataset, name)
            before = self.reference.computed
            out = super().attach(dataset, name)
            self.__dict__.setdefault("counts", {})[name] = (
                len(out),
                self.reference.computed - before,
            )
            return out

    return PrecomputeTrainer


def report(trainer: Any) -> None:
    """Print, on the main process, what was computed and where it is."""
    import torch

    names = list(trainer.counts)
    computed = torch.tensor([trainer.counts[name][1] for name in names], device=trainer.args.device)
    if trainer.accelerator.num_processes > 1:
        computed = trainer.accelerator.reduce(computed, reduction="sum")
    if not is_main_process():
        return
    for name, new in zip(names, computed.tolist(), strict=True):
        pairs = trainer.counts[name][0]
        print(f"{name}: {pairs} pairs, {new} computed, {pairs - new} found")
    print(f"cache: {trainer.reference.cache().folder}")
    if trainer.args.ref_cache_dir is None:
        print("train with: --reference precomputed")
    else:
        root = trainer.args.ref_cache_dir
        print(f"train with: --reference precomputed --ref_cache_dir {root}")
