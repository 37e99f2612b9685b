"""The LM head of one DPO step on a GPU: ours against the GEMMs alone, the naive loop and the peers.

    python -m benchmarks.head_gpu [--models llama-3-8b ..] [--rows 2048 8192 32768] [--seconds 480]

One part is a model, a number of rows and a setting (full or frozen head, online or precomputed
reference; "forward": scoring alone, with the store of E and without, policy and reference in one
launch and in two). Parts that benchmarks/results/head_gpu.json already holds for these sources are
skipped, and no new one is started after --seconds, so that the whole can be run in several calls.

Within a part the providers take turns, round after round; times are medians over the rounds,
ratios medians of the ratios within a round. The device waits a few milliseconds before each step,
so that the host is ahead of it as it is after a backbone; what the host takes stands beside.
Before it is timed, the first of ours is checked against float64 on some rows. "gemms" are the
setting's GEMMs alone at cuBLAS speed: the floor. Liger's DPO loss runs over padded rows ([2P, T]:
40 % of the real tokens prompt, 30 % padding), as it must; all others over the scored rows.

TFLOP/s count 2 N V H for each GEMM of "gemms", whatever a provider does.
"""

import argparse
import statistics
import time
from itertools import product
from typing import Any

import torch

from benchmarks.head_plot import draw
from benchmarks.head_providers import FORWARD, MODELS, PROVIDERS, make_inputs
from benchmarks.head_table import write_table
from benchmarks.machine import RESULTS, machine_line
from benchmarks.resume import load_parts, save_parts
from dpo_fast.bench.case import Step
from dpo_fast.bench.heads.inputs import Inputs

SETTINGS = {
    "full/online": {"frozen": False, "online": True},
    "full/precomputed": {"frozen": False, "online": False},
    "frozen/online": {"frozen": True, "online": True},
    "frozen/precomputed": {"frozen": True, "online": False},
    "forward": {"frozen": False, "online": False},
}
NAME = "head_gpu"
OURS = ("gemm", "ours")  # names of providers that must run
ENOUGH_MS = 5000.0  # of one provider in one part, from the third round on
AHEAD_CYCLES = 8_000_000  # about 4 ms


def check(x: Inputs) -> float:
    """Largest error of our log-probs on 32 rows, in nats, against float64; raises over 1e-3."""
    from dpo_fast.functional import linear_logprobs

    rows = torch.arange(0, x.hidden.shape[0], max(1, x.hidden.shape[0] // 32), device="cuda")
    with torch.no_grad():
        ours = linear_logprobs(
            x.hidden, x.weight, x.target, softcap=x.shape.softcap, backend="triton"
        )
        assert isinstance(ours, torch.Tensor)
        z = torch.cat(
            [x.hidden[rows].double() @ part.double().T for part in x.weight.split(16384)], 1
        )
        if x.shape.softcap is not None:
            z = x.shape.softcap * torch.tanh(z / x.shape.softcap)
        right = z.log_softmax(1).gather(1, x.target[rows, None])[:, 0]
    error = float((ours[rows].double() - right).abs().max())
    if not error < 1e-3:
        raise RuntimeError(f"log-probs are off by {error:.2e} nats: nothing is timed")
    return error


def prepare(
    x: Inputs, known: dict[str, Any], names: list[str]
) -> tuple[dict[str, Step], dict[str, Any]]:
    """Steps that run, warmed up, and for each provider its peak memory or why it is left out."""
    steps: dict[str, Step] = {}
    notes: dict[str, Any] = {}
    for name in names:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            step = known[name](x)
            for _ in range(2):
                step()
            torch.cuda.synchronize()
        except Exception as error:  # whatever a provider raises leaves it out, by name
            said = (str(error).splitlines() or [""])[0][:300]
            notes[name] = {"left_out": f"{type(error).__name__}: {said}"}
            continue
        steps[name] = step
        notes[name] = {"peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
    return steps, notes


def measure(steps: dict[str, Step], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of every provider in every round, and the host's share: median milliseconds
    until the last launch of a step is queued.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name, step in steps.items():
            if index >= 3 and sum(times[name]) > ENOUGH_MS:
                continue
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD_CYCLES)
            begin = time.perf_counter()
            start.record()
            step()
            stop.record()
            host[name].append((time.perf_counter() - begin) * 1e3)
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    return times, {name: statistics.median(values) for name, values in host.items()}


def run_part(model: str, rows: int, setting: str, names: list[str], rounds: int) -> dict[str, Any]:
    shape = MODELS[model]
    pairs = max(1, rows // 512)
    x = make_inputs(shape, rows, pairs, **SETTINGS[setting])
    error = check(x)
    known = FORWARD if setting == "forward" else PROVIDERS
    steps, notes = prepare(x, known, [n for n in known if n in names or known is FORWARD])
    times, host = measure(steps, rounds)
    count = 1 if setting == "forward" else x.shape.num_gemms
    flop = 2.0 * rows * shape.vocab * shape.hidden * count
    for name, values in times.items():
        middle = statistics.median(values)
        notes[name] |= {
            "ms": middle,
            "host_ms": host[name],
            "spread_ms": [min(values), max(values)],
            "tflops": flop / middle / 1e9,
        }
        for other, key in (("gemms", "over_gemms"), ("ours", "over_ours")):
            if other in times:  # rounds that both took part in
                pairs_of = zip(values, times[other], strict=False)
                notes[name][key] = statistics.median(a / b for a, b in pairs_of)
    length = x.labels.shape[1]
    batch = {"pairs": pairs, "padded_length": length, "padded_rows": 2 * pairs * length}
    return {"batch": batch, "gemm_count": count, "error_nats": error, "providers": notes}


def show(part: str, found: dict[str, Any]) -> None:
    print(f"\n{part}  {found['batch']}  error {found['error_nats']:.1e} nats")
    print(f"  {'':20s} {'ms':>8s} {'TFLOP/s':>8s} {'/gemms':>7s} {'ours/it':>8s} {'peak GiB':>9s}")
    for name, row in found["providers"].items():
        if "left_out" in row:
            print(f"  {name:20s} {row['left_out']}")
            continue
        ours = 1 / row["over_ours"] if "over_ours" in row else 0.0
        print(
            f"  {name:20s} {row['ms']:8.2f} {row['tflops']:8.0f} {row.get('over_gemms', 0):7.3f} "
            f"{ours:8.3f} {row['peak_gib']:9.2f}", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 2048, 32768])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=480.0)
    options = parser.parse_args()
    began = time.monotonic()
    parts = load_parts(NAME)
    for rows, model, setting in product(options.rows, options.models, options.settings):
        part = f"{model} N={rows} {setting}"
        if part in parts:
            continue
        if time.monotonic() - began > options.seconds:
            print(f"\nout of time before {part}: run the same command again")
            break
        parts[part] = run_part(model, rows, setting, options.providers, options.rounds)
        show(part, parts[part])
        save_parts(NAME, parts)
        torch.cuda.empty_cache()
    if parts:
        draw(parts, machine_line("cuda"), RESULTS / f"{NAME}.png")
        write_table(parts, machine_line("cuda"), RESULTS / f"{NAME}.md")
    failed = [
        f"{part}: {name}: {row['left_out']}"
        for part, found in parts.items()
        for name, row in found["providers"].items()
        if "left_out" in row and name.startswith(OURS)
    ]
    if failed:
        raise SystemExit("of our own, these did not run:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
