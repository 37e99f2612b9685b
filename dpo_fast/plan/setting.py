"""One way to run a training: what a row of the plan's table is about."""

from dataclasses import dataclass

import torch

KINDS = ("full", "lora")
PRECISIONS = ("mixed", "bf16", "fp32")
LAYOUTS = ("padded", "packed", "shared_prefix")
REFERENCES = ("frozen", "adapter", "precomputed", "ema")
ADAMW_STATES = 2


@dataclass(frozen=True)
class Setting:
    """``precision``: "mixed" is float32 weights under bf16 autocast (the trainer's default), "bf16"
    is weights, gradients and optimizer in bf16 (``dtype: bfloat16``), "fp32" neither.

    ``checkpointing``: activations of a layer are computed again in the backward.
    """

    kind: str
    precision: str
    checkpointing: bool
    layout: str
    reference: str

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights in memory."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def autocast(self) -> torch.dtype | None:
        """Of the forward, or None."""
        return None if self.precision == "fp32" else torch.bfloat16

    @property
    def runs_reference(self) -> bool:
        """Whether each step runs a forward of the reference."""
        return self.reference != "precomputed"

    def holds_second_model(self) -> bool:
        """Whether the reference is a model of its own."""
        return self.reference == "frozen" or (self.reference == "ema" and self.kind == "full")

    def why_not(self) -> str | None:
        """Why there is no such training, or None."""
        if self.reference == "adapter" and self.kind == "full":
            return "the reference 'adapter' needs an adapter"
        return None

    def describe(self) -> str:
        """In words, in the order of the table."""
        recompute = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{self.kind}, {self.precision}, {recompute}, {self.layout}, {self.reference}"
