"""Weak scaling of a DPO step from 8 to 1024 GPUs: modelled, not measured.

Closed form (``scaling_model``) and event simulation (``scaling_events``) of every model, engine and
reference; writes ``results/weak_scaling_model.json`` and ``.png``. ``WEAK_SCALING.md`` states what
is assumed and what follows.

    python -m benchmarks.weak_scaling
"""

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.scaling_events import simulated_step
from benchmarks.scaling_model import (
    ENGINES,
    MODELS,
    REFERENCES,
    Cluster,
    Engine,
    Model,
    Run,
    closed_step,
    state_bytes,
    step_volume,
)

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
CLUSTERS = {"400 Gb/s a GPU": Cluster(), "400 Gb/s a node": Cluster(network=0.85 * 50e9 / 8)}
RESULTS = Path(__file__).parent / "results"
TOKENS = (8192, 2048)  # of a GPU's micro-batch: four pairs of 2 x 1024, and one
ROOM = 0.8  # share of a GPU's memory that weights and states may take; the rest is activations
COLORS = {"ddp": "#1b6ca8", "fsdp2": "#c8553d", "zero3": "#e0a458", "tp8_fsdp2": "#588157"}
PARTS = {
    "gather": "#c8553d",
    "reduce": "#1b6ca8",
    "activations": "#588157",
    "head": "#111111",
}


def row(
    model: Model, run: Run, engine: Engine, gpus: int, where: str, cluster: Cluster
) -> dict[str, Any]:
    """One cell of the table."""
    closed = closed_step(model, run, engine, gpus, cluster)
    simulated = simulated_step(model, run, engine, gpus, cluster).end
    sent = step_volume(model, run, engine, gpus, cluster)._asdict()
    alone = closed_step(model, run, "fsdp2", 1, cluster)
    memory = state_bytes(model, run, engine, gpus)
    return {
        "model": model.name,
        "engine": engine,
        "reference": run.reference,
        "tokens": run.tokens,
        "network": where,
        "gpus": gpus,
        "seconds": closed,
        "simulated_seconds": simulated,
        "efficiency": alone / closed,
        "gb_sent": {part: size / 1e9 for part, size in sent.items()},
        "state_gb": memory / 1e9,
        "fits": memory <= ROOM * cluster.memory,
    }


def table() -> list[dict[str, Any]]:
    """All cells."""
    rows = []
    for where, tokens, model, reference in product(CLUSTERS, TOKENS, MODELS, REFERENCES):
        run, cluster = Run(reference=reference, tokens=tokens), CLUSTERS[where]
        for engine in ENGINES:
            rows += [row(model, run, engine, gpus, where, cluster) for gpus in GPUS]
    return rows


