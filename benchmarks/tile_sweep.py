"""Times the tiles of the exp-GEMM on a GPU and prints the row of the shipped table for each.

    python -m benchmarks.tile_sweep [--models llama-3-8b ..] [--rows 8192] [--variant plain]

For every tile that compiles within shared memory: milliseconds with and without the store of E, and
the fraction of cuBLAS on the same GEMM, interleaved. The best goes into
kernels/dpo_fast_kernels/tiles.py by hand; `python -m dpo_fast_kernels.aot` then checks it for
spills.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.head_providers import MODELS
from benchmarks.machine import write_result

# block_n, block_v, block_h, warps, stages
CANDIDATES = {
    "plain": [
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 2), (128, 128, 64, 4, 3), (128, 128, 128, 8, 2), (128, 256, 32, 8, 4),
    ],
    "softcap": [
        (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (64, 256, 64, 4, 3),
    ],
    "stats": [
        (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (256, 128, 64, 8, 3),
    ],
}  # fmt: skip


def milliseconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each call, taken in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for index in range(rounds + 2):
        for call, found in zip(calls, times, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            if index >= 2:
                found.append(start.elapsed_time(stop))
    return [statistics.median(found) for found in times]


def sweep(model: str, rows: int, variant: str, rounds: int) -> list[dict[str, object]]:
    from dpo_fast_kernels.exp_gemm import exp_gemm
    from dpo_fast_kernels.operands import Launch, Operands, num_programs
    from dpo_fast_kernels.problem import new_e
    from dpo_fast_kernels.target_logit import target_logits
    from dpo_fast_kernels.tiles import Tile

    shape = MODELS[model]
    x = torch.randn(rows, shape.hidden, device="cuda").bfloat16()
    w = (torch.randn(shape.vocab, shape.hidden, device="cuda") * 0.03).bfloat16()
    target = torch.randint(shape.vocab, (rows,), device="cuda")
    operands = Operands(x, w, None, None, 30.0 if variant == "softcap" else None, 1.0)
    e = new_e(rows, shape.vocab, torch.bfloat16, x, None)
    out: Tensor = torch.empty(rows, shape.vocab, dtype=torch.bfloat16, device="cuda")
    found = []
    for (n, v, h, warps, stages), group in product(CANDIDATES[variant], (4, 8, 16)):
        tile = Tile(n, v, h, 64, group, warps, stages)
        if variant == "stats" and v != tile.unit:
            continue
        launch = Launch(tile, True, num_programs(x) * (2 if warps == 4 else 1))
        options = dict(ignore_index=-100, vocab_start=0, vocab_total=shape.vocab)
        known = target_logits(operands, launch, target, **options)
        stats = variant == "stats"
        calls = [
            lambda: torch.mm(x, w.T, out=out),
            lambda: exp_gemm(operands, launch, known, e=e, stats=stats),  # noqa: B023
            lambda: exp_gemm(operands, launch, known, e=None, stats=stats),  # noqa: B023
        ]
        try:
            blas, stored, bare = milliseconds(calls, rounds)
        except OutOfResources as error:
            print(f"{tile}: {error}")
            continue
        row = {
            "model": model, "variant": variant, "tile": list(tile), "cublas_ms": blas,
            "store_ms": stored, "no_store_ms": bare, "store_of_cublas": blas / stored,
        }  # fmt: skip
        found.append(row)
        print(f"{model} {variant} {n}x{v}x{h} group {group} warps {warps} stages {stages}: "
              f"store {stored:.2f} ms, no store {bare:.2f} ms, cuBLAS {blas:.2f} ms "
              f"({blas / stored:.3f})")  # fmt: skip
    best = min(found, key=lambda row: float(str(row["store_ms"])))
    print(f"best for {model}, {variant}, H={shape.hidden}: Tile{tuple(best['tile'])}")  # type: ignore[arg-type]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--variant", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for model, variant in product(options.models, options.variant):
        rows += sweep(model, options.rows, variant, options.rounds)
        write_result("tile_sweep", {"rows": options.rows, "tiles": rows}, "cuda")


if __name__ == "__main__":
    main()
