"""The parts of a step of the LM head on a GPU, each alone: where the time goes that is not a GEMM.

    python -m benchmarks.head_pieces [--models llama-3-8b ..] [--rows 8192]

GEMMs in TFLOP/s (2 N V H each), everything else in GB/s of the bytes that it must read and write.
What is decided with it: dW as one product rounded at once, in float32, or added in groups; dX with
a float32 result; the passes of the cuBLAS engine; what the off-range pass costs when no row is off
range; how much 50 iterations in a row are slower than one (throttling).
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.head_providers import MODELS, Shape
from benchmarks.resume import load_parts, save_parts

NAME = "head_pieces"


class Piece(NamedTuple):
    call: Callable[[], object]
    flop: float = 0.0
    bytes: float = 0.0


def gemm_pieces(x: Any, w: Any, e: Any, xs: Any) -> dict[str, Piece]:
    """The three products and the ways to write them."""
    from dpo_fast_kernels.products import add_product

    n, h, v = x.shape[0], x.shape[1], w.shape[0]
    flop = 2.0 * n * h * v
    dw = torch.zeros(v, h, device="cuda")

    def groups(count: int) -> Callable[[], object]:
        def run() -> None:
            for part in range(count):
                rows = slice(part * n // count, (part + 1) * n // count)
                add_product(dw, e[rows].T, xs[rows])

        return run

    def run_of(count: int) -> Callable[[], object]:
        return lambda: [torch.mm(x, w.T, out=e) for _ in range(count)]

    f32 = torch.float32
    return {
        "logits, bfloat16": Piece(run_of(1), flop),
        "logits, bfloat16, 50 in a row": Piece(run_of(50), 50 * flop),
        "logits, float32, 1024 rows": Piece(
            lambda: torch.mm(x[:1024], w.T, out_dtype=f32), flop * min(1.0, 1024 / n)
        ),
        "dX, bfloat16": Piece(lambda: torch.mm(e, w), flop),
        "dX, float32": Piece(lambda: torch.mm(e, w, out_dtype=f32), flop),
        "dW, bfloat16": Piece(lambda: torch.mm(e.T, xs), flop),
        "dW, float32": Piece(lambda: torch.mm(e.T, xs, out_dtype=f32), flop),
        "dW transposed, bfloat16": Piece(lambda: torch.mm(xs.T, e), flop),
        **{f"dW, float32, added in {c}": Piece(groups(c), flop) for c in (1, 2, 4)},
    }


def row_pieces(shape: Shape, x: Any, w: Any, e: Any, target: Any) -> dict[str, Piece]:
    """The kernels around the GEMMs, as the engines call them."""
    from dpo_fast_kernels.logits import logits_exp, logits_max
    from dpo_fast_kernels.off_range import off_range
    from dpo_fast_kernels.operands import Operands, plan_launch
    from dpo_fast_kernels.row_scale import column_sum, gather_axpy, row_scale
    from dpo_fast_kernels.rows import compact, reduce_tiles
    from dpo_fast_kernels.segment import segment_sum
    from dpo_fast_kernels.target_logit import target_logits

    (n, h), v = x.shape, shape.vocab
    operands = Operands(x, w, None, None, shape.softcap, 1.0)
    launch = plan_launch(operands, False)
    sizes = {"ignore_index": -100, "vocab_start": 0, "vocab_total": v}
    known = target_logits(operands, launch, target, **sizes)
    few = min(n, 1024)
    z = torch.randn(few, v, device="cuda")
    rows, _ = logits_max(z, shape.softcap, target[:few], **sizes)
    rows.k.fill_(8.0)
    part = torch.empty(1, -(-v // launch.tile.unit), n, device="cuda").normal_()
    sums, g, c, s = torch.empty(1, n, device="cuda"), x.float(), x[:, 0].float(), x[:, 1].float()
    index, count = compact(torch.zeros(n, dtype=torch.int32, device="cuda"))
    redo = torch.empty(1, -(-v // launch.tile.block_v), n, device="cuda")
    cu = torch.arange(0, n + 1, 256, device="cuda")
    db = torch.zeros(v, device="cuda")
    again = lambda maximum: off_range(
        operands, launch, known, index, count, redo, maximum=maximum, e=None, lost=None, stats=False
    )
    return {
        "target's logits": Piece(
            lambda: target_logits(operands, launch, target, **sizes), bytes=4.0 * n * h
        ),
        "sums over tiles": Piece(
            lambda: reduce_tiles(part, sums, programs=launch.programs), bytes=4.0 * part.numel()
        ),
        "off-range passes, no row": Piece(lambda: (again(True), again(False))),
        "cuBLAS engine: maxima": Piece(
            lambda: logits_max(z, shape.softcap, target[:few], **sizes), bytes=4.0 * few * v
        ),
        "cuBLAS engine: E": Piece(
            lambda: logits_exp(z, shape.softcap, 1.0, rows, e=e[:few], part=None),
            bytes=6.0 * few * v,
        ),
        "dX and v X": Piece(
            lambda: row_scale(c, s, 1.0, g=g, x=x, dtype=x.dtype), bytes=10.0 * n * h
        ),
        "delta W[y]": Piece(lambda: gather_axpy(g, w, c, known.col), bytes=10.0 * n * h),
        "db": Piece(lambda: column_sum(e, c, db), bytes=2.0 * n * v),
        "sums over sequences": Piece(lambda: segment_sum(c, cu), bytes=4.0 * n),
    }


def measure(pieces: dict[str, Piece], rounds: int) -> dict[str, Any]:
    """Median milliseconds and rates, pieces in turn."""
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for index in range(rounds + 1):
        for name, piece in pieces.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            piece.call()
            stop.record()
            torch.cuda.synchronize()
            if index:
                times[name].append(start.elapsed_time(stop))
    found = {}
    for name, piece in pieces.items():
        ms = statistics.median(times[name])
        row = {"ms": ms}
        if piece.flop:
            row["tflops"] = piece.flop / ms / 1e9
        if piece.bytes:
            row["gb_per_s"] = piece.bytes / ms / 1e6
        found[name] = row
    return found


def run(shape: Shape, rows: int, rounds: int) -> dict[str, Any]:
    from dpo_fast_kernels.problem import new_e

    x = torch.randn(rows, shape.hidden, device="cuda").bfloat16()
    w = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device="cuda")
    w.normal_(std=2.0 / shape.hidden**0.5)
    target = torch.randint(shape.vocab, (rows,), device="cuda")
    e = new_e(rows, shape.vocab, torch.bfloat16, x, None)
    e.normal_()
    pieces = gemm_pieces(x, w, e, torch.randn_like(x)) | row_pieces(shape, x, w, e, target)
    return measure(pieces, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parts = load_parts(NAME)
    for model in options.models:
        part = f"{model} N={options.rows}"
        if part in parts:
            continue
        parts[part] = run(MODELS[model], options.rows, options.rounds)
        print(f"\n{part}")
        for name, row in parts[part].items():
            rates = [f"{row[k]:8.0f} {u}" for k, u in (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s"))
                     if k in row]  # fmt: skip
            print(f"  {name:32s} {row['ms']:9.3f} ms {''.join(rates)}", flush=True)
        save_parts(NAME, parts)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