def find(rows: list[dict[str, Any]], **keys: Any) -> list[dict[str, Any]]:
    """The rows with these values."""
    return [r for r in rows if all(r[k] == v for k, v in keys.items())]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Efficiency over GPUs, and what a GPU sends in a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, len(MODELS), figsize=(14, 11.5), layout="constrained")
    for column, model in enumerate(MODELS):
        for place, tokens in enumerate(TOKENS):
            _draw_efficiency(axes[place][column], rows, model, tokens)
        _draw_volume(axes[2][column], rows, model)
    for place, tokens in enumerate(TOKENS):
        axes[place][0].set_ylabel(f"efficiency, {tokens} tokens a GPU")
    axes[2][0].set_ylabel("GB that a GPU sends in a step")
    axes[0][0].legend(loc="lower left", fontsize=8, frameon=False)
    axes[2][0].legend(loc="upper left", fontsize=8, frameon=False)
    figure.suptitle(
        "Weak scaling of a DPO step with a frozen reference on H200 nodes: modelled, not measured\n"
        "efficiency: compute alone / whole step; solid: 400 Gb/s for each GPU, dotted: for a node "
        f"of eight; below: {TOKENS[0]} tokens a GPU, {GPUS[-1]} GPUs"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_efficiency(axis: Any, rows: list[dict[str, Any]], model: Model, tokens: int) -> None:
    for engine in ENGINES:
        for where, line in zip(CLUSTERS, ("-", ":"), strict=True):
            keys = {"model": model.name, "engine": engine, "reference": "frozen", "tokens": tokens}
            cells = find(rows, network=where, **keys)
            label = engine.replace("_", " + ") if line == "-" else None
            x, y = [c["gpus"] for c in cells], [c["efficiency"] for c in cells]
            axis.plot(x, y, line, color=COLORS[engine], label=label, lw=1.8)
            for c in cells:  # hollow: weights and states do not fit
                face = COLORS[engine] if c["fits"] else "white"
                axis.plot(c["gpus"], c["efficiency"], "o", ms=5, mfc=face, mec=COLORS[engine])
    axis.set(xscale="log", ylim=(0, 1.04), title=model.name, xlabel="GPUs (hollow: does not fit)")
    axis.set_xticks(GPUS, [str(g) for g in GPUS])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def _draw_volume(axis: Any, rows: list[dict[str, Any]], model: Model) -> None:
    places, names = [], []
    for i, engine in enumerate(ENGINES):
        for j, reference in enumerate(REFERENCES):
            place = i * (len(REFERENCES) + 1) + j
            (cell,) = find(
                rows,
                model=model.name,
                engine=engine,
                reference=reference,
                network="400 Gb/s a GPU",
                tokens=TOKENS[0],
                gpus=GPUS[-1],
            )
            bottom = 0.0
            for part, color in PARTS.items():
                height = cell["gb_sent"][part]
                label = part if place == 0 else None
                axis.bar(place, height, bottom=bottom, color=color, width=0.85, label=label)
                bottom += height
            places.append(place)
            names.append(reference)
    axis.set_xticks(places, names, rotation=90, fontsize=8)
    for i, engine in enumerate(ENGINES):
        axis.text(
            *(i * (len(REFERENCES) + 1) + 1.5, 1.01, engine.replace("_", " + ")),
            ha="center",
            transform=axis.get_xaxis_transform(),
            fontsize=9,
        )
    axis.grid(alpha=0.25, axis="y")


def prefetch_off(gpus: int = 64) -> dict[str, float]:
    """Efficiency of FSDP2 without prefetch, by simulation: what overlap is worth."""
    found = {}
    for model in MODELS:
        run, cluster = Run(), Cluster()
        alone = closed_step(model, run, "fsdp2", 1, cluster)
        found[model.name] = (
            alone / simulated_step(model, run, "fsdp2", gpus, cluster, prefetch=0).end
        )
    return found


AXES = ("network", "tokens", "model", "reference", "engine", "gpus")


def written(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """JSON with the cells by column, one number a cell to four digits, in the order of ``axes``:
    the last turns fastest. ``gb_sent`` has a column for each part that is sent at all.
    """
    axes = {name: list(dict.fromkeys(row[name] for row in rows)) for name in AXES}
    assert [tuple(row[n] for n in AXES) for row in rows] == list(product(*axes.values()))
    columns: dict[str, Any] = {
        "seconds": [row["seconds"] for row in rows],
        "simulated / closed form": [row["simulated_seconds"] / row["seconds"] for row in rows],
        "efficiency": [row["efficiency"] for row in rows],
        "state_gb": [row["state_gb"] for row in rows],
        "fits": [int(row["fits"]) for row in rows],
    }
    for part in rows[0]["gb_sent"]:
        columns[f"gb_sent, {part}"] = [row["gb_sent"][part] for row in rows]
    lines = [
        f"  {json.dumps(name)}: [{','.join(f'{value:.4g}' for value in values)}]"
        for name, values in columns.items()
        if any(values)
    ]
    head = json.dumps({**result, "axes": axes}, indent=1).removesuffix("\n}")
    return head + ',\n "columns": {\n' + ",\n".join(lines) + "\n }\n}\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and picture")
    args = parser.parse_args(arguments)
    rows = table()
    gap = max(abs(r["simulated_seconds"] / r["seconds"] - 1) for r in rows)
    uneven = [
        simulated_step(m, Run(), "fsdp2", 64, Cluster(), jitter=(0.8, 1.2)).end
        / simulated_step(m, Run(), "fsdp2", 64, Cluster()).end
        for m in MODELS
    ]
    result = {
        "what": "modelled, not measured",
        "clusters": {name: asdict(cluster) for name, cluster in CLUSTERS.items()},
        "models": [asdict(model) for model in MODELS],
        "run": asdict(Run()),
        "largest_gap_of_simulation_to_closed_form": gap,
        "step_with_layers_of_0.8_and_1.2_over_equal_layers": uneven,
        "fsdp2_64_gpus_without_prefetch": prefetch_off(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "weak_scaling_model.json").write_text(written(result, rows))
    draw(rows, args.out / "weak_scaling_model.png")
    for where, tokens, model, engine in product(CLUSTERS, TOKENS, MODELS, ENGINES):
        keys = {"model": model.name, "engine": engine, "tokens": tokens, "network": where}
        cells = find(rows, reference="frozen", **keys)
        shown = " ".join(f"{c['efficiency']:.2f}{'' if c['fits'] else '*'}" for c in cells)
        print(f"{where:15s} {tokens:5d} {model.name:13s} {engine:10s} {shown}")
    print(f"simulation within {100 * gap:.2f} % of the closed form; * does not fit")


if __name__ == "__main__":
    main()
