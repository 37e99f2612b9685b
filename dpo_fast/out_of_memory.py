"""Out of memory as an error that says what to change."""

import torch

# torch's own words where host memory ends
_HOST = "DefaultCPUAllocator: can't allocate memory"


class OutOfMemory(torch.OutOfMemoryError):
    """What torch or Python raised, and what to change; is a ``torch.cuda.OutOfMemoryError``."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's memory or the host's ended."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _HOST in str(error)
