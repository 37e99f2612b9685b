"""Which epilogue runs: the compiled one-pass form on the CPU, torch operations everywhere else."""

from dpo_fast.chunked.epilogue_torch import EpilogueRows, epilogue_, exponentials_

__all__ = ["EpilogueRows", "epilogue_", "exponentials_"]
