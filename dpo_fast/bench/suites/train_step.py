"""whole training steps: collator, policy and reference, backward, clipping, AdamW"""

import dataclasses

from dpo_fast.bench.case import Case
from dpo_fast.bench.settings import Settings
from dpo_fast.bench.training.contest import training_contest
from dpo_fast.bench.training.stepper import VARIANTS
from dpo_fast.bench.workload import LENGTHS, ModelShape, make_rows

ON_CURVES = ("naive", "TRL", "dpo_fast", "dpo_fast shared_prefix")
BASE = {
    ("cpu", False): (ModelShape(), 4),
    ("cpu", True): (ModelShape(64, 2, 2, 2000), 2),
    ("cuda", False): (ModelShape(896, 24, 14, 151_936), 16),
    ("cuda", True): (ModelShape(256, 4, 4, 32_000), 4),
}
FIELDS = {"V": "vocab", "H": "hidden"}
CURVES: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {
    ("cpu", False): {"V": (8_000, 64_000), "H": (192, 768), "pairs": (1, 2, 8)},
    ("cpu", True): {"V": (500,), "H": (16,), "pairs": (1,)},
    ("cuda", False): {"V": (32_000, 64_000), "H": (448, 1792), "pairs": (4, 32)},
    ("cuda", True): {"V": (8_000, 16_000), "H": (64, 128), "pairs": (1, 8)},
}


def cases(settings: Settings) -> list[Case]:
    """All variants at the base shape; the main ones over V, H and the pairs."""
    where = (settings.device, settings.quick)
    shape, pairs = BASE[where]
    axes = ("V", "H", "pairs")
    found = [_case("base", shape, pairs, VARIANTS, settings, axes, None)]
    for axis, sizes in CURVES[where].items():
        for size in sizes:
            one, count = shape, pairs
            if axis == "pairs":
                count = size
            else:
                one = dataclasses.replace(shape, **{FIELDS[axis]: size})
            name = f"{axis} = {size}"
            found.append(_case(name, one, count, ON_CURVES, settings, (axis,), 3))
    return found


def _case(
    name: str,
    shape: ModelShape,
    pairs: int,
    variants: tuple[str, ...],
    settings: Settings,
    curves: tuple[str, ...],
    rounds: int | None,
) -> Case:
    rows = make_rows(LENGTHS["2:1"], pairs, shape.vocab)
    return Case(
        name,
        {"pairs": float(pairs), "V": float(shape.vocab), "H": float(shape.hidden)},
        lambda: training_contest(shape, rows, variants, settings.device, settings.dtype),
        curves,
        settings.rounds_of(rounds),
    )
