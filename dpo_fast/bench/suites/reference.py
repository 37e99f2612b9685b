"""whole training steps under each reference strategy: frozen, adapter, precomputed, moving"""

from collections.abc import Callable

from dpo_fast.bench.case import Case, Contest, Step, Variant
from dpo_fast.bench.settings import Settings
from dpo_fast.bench.training.arithmetic import gemm_flops
from dpo_fast.bench.training.gold import training_gate
from dpo_fast.bench.training.references import (
    STRATEGIES,
    VARIANTS,
    gold_loop,
    make_step,
    with_reference,
)
from dpo_fast.bench.workload import LENGTHS, ModelShape, make_rows

SHAPES = {
    ("cpu", False): (ModelShape(192, 3, 3, 8_000), 4),
    ("cpu", True): (ModelShape(64, 2, 2, 2000), 2),
    ("cuda", False): (ModelShape(896, 24, 14, 151_936), 16),
    ("cuda", True): (ModelShape(256, 4, 4, 32_000), 4),
}
HELD = {"frozen": 1, "adapter": 0, "precomputed": 0, "ema": 1}  # copies of the model


def cases(settings: Settings) -> list[Case]:
    """One case a strategy, all on the same rows."""
    return [_case(strategy, settings) for strategy in STRATEGIES]


def _case(strategy: str, settings: Settings) -> Case:
    shape, pairs = SHAPES[settings.device, settings.quick]
    device, dtype = settings.device, settings.dtype

    def build() -> Contest:
        rows = make_rows(LENGTHS["2:1"], pairs, shape.vocab)
        if strategy == "precomputed":
            rows = with_reference(rows, shape, device)

        def prepare(name: str) -> Callable[[], Step]:
            return lambda: make_step(strategy, name, shape, rows, device, dtype)

        forwards = 1 if strategy == "precomputed" else 2
        flop = gemm_flops("shared_prefix", shape, rows, forwards)
        if strategy == "adapter":  # no gradient of the frozen weights
            flop *= (forwards + 1) / (forwards + 2)
        return Contest(
            [Variant(name, prepare(name)) for name in VARIANTS],
            training_gate(gold_loop(strategy, shape, device), rows, dtype),
            flop=flop,
            dtype=dtype,
            notes={
                "reference": strategy,
                "copies of the model held for it": HELD[strategy],
                "model": f"{shape.layers} layers, H {shape.hidden}, V {shape.vocab}",
            },
        )

    axes = {"pairs": float(pairs), "V": float(shape.vocab), "H": float(shape.hidden)}
    return Case(strategy, axes, build, rounds=settings.rounds_of(4))
