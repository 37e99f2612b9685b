"""What a run of the suites is asked for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """Device and size of a run.

    Attributes:
        device: "cpu" or "cuda".
        quick: small sizes and few rounds; the numbers show that it works, not how fast it is.
        rounds: timed steps of each variant; None: 2 if quick, else 7.
    """

    device: str = "cpu"
    quick: bool = False
    rounds: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What models are trained in there: fp32 on a CPU, bf16 on a GPU."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def default_rounds(self) -> int:
        """Rounds of a case that names none."""
        return self.rounds or (2 if self.quick else 7)

    def rounds_of(self, full: int | None) -> int | None:
        """Rounds of a case that takes ``full`` of them in a full run; None: the run's."""
        return self.rounds or (None if self.quick else full)
