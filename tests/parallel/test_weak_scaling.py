"""The weak-scaling model: closed form against event simulation, limits, conservation."""

import json
from dataclasses import replace
from itertools import product
from math import prod

import pytest

from benchmarks.scaling_events import Timeline, backward, forward, simulated_step
from benchmarks.scaling_model import (
    ENGINES,
    MODELS,
    REFERENCES,
    Cluster,
    Layer,
    Run,
    closed_backward,
    closed_forward,
    closed_step,
    layer_of,
    step_volume,
)

SMALL, MIDDLE, LARGE = MODELS
LAYERS = {
    "compute bound": Layer(3.0, 6.0, 0.5, 0.7),
    "wire bound": Layer(0.1, 0.2, 2.0, 3.0),
    "between": Layer(1.0, 2.0, 1.5, 1.0),
    "no wire": Layer(1.0, 2.0, 0.0, 0.0),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("layers", [1, 2, 40])
def test_closed_form_is_the_simulation_of_equal_layers(layer, layers):
    for prefetch in (True, False):
        time = Timeline()
        forward(time, [layer] * layers, prefetch=int(prefetch))
        assert time.end == pytest.approx(closed_forward(layer, layers, prefetch))
        time = Timeline()
        backward(time, [layer] * layers, prefetch=int(prefetch))
        edge = layer.gather + layer.reduce  # of the first and last layer
        assert abs(time.end - closed_backward(layer, layers, prefetch)) <= edge + 1e-9


def test_limits():
    """Nothing on the wire: compute. Nothing to compute: the wire's own seconds, gap-free."""
    run = Run()
    free = Cluster(nvlink=1e30, network=1e30, latency_nvlink=0.0, latency_network=0.0)
    alone = closed_step(MIDDLE, run, "fsdp2", 1, Cluster())
    assert closed_step(MIDDLE, run, "fsdp2", 1024, free) == pytest.approx(alone)
    assert simulated_step(MIDDLE, run, "fsdp2", 1024, free).end == pytest.approx(alone)
    instant = replace(Cluster(), flops=1e30)
    time = simulated_step(MIDDLE, run, "fsdp2", 64, instant)
    assert time.end == pytest.approx(time.busy["wire"], rel=1e-6)
    assert closed_step(MIDDLE, run, "fsdp2", 64, instant) == pytest.approx(time.end, rel=0.03)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_simulation_and_closed_form_agree_on_whole_steps(model, engine):
    for reference in REFERENCES:
        for gpus in (8, 64, 1024):
            run = Run(reference=reference, tokens=2048, micro_batches=2)
            closed = closed_step(model, run, engine, gpus, Cluster())
            assert simulated_step(model, run, engine, gpus, Cluster()).end == pytest.approx(
                closed, rel=0.02
            )


def test_the_wire_is_busy_for_what_it_carries():
    """Inside a node at full bandwidth: volume over bandwidth is the simulation's busy time."""
    run, cluster = Run(reference="frozen"), Cluster(latency_nvlink=0.0, latency_network=0.0)
    time = simulated_step(MIDDLE, run, "fsdp2", 8, cluster)
    volume = step_volume(MIDDLE, run, "fsdp2", 8, cluster)
    sent = volume.gather + volume.reduce
    assert time.busy["wire"] == pytest.approx(sent / cluster.nvlink, rel=1e-9)


def test_efficiency_falls_with_ranks_and_rises_with_tokens():
    for engine in ENGINES:
        seconds = [closed_step(SMALL, Run(), engine, 8 * 2**i, Cluster()) for i in range(8)]
        assert seconds == sorted(seconds)
    few, many = (
        closed_step(SMALL, Run(tokens=t), "fsdp2", 1, Cluster())
        / closed_step(SMALL, Run(tokens=t), "fsdp2", 512, Cluster())
        for t in (1024, 16384)
    )
    assert few < many < 1


def test_what_each_reference_sends():
    """Precomputed spares the reference's gathers, an adapter nearly all reductions, EMA costs
    nothing.
    """
    volume = {
        name: step_volume(LARGE, Run(reference=name), "fsdp2", 64, Cluster()) for name in REFERENCES
    }
    assert volume["ema"] == volume["frozen"] and volume["ema"].ema == 0
    assert volume["precomputed"].gather < 0.7 * volume["frozen"].gather
    assert volume["adapter"].reduce < 0.01 * volume["frozen"].reduce
    for found in volume.values():
        assert found.metrics + found.counts < 1e-6 * found.total


def test_a_vocab_parallel_head_reduces_two_floats_a_token():
    cluster, run = Cluster(), Run(reference="precomputed")
    volume = step_volume(LARGE, run, "tp8_fsdp2", 64, cluster)
    scored = 8 * run.tokens * run.scored
    dx = 2 * 7 / 8 * scored * LARGE.hidden * 2
    assert volume.head == pytest.approx(dx + 2 * 7 / 8 * scored * 2 * 4)
    gathered_logits = 7 / 8 * scored * LARGE.vocab * 2
    assert volume.head < 0.2 * gathered_logits


def test_a_slower_layer_is_seen_by_the_simulation_only():
    layer = layer_of(MIDDLE, Run(), "fsdp2", 64, Cluster())
    assert layer.gather < layer.forward
    uneven = simulated_step(MIDDLE, Run(), "fsdp2", 64, Cluster(), jitter=(0.5, 1.5))
    even = simulated_step(MIDDLE, Run(), "fsdp2", 64, Cluster())
    assert uneven.end >= even.end * (1 - 1e-12)  # sums in another order


def test_the_benchmark_writes_table_and_picture(tmp_path, capsys):
    from benchmarks.weak_scaling import find, main, table

    main(["--out", str(tmp_path)])
    result = json.loads((tmp_path / "weak_scaling_model.json").read_text())
    assert result["what"] == "modelled, not measured"
    assert result["largest_gap_of_simulation_to_closed_form"] < 0.02
    axes, columns = result["axes"], result["columns"]
    rows = table()
    assert len(rows) == prod(len(values) for values in axes.values())
    assert all(len(values) == len(rows) for values in columns.values())
    for number, values in enumerate(product(*axes.values())):
        if number % 97 == 0:
            row = find(rows, **dict(zip(axes, values, strict=True)))[0]
            found = {name: column[number] for name, column in columns.items()}
            assert found["efficiency"] == pytest.approx(row["efficiency"], rel=1e-3)
            assert found["seconds"] == pytest.approx(row["seconds"], rel=1e-3)
            for part in ("gather", "reduce", "activations", "head"):
                sent = row["gb_sent"][part]
                assert found[f"gb_sent, {part}"] == pytest.approx(sent, rel=1e-3)
    assert (tmp_path / "weak_scaling_model.json").stat().st_size < 130_000
    assert (tmp_path / "weak_scaling_model.png").stat().st_size > 30_000
    assert "does not fit" in capsys.readouterr().out
