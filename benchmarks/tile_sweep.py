"""Times tiles and engines of the LM head on a GPU and writes that architecture's rows of the table.

    python -m benchmarks.tile_sweep [--models llama-3-8b ..] [--variants plain ..] [--seconds 480]
    python -m benchmarks.tile_sweep --write      # from what has been measured

One part is a model and a variant. Candidates are compiled first, on all cores: those that spill or
do not fit into shared memory are left out by name. Then each is timed with and without the store of
E, in turn with cuBLAS on the same GEMM; the best one in other groups of row blocks as well, and
with it a whole scoring pass of both engines.
Parts that benchmarks/results/tile_sweep.json holds for these sources are skipped.

``--write`` puts the winners into kernels/dpo_fast_kernels/table.json, one row for each class of
(H, V); ``python -m dpo_fast_kernels.aot`` then checks what is shipped.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.head_providers import MODELS, Shape
from benchmarks.machine import machine_line
from benchmarks.resume import load_parts, save_parts

NAME = "tile_sweep"
SOFTCAP = 30.0

# block_n, block_v, block_h, warps, stages, flattened
CANDIDATES = {
    "plain": [
        (128, 256, 64, 8, 3, False), (128, 256, 64, 8, 3, True), (256, 128, 64, 8, 3, False),
        (256, 128, 64, 8, 3, True), (128, 128, 64, 8, 4, True), (128, 128, 64, 4, 2, False),
        (128, 128, 64, 4, 2, True), (128, 128, 32, 4, 4, False), (128, 128, 32, 4, 4, True),
        (64, 256, 64, 4, 3, True), (64, 256, 32, 4, 4, False), (64, 256, 32, 4, 4, True),
    ],
    "softcap": [
        (128, 128, 64, 8, 4, False), (128, 128, 64, 8, 4, True), (128, 128, 64, 8, 3, True),
        (128, 128, 128, 8, 2, True), (256, 128, 64, 8, 3, True),
    ],
    "stats": [
        (128, 128, 64, 8, 4, False), (128, 128, 64, 8, 4, True), (128, 128, 64, 8, 3, True),
        (64, 128, 64, 4, 4, True),
    ],
}  # fmt: skip
GROUP, OTHER_GROUPS = 8, (4, 16)  # row blocks that share a slab of W: the others for the best tile

# Classes of the table: sizes from which a row holds. A model's measurement counts for its class.
HIDDEN_CLASSES = (0, 2048)
VOCAB_CLASSES = (0, 200_000)


def tiles_of(variant: str) -> list[Any]:
    from dpo_fast_kernels.tiles import Tile

    return [
        Tile(n, v, h, 64, GROUP, warps, stages, per_sm=2 if warps == 4 else 1, flatten=flat)
        for n, v, h, warps, stages, flat in CANDIDATES[variant]
    ]


def that_compile(variant: str, jobs: int) -> list[Any]:
    """Candidates within the limits of shared memory and spills; the others are named.

    What is compiled here, in parallel, the launches find in Triton's cache.
    """
    from dpo_fast_kernels.aot import compile_all
    from dpo_fast_kernels.aot_cases import exp_gemm_case

    on = {"HAS_TAIL": False, "HAS_SOFTCAP": variant == "softcap", "STATS": variant == "stats"}
    text = {"plain": "-", "softcap": "C", "stats": "S"}[variant]
    tiles, stores = tiles_of(variant), (True, False)
    cases = [exp_gemm_case("sm_90", tile, text, on, store) for tile in tiles for store in stores]
    reports = list(compile_all(cases, jobs))
    kept = []
    for tile, with_store, without in zip(tiles, reports[::2], reports[1::2], strict=True):
        faults = with_store.faults() + without.faults()
        if faults:
            print(f"left out: {with_store.case.label}: {'; '.join(faults)}", flush=True)
        else:
            kept.append(tile)
    return kept


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


class Problem:
    """The tensors of a part."""

    def __init__(self, shape: Shape, rows: int, variant: str) -> None:
        from dpo_fast_kernels.operands import Operands
        from dpo_fast_kernels.problem import new_e

        self.shape, self.stats = shape, variant == "stats"
        self.x = torch.randn(rows, shape.hidden, device="cuda").bfloat16()
        self.w = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device="cuda")
        self.w.normal_(std=2.0 / shape.hidden**0.5)
        self.target = torch.randint(shape.vocab, (rows,), device="cuda")
        cap = SOFTCAP if variant == "softcap" else None
        self.operands = Operands(self.x, self.w, None, None, cap, 1.0)
        self.e = new_e(rows, shape.vocab, torch.bfloat16, self.x, None)

    def product(self) -> Tensor:
        return torch.mm(self.x, self.w.T, out=self.e)

    def tile_calls(self, tile: Any) -> list[Callable[[], object]]:
        """cuBLAS, ours with the store of E, ours without."""
        from dpo_fast_kernels.exp_gemm import exp_gemm
        from dpo_fast_kernels.operands import Launch, num_programs
        from dpo_fast_kernels.target_logit import target_logits

        launch = Launch(tile, True, num_programs(self.x))
        known = target_logits(
            self.operands, launch, self.target, ignore_index=-100, vocab_start=0,
            vocab_total=self.shape.vocab,
        )  # fmt: skip
        run = lambda e: exp_gemm(self.operands, launch, known, e=e, stats=self.stats)
        return [self.product, lambda: run(self.e), lambda: run(None)]

    def engine_calls(self, tile: Any) -> list[Callable[[], object]]:
        """cuBLAS, a whole scoring pass of the exp-GEMM, one of cuBLAS and the epilogue."""
        from dpo_fast_kernels.engine import ExpGemm, Logits
        from dpo_fast_kernels.operands import Launch, num_programs
        from dpo_fast_kernels.scoring import Vocabulary

        programs = num_programs(self.x)
        engines = (
            ExpGemm(Launch(tile, True, programs), torch.bfloat16),
            Logits(programs, torch.bfloat16),
        )
        score = lambda engine: engine.score(
            self.operands, self.target, e=self.e, stats=self.stats, vocabulary=Vocabulary()
        )
        return [self.product, *(lambda engine=engine: score(engine) for engine in engines)]


def sweep(model: str, variant: str, rows: int, rounds: int, tiles: list[Any]) -> dict[str, Any]:
    problem = Problem(MODELS[model], rows, variant)
    found: list[dict[str, Any]] = []

    def measure(tile: Any) -> None:
        blas, stored, bare = milliseconds(problem.tile_calls(tile), rounds)
        row = {"tile": list(tile), "cublas_ms": blas, "store_ms": stored, "no_store_ms": bare}
        found.append(row)
        print(f"{model} {variant} {tuple(tile)}: {stored / blas:.3f} of cuBLAS's {blas:.2f} ms "
              f"with the store, {bare / blas:.3f} without", flush=True)  # fmt: skip

    for tile in tiles:
        measure(tile)
    leader = type(tiles[0])(*min(found, key=cost)["tile"])
    for group in OTHER_GROUPS:
        measure(leader._replace(group_n=group))
    best = min(found, key=cost)
    blas, triton, cublas = milliseconds(problem.engine_calls(type(leader)(*best["tile"])), rounds)
    print(f"{model} {variant}: best {best['tile']}; whole pass {triton / blas:.3f} of the GEMM by "
          f"'triton', {cublas / blas:.3f} by 'cublas'", flush=True)  # fmt: skip
    engines = {"gemm_ms": blas, "triton_ms": triton, "cublas_ms": cublas}
    return {"rows": rows, "tiles": found, "best": best, "engines": engines}


def cost(row: dict[str, Any]) -> float:
    """What a tile is chosen by: policy (with the store) and reference (without), over cuBLAS."""
    total: float = (row["store_ms"] + row["no_store_ms"]) / row["cublas_ms"]
    return total


def class_of(size: int, classes: tuple[int, ...]) -> int:
    return max(least for least in classes if least <= size)


def table_rows(parts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("tiles" or "engines", row) for each class and variant that was measured."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for name, part in parts.items():
        model, variant = name.split()
        shape = MODELS[model]
        key = class_of(shape.hidden, HIDDEN_CLASSES), class_of(shape.vocab, VOCAB_CLASSES)
        groups.setdefault((variant, *key), []).append(part)
    smallest = {v: min((h, n) for w, h, n in groups if w == v) for v, *_ in groups}
    for (variant, hidden, vocab), members in sorted(groups.items()):
        if (hidden, vocab) == smallest[variant]:
            hidden = vocab = 0  # some row must hold for every size
        key = {"arch": "sm_90", "dtype": "bfloat16", "variant": variant}
        key |= {"hidden": hidden, "vocab": vocab}
        # only tiles that every member of the class was measured with
        costs = [{tuple(row["tile"]): cost(row) for row in part["tiles"]} for part in members]
        common = set(costs[0]).intersection(*costs[1:])
        tile = min(common, key=lambda tile: sum(of[tile] for of in costs))
        yield "tiles", key | {"tile": list(tile)}
        if variant != "stats":
            ours, other = (sum(p["engines"][f"{name}_ms"] / p["engines"]["gemm_ms"]
                               for p in members) for name in ("triton", "cublas"))  # fmt: skip
            yield "engines", key | {"engine": "triton" if ours <= other else "cublas"}


def new_table(old: dict[str, Any], parts: dict[str, Any], on: str) -> dict[str, Any]:
    """``old`` with the rows of sm_90 that were measured in place of those that were there."""
    found: dict[str, list[dict[str, Any]]] = {"tiles": [], "engines": []}
    for kind, row in table_rows(parts):
        found[kind].append(row)
    new = {"measured": old["measured"] | {"sm_90": on}}
    for kind in ("engines", "tiles"):
        done = {row["variant"] for row in found[kind]}
        kept = [r for r in old[kind] if r["arch"] != "sm_90" or r["variant"] not in done]
        new[kind] = found[kind] + kept
    return new


def text_of(table: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    parts = [f' "measured": {json.dumps(table["measured"])}']
    for kind in ("engines", "tiles"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in table[kind])
        parts.append(f' "{kind}": [\n{rows}\n ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(parts: dict[str, Any]) -> None:
    from dpo_fast_kernels.tiles import PATH

    line = machine_line("cuda")
    on = f"{line['gpu']}, torch {line['torch']}, triton {line['triton']}, {line['date']}"
    PATH.write_text(text_of(new_table(json.loads(PATH.read_text()), parts, on)))
    print(f"written: {PATH.name} for sm_90, measured on {on}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiling processes")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--write", action="store_true", help="write the table and stop")
    options = parser.parse_args()
    parts = load_parts(NAME)
    if options.write:
        write(parts)
        return
    began = time.monotonic()
    for variant in options.variants:
        missing = [m for m in options.models if f"{m} {variant}" not in parts]
        tiles = that_compile(variant, options.jobs) if missing else []
        for model in missing:
            if time.monotonic() - began > options.seconds:
                print(f"out of time before {model} {variant}: run the same command again")
                return
            parts[f"{model} {variant}"] = sweep(model, variant, options.rows, options.rounds, tiles)
            save_parts(NAME, parts)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
