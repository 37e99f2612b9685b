"""Speed and memory of a run: tokens and pairs per second, model FLOP utilisation, peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dpo_fast.metrics import Counts
from dpo_fast.models import base_causal_lm

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets; no entry, no perf/mfu.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


class PerfMeter:
    """Laps between two logs. Time inside :meth:`paused` (evaluation, saving) does not count as
    training.
    """

    def __init__(self, model: nn.Module) -> None:
        lm = base_causal_lm(model)
        embeddings = sum(p.numel() for p in lm.get_input_embeddings().parameters())
        total = sum(p.numel() for p in lm.parameters())
        trainable = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        self.backbone = total - embeddings
        # forward 2, backward 2 for activations and 2 for weights, per parameter and token
        self.flops_per_token = (4 + 2 * (trainable / max(total, 1))) * self.backbone
        self.peak_flops = _peak_flops()
        self._start = time.perf_counter()
        self._paused = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def restart(self) -> None:
        """Training begins now."""
        self._start, self._paused = time.perf_counter(), 0.0

    def lap(self, counts: Counts) -> dict[str, float]:
        """``perf/*`` since the last lap (``counts`` over all ranks).

        ``tokens_per_sec`` counts tokens by TRL's definition, what padded rows would have attended
        to; ``executed_tokens_per_sec`` and ``mfu`` those that were computed. ``padding_saved`` and
        ``prefix_saved``: the share of padded rows' positions that was padding and was not computed,
        and of the tokens that were a second copy and were computed once.
        """
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        self.restart()
        out = {
            "perf/tokens_per_sec": counts.tokens / seconds,
            "perf/executed_tokens_per_sec": counts.executed / seconds,
            "perf/padding_saved": 1.0 - max(counts.executed, counts.tokens) / max(counts.padded, 1),
            "perf/prefix_saved": 1.0 - min(counts.executed, counts.tokens) / max(counts.tokens, 1),
            "perf/pairs_per_sec": counts.pairs / seconds,
            "perf/peak_mem_gib": peak_memory_bytes() / 2**30,
        }
        if self.peak_flops is not None:
            out["perf/mfu"] = counts.executed * self.flops_per_token / seconds / self.peak_flops
        return out


def peak_memory_bytes() -> int:
    """Peak of this process: allocated device memory where there is a CUDA device, resident memory
    elsewhere.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_flops() -> float | None:
    """Peak of all devices of the run, or None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    if peak is None:
        return None
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return peak * world
