"""Attention of one packed row with shared prompts: every backend that the device has.

On a CPU: the C++ attention and SDPA segment by segment against SDPA under a mask of each pair and
under a mask of the whole row. On a GPU: the variable-length kernels of torch and of flash-attn,
FlexAttention, SDPA by segment. Forward, and forward with backward; variants interleaved, medians;
each must first agree with SDPA by segment. The order of preference in
``dpo_fast.layouts.attention`` stands on this.

    python -m benchmarks.attention [--device cuda]

Legend: L tokens of the row, D head size, Hq and Hkv heads of queries and of keys.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine_line, write_result
from dpo_fast.bench.workload import LENGTHS, make_rows
from dpo_fast.layouts import Segments, SharedPrefixCollator
from dpo_fast.layouts.attention import choose_backend
from dpo_fast.layouts.attention_sdpa import sdpa_segments
from dpo_fast.layouts.segments import segment_mask


class Shape(NamedTuple):
    """Heads, head size, pairs in the row, lengths of the workload, factor of the lengths."""

    query_heads: int
    key_heads: int
    head_size: int
    pairs: int
    lengths: str
    factor: int = 1


SHAPES = {
    "cpu": {"H=384": Shape(6, 6, 64, 4, "2:1"), "H=384, 4:1": Shape(6, 6, 64, 4, "4:1")},
    "cuda": {
        "0.5B": Shape(14, 2, 64, 32, "2:1"),
        "7B": Shape(28, 4, 128, 16, "2:1"),
        "7B, 4:1": Shape(28, 4, 128, 16, "4:1"),
        "7B, long": Shape(28, 4, 128, 8, "4:1", 8),
    },
}
Attend = Callable[..., Tensor]


def make_row(shape: Shape) -> Segments:
    """The segments of a row of pairs."""
    rows = make_rows(LENGTHS[shape.lengths], shape.pairs, 1000)
    longer = [{k: v * shape.factor for k, v in row.items()} for row in rows]
    segments: Segments = SharedPrefixCollator(pad_token_id=0)(longer)["pair_segments"]
    return segments


def dense_row(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float) -> Tensor:
    """SDPA under one mask of L x L, made once a batch."""
    mask = segments.derived(("dense", q.dtype), lambda: _row_mask(segments, q))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def dense_pair(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float) -> Tensor:
    """SDPA under a mask of each pair."""
    starts = [s.start for s in segments.spans if not s.prefix_length] + [segments.length]
    sizes = [b - a for a, b in pairwise(starts)]
    mask = segments.derived(("dense", q.dtype), lambda: _row_mask(segments, q))
    gqa, outs = q.shape[1] != k.shape[1], []
    parts = (x.split(sizes, dim=2) for x in (q, k, v))
    for start, size, *qkv in zip(starts, sizes, *parts, strict=False):
        own = mask[start : start + size, start : start + size]
        out = F.scaled_dot_product_attention(*qkv, attn_mask=own, scale=scale, enable_gqa=gqa)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


def _row_mask(segments: Segments, like: Tensor) -> Tensor:
    size = segments.length
    mask = torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device)
    for span in segments.spans:
        own = segment_mask(span, None, like.dtype, like.device)
        rows = slice(span.start, span.stop)
        prefix = slice(span.prefix_start, span.prefix_start + span.prefix_length)
        mask[rows, prefix], mask[rows, rows] = own.split([span.prefix_length, span.length], dim=1)
    return mask


def variants(device: str, q: Tensor, v: Tensor) -> dict[str, Attend]:
    """What runs on the device."""
    found: dict[str, Attend]
    if device == "cpu":
        found = {"by_segment": sdpa_segments, "dense_pair": dense_pair, "dense_row": dense_row}
        names: tuple[str, ...] = ("compiled",)
    else:
        found, names = {"sdpa": sdpa_segments}, ("varlen", "flash_attn", "flex")
    for name in names:
        try:
            found[name] = choose_backend(name, q, v, None, 0.0)
        except ValueError as reason:
            print(f"{name}: {reason}", flush=True)
    return found


def measure(shape: Shape, device: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of every variant, forward and with backward."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    segments = make_row(shape)
    heads = (shape.query_heads, shape.key_heads, shape.key_heads)
    # [1, L, heads, D] seen as [1, heads, L, D]: the strides that models hand over
    q, k, v = (
        torch.randn(1, segments.length, h, shape.head_size, device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h in heads
    )
    scale = shape.head_size**-0.5
    found = variants(device, q, v)
    gold = sdpa_segments(q, k, v, segments, scale=scale).detach()
    upstream = torch.randn_like(gold)
    seconds: dict[str, dict[str, list[float]]] = {n: {"forward": [], "both": []} for n in found}
    for round_ in range(rounds + 2):
        for name, attend in found.items():
            call = partial(attend, q, k, v, segments, scale=scale)
            forward, out = timed(call, device)
            backward, _ = timed(
                lambda out=out: torch.autograd.grad(out, (q, k, v), upstream), device
            )
            torch.testing.assert_close(out, gold, rtol=0.02, atol=0.02)
            if round_ >= 2:
                seconds[name]["forward"].append(forward)
                seconds[name]["both"].append(forward + backward)
    return {
        "tokens": segments.length,
        "milliseconds": {
            name: {what: statistics.median(s) * 1e3 for what, s in times.items()}
            for name, times in seconds.items()
        },
    }


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(seconds, result), the device waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    shapes = SHAPES[options.device].items()
    results = {n: measure(s, options.device, options.rounds) for n, s in shapes}
    print(json.dumps({"machine": machine_line(options.device), **results}, indent=1))
    if not options.no_write:
        write_result(f"attention_{options.device}", results, options.device)


if __name__ == "__main__":
    main()
