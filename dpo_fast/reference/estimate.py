"""What precomputed log-probs would save: memory exactly, seconds by a quick measurement."""

import functools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from datasets import Dataset

_SIZE = 1024
_EFFICIENCY = 0.5  # of a square matrix product's rate that a whole forward reaches, roughly


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in tensors)


def size_text(num_bytes: int) -> str:
    """``num_bytes`` as GiB, or MiB where that is below 0.1 GiB."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:.2f} MiB"


def count_tokens(dataset: "Dataset", max_length: int | None) -> int:
    """Tokens of all sequences: prompt + chosen, prompt + rejected, each cut to ``max_length``."""
    import pyarrow.compute as pc

    total = 0
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    for table in dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=10_000):
        prompt, chosen, rejected = (
            torch.from_numpy(pc.list_value_length(table[n]).to_numpy().copy()) for n in names
        )
        for answer in (chosen, rejected):
            length = prompt + answer
            total += int((length if max_length is None else length.clamp(max=max_length)).sum())
    return total


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one ``[1024, 1024]`` product, best of a few; measured once a process."""
    a = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * _SIZE**3 / best


def reference_seconds(
    model: nn.Module, tokens: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of a reference pass over ``tokens``, guessed at 2 FLOP a parameter and token."""
    params = sum(p.numel() for p in model.parameters())
    return 2.0 * params * tokens / (_EFFICIENCY * matmul_rate(device, dtype))


def suggestion(
    *, second_model: nn.Module | None, model: nn.Module, tokens: int, epochs: float, how: Any
) -> str:
    """What ``reference='precomputed'`` would save this run, in one sentence.

    Args:
        second_model: the reference that would leave the accelerator; None where there is none.
        model: what a reference pass runs.
        tokens: of one epoch, both sequences of each pair.
        epochs: one pass over the data stays (the first run's; none if the cache has it).
        how: ``(device, dtype)`` that the pass runs in.
    """
    device, dtype = how
    freed = weight_bytes(second_model) if second_model is not None else 0
    once = reference_seconds(model, tokens, device, dtype)
    saved, later = max(epochs - 1.0, 0.0) * once, epochs * once
    return (
        f"reference='precomputed' would free {size_text(freed)} and save about {saved:,.1f} s in "
        f"this run and {later:,.1f} s in each further one (any learning rate, beta or loss)."
    )
