"""TR-DPO's reference update: GB/s of the fused EMA against STREAM's triad, TRL's loop and foreach.

    python -m benchmarks.ema                  # CPU: 1 GB of parameters in 290 tensors, each dtype
    python -m benchmarks.ema --device cuda    # 0.5B and 8B parameters, bf16, against a plain copy

All variants run in one process in turn, round after round; a ratio is the median of the ratios
within the rounds. Bytes are those that the variant's own passes touch, so that "gb_per_s" compares
machines, and "seconds" compares variants. A variant's numbers are printed only after its result was
checked: against float64 on the CPU, bit for bit against the CPU on a GPU.

The CPU's triad has 3 arrays of the size of the parameters (in bytes) and the same threads.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine_line, write_result
from dpo_fast.bench.ema_variants import ALPHA, MODELS, Weights, foreach_lerp, trl_loop
from dpo_fast.bench.stream import Triad
from dpo_fast.bench.timing import median_ratio, take_turns
from dpo_fast.functional.ema import EmaPlan, Rounding, make_shadow

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")


@dataclass
class Variant:
    """Something to time, and the bytes it moves."""

    run: Callable[[], None]
    bytes: int


def weights(model: str, dtype: torch.dtype, device: str) -> Weights:
    """Of a model of :data:`MODELS`."""
    return Weights(MODELS[model].shapes(), dtype, device)


def baselines(w: Weights) -> dict[str, Variant]:
    return {
        "trl_loop": Variant(*trl_loop(w)),
        "foreach_lerp": Variant(*foreach_lerp(w)),
    }


def ours(w: Weights, backend: str, shadows: bool) -> dict[str, Variant]:
    plan = EmaPlan(w.refs, w.policies, backend=backend)
    prefix = f"dpo_fast_{backend}" if backend != "auto" else "dpo_fast"
    found = {f"{prefix}_nearest": Variant(lambda: plan.update_(ALPHA), plan.traffic)}
    if w.dtype == torch.float32:
        return found
    steps = iter(range(2**62))
    found[f"{prefix}_stochastic"] = Variant(
        lambda: plan.update_(ALPHA, rounding="stochastic", step=next(steps)), plan.traffic
    )
    if shadows:
        masters = make_shadow(w.refs)
        shadowed = EmaPlan(w.refs, w.policies, shadow=masters, backend=backend)
        found[f"{prefix}_shadow"] = Variant(lambda: shadowed.update_(ALPHA), shadowed.traffic)
    return found


def check_against_float64(dtype: torch.dtype) -> None:
    """The gate on the CPU: one update of a small model, to half an ulp (one, if stochastic)."""
    ulp = torch.finfo(dtype).eps
    for rounding, limit in zip(ROUNDINGS, (0.5, 1.0), strict=True):
        w = weights("tiny", dtype, "cpu")
        gold = [r.double().lerp(p.double(), ALPHA) for r, p in zip(w.refs, w.policies, strict=True)]
        EmaPlan(w.refs, w.policies).update_(ALPHA, rounding=rounding)
        for ref, exact in zip(w.refs, gold, strict=True):
            bound = exact.abs() * ulp * limit * (1 + 1e-3) + 1e-9 + ulp * 1e-3 * exact.abs().max()
            if not bool(((ref.double() - exact).abs() <= bound).all()):
                raise SystemExit(f"wrong result ({dtype}, {rounding}): nothing is timed")


def check_against_cpu(backend: str) -> None:
    """The gate on a GPU: every mode gives the CPU's bits."""
    for rounding in ROUNDINGS:
        for shadowed in (False, True):
            torch.manual_seed(0)
            w = weights("tiny", torch.bfloat16, "cpu")
            results = []
            for device, name in (("cpu", "auto"), ("cuda", backend)):
                refs = [r.to(device, copy=True) for r in w.refs]
                shadow = make_shadow(refs) if shadowed else None
                policies = [p.to(device) for p in w.policies]
                plan = EmaPlan(refs, policies, shadow=shadow, backend=name)
                plan.update_(ALPHA, rounding=rounding, seed=1, step=2)
                results.append([r.cpu().view(torch.int16) for r in refs])
            if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
                raise SystemExit(f"{backend}, {rounding}: not the CPU's bits; nothing is timed")


