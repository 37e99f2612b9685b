"""The trainer: a transformers.Trainer around the objective, the reference and the metrics."""

from dpo_fast.trainer.core import Trainer

__all__ = ["Trainer"]
