"""The filtered LM head on a GPU: a step's time against the share of tiles that it keeps.

    python -m benchmarks.head_filtered [--models llama-3-8b ..] [--rows 8192]

The rows' probability lies in the first part of the vocabulary, whose share is set: a made-up case
that shows what a kept share is worth, not what share a real model has (``filter_report`` says that
of a training). "exact" is the same step without the bound, "gemms" its three GEMMs at cuBLAS speed;
ratios are medians of the ratios within rounds. Written to ``results/head_filtered.json``, with the
relative error of both gradients against the exact mode's.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.head_gpu import measure, prepare
from benchmarks.head_providers import MODELS, gemms, make_inputs
from benchmarks.machine import write_result
from dpo_fast.bench.case import Step
from dpo_fast.bench.heads.inputs import Inputs
from dpo_fast.functional import filter_report, linear_logprobs

SHARES = (1.0, 0.5, 0.25, 0.1, 0.03)
BOUND = 2.0**-14
GAP = 40.0  # nats between the two parts of the vocabulary


def concentrate(x: Inputs, share: float) -> None:
    """Moves the probability of all rows into the first ``share`` of the vocabulary."""
    vocab = x.weight.shape[0]
    first = max(1, int(share * vocab))
    with torch.no_grad():
        x.hidden[:, 0] = 1.0
        x.weight[:, 0] = 0.0
        x.weight[first:, 0] = -GAP
        x.target.remainder_(first)


def step_of(x: Inputs, bound: float | None) -> Step:
    """Log-probs and both gradients for fixed derivatives of a loss."""
    upstream = torch.randn(x.target.shape, device=x.target.device)

    def step() -> list[torch.Tensor]:
        logps = linear_logprobs(
            x.hidden, x.weight, x.target, softcap=x.shape.softcap, backend="triton", mode="store",
            filter_bound=bound,
        )  # fmt: skip
        return list(torch.autograd.grad(logps, [x.hidden, x.weight], upstream))

    return step


def errors(x: Inputs) -> dict[str, float]:
    """Relative error of the filtered gradients, and what was kept."""
    torch.manual_seed(0)
    exact = step_of(x, None)()
    torch.manual_seed(0)
    filter_report()
    found = step_of(x, BOUND)()
    report = filter_report()
    assert report is not None
    norm = lambda a, b: float((a.float() - b.float()).norm() / b.float().norm())
    names = zip(("dhidden", "dweight"), found, exact, strict=True)
    return report._asdict() | {name: norm(a, b) for name, a, b in names}


def run(model: str, rows: int, share: float, rounds: int) -> dict[str, Any]:
    x = make_inputs(MODELS[model], rows, max(1, rows // 512), frozen=False, online=False)
    concentrate(x, share)
    found: dict[str, Any] = errors(x)
    torch.cuda.empty_cache()
    known = {
        "gemms": gemms,
        "exact": lambda x: step_of(x, None),
        "filtered": lambda x: step_of(x, BOUND),
    }
    steps, notes = prepare(x, known, list(known))
    times, _ = measure(steps, rounds)
    for name, values in times.items():
        notes[name]["ms"] = statistics.median(values)
        for other in ("gemms", "exact"):
            ratios = [a / b for a, b in zip(values, times[other], strict=False)]
            notes[name][f"over_{other}"] = statistics.median(ratios)
    return found | {"providers": notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llama-3-8b"], choices=list(MODELS))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    parts: dict[str, Any] = {}
    for model in options.models:
        for share in options.shares:
            part = f"{model} N={options.rows} share={share:g}"
            parts[part] = found = run(model, options.rows, share, options.rounds)
            print(f"{part}: kept {found['kept_share']:.3f}, errors {found['dhidden']:.1e} "
                  f"{found['dweight']:.1e}", flush=True)  # fmt: skip
            for name, row in found["providers"].items():
                said = (
                    row.get("left_out") or f"{row['ms']:8.2f} ms  {row['over_gemms']:.3f} x GEMMs"
                )
                print(f"  {name:10s} {said}", flush=True)
            write_result("head_filtered", {"bound": BOUND, "parts": parts}, "cuda")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