def measure(variants: dict[str, Variant], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every variant in every round; the order turns by one each round."""
    for variant in variants.values():
        variant.run()
    return take_turns({name: v.run for name, v in variants.items()}, rounds, device)


def report(
    variants: dict[str, Variant], times: dict[str, list[float]], ceilings: tuple[str, ...]
) -> dict[str, Any]:
    """Medians, quartiles, GB/s; our bandwidth over the best ceiling's, TRL's time over ours."""
    rates = {n: [variants[n].bytes / t / 1e9 for t in times[n]] for n in variants}
    ceiling = max(ceilings, key=lambda n: statistics.median(rates[n]))
    rows = {}
    for name in variants:
        low, _, high = statistics.quantiles(times[name], n=4)
        row: dict[str, Any] = {
            "seconds": statistics.median(times[name]),
            "seconds_quartiles": [low, high],
            "gb": variants[name].bytes / 1e9,
            "gb_per_s": statistics.median(rates[name]),
            "of_ceiling": median_ratio(rates[name], rates[ceiling]),
        }
        if name.startswith("dpo_fast"):
            row["speedup_over_trl_loop"] = median_ratio(times["trl_loop"], times[name])
            row["speedup_over_foreach_lerp"] = median_ratio(times["foreach_lerp"], times[name])
        rows[name] = row
        print(_line(name, row), flush=True)
    return {"ceiling": ceiling, "variants": rows}


def _line(name: str, row: dict[str, Any]) -> str:
    text = f"  {name:28s} {row['seconds'] * 1e3:9.2f} ms {row['gb_per_s']:8.1f} GB/s"
    text += f" {100 * row['of_ceiling']:6.1f} % of the ceiling"
    if "speedup_over_trl_loop" in row:
        text += f", {row['speedup_over_trl_loop']:.2f} x TRL's loop"
    return text


def run_cpu(rounds: int, model: str | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for dtype, default in ((torch.float32, "0.25B"), (torch.bfloat16, "0.5B")):
        check_against_float64(dtype)
        w = weights(model or default, dtype, "cpu")
        size = w.numel * dtype.itemsize
        triad = Triad(max(64, size // 2**20))
        triad.check()
        variants = {
            "triad": Variant(triad.run(False), triad.bytes),
            "triad_streaming": Variant(triad.run(True), triad.bytes),
            **baselines(w),
            **ours(w, "auto", shadows=True),
        }
        label = str(dtype).removeprefix("torch.")
        print(
            f"{label}: {len(w.refs)} tensors, {w.numel / 1e6:.0f} M parameters, {size / 1e9:.2f} GB"
        )
        times = measure(variants, rounds, "cpu")
        results[label] = {
            "tensors": len(w.refs),
            "parameters": w.numel,
            **report(variants, times, ("triad", "triad_streaming")),
        }
    return results


def count_launches(run: Callable[[], None]) -> int:
    """Kernels (copies and fills included) that one call puts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def copy_ceiling(megabytes: int) -> Variant:
    source = torch.empty(megabytes * 2**18, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return Variant(lambda: _ignore(target.copy_(source)), 2 * source.numel() * 4)


def _ignore(_: Tensor) -> None:
    """A callable of no result, for type checkers."""


def run_cuda(rounds: int, model: str | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    free, _ = torch.cuda.mem_get_info()
    for name in [model] if model else ["0.5B", "8B"]:
        numel = sum(torch.Size(shape).numel() for shape in MODELS[name].shapes())
        shadows = free > 12 * numel + 12 * 2**30
        if not shadows:
            print(f"{name}: no room for fp32 shadows on this GPU; they are left out")
        w = weights(name, torch.bfloat16, "cuda")
        variants = {"copy": copy_ceiling(4096), **baselines(w)}
        for backend in ("compiled", "triton"):
            try:
                check_against_cpu(backend)
            except ValueError as refusal:  # a backend that cannot run here says why
                print(f"{name}: {refusal}")
                continue
            variants |= ours(w, backend, shadows)
        print(f"{name}: {len(w.refs)} tensors, {w.numel / 1e9:.2f} B parameters, bf16")
        times = measure(variants, rounds, "cuda")
        rows = report(variants, times, ("copy",))
        for key in rows["variants"]:
            rows["variants"][key]["launches"] = count_launches(variants[key].run)
        results[name] = {"tensors": len(w.refs), "parameters": w.numel, **rows}
        del w, variants
        torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default torch's")
    parser.add_argument("--model", choices=MODELS, default=None)
    parser.add_argument("--no-write", action="store_true", help="print, but keep results/ as it is")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = run_cpu if options.device == "cpu" else run_cuda
    with torch.no_grad():
        payload = {"alpha": ALPHA, "rounds": options.rounds, **run(options.rounds, options.model)}
    print(json.dumps(machine_line(options.device)))
    if not options.no_write:
        write_result(f"ema_{options.device}", payload, options.device)


if __name__ == "__main__":
    main()
