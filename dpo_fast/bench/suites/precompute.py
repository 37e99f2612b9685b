"""one pass of the reference over a data set, and finding its log-probs again"""

from collections.abc import Callable

from dpo_fast.bench.case import Case, Contest, Step, Variant
from dpo_fast.bench.precomputing import VARIANTS, make_pass, precompute_gate
from dpo_fast.bench.settings import Settings
from dpo_fast.bench.suites.layout import with_share
from dpo_fast.bench.training.arithmetic import forward_flops
from dpo_fast.bench.workload import ModelShape, make_rows

SHAPES = {
    ("cpu", False): ModelShape(192, 3, 3, 8_000),
    ("cpu", True): ModelShape(64, 2, 2, 2000),
    ("cuda", False): ModelShape(896, 24, 14, 151_936),
    ("cuda", True): ModelShape(256, 4, 4, 32_000),
}
PAIRS = {("cpu", False): 16, ("cpu", True): 8, ("cuda", False): 512, ("cuda", True): 64}
BATCH = {"cpu": 4, "cuda": 16}
MORE_PAIRS = {False: (0.5, 2.0), True: (0.5,)}
SHARES = {False: (0.0, 0.75), True: (0.8,)}
BASE_SHARE = 0.5


def cases(settings: Settings) -> list[Case]:
    """A base case, over the size of the data set, and over the prompt's share."""
    pairs = PAIRS[settings.device, settings.quick]
    found = [_case("base", pairs, BASE_SHARE, settings, ("pairs", "prompt share"))]
    for factor in MORE_PAIRS[settings.quick]:
        count = int(pairs * factor)
        found.append(_case(f"pairs = {count}", count, BASE_SHARE, settings, ("pairs",)))
    for share in SHARES[settings.quick]:
        name = f"prompt share = {share:g}"
        found.append(_case(name, pairs, share, settings, ("prompt share",)))
    return found


def _case(name: str, pairs: int, share: float, settings: Settings, curves: tuple[str, ...]) -> Case:
    shape = SHAPES[settings.device, settings.quick]
    device, dtype, batch = settings.device, settings.dtype, BATCH[settings.device]
    rows = make_rows(with_share(share), pairs, shape.vocab)
    prompt = sum(2 * len(row["prompt_ids"]) for row in rows)
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)

    def prepare(variant: str) -> Callable[[], Step]:
        return lambda: make_pass(variant, rows, batch, shape, device, dtype)

    def build() -> Contest:
        return Contest(
            [Variant(variant, prepare(variant)) for variant in VARIANTS],
            precompute_gate(rows, shape, device, dtype),
            flop=forward_flops("shared_prefix", shape, rows),
            dtype=dtype,
            notes={
                "pairs a forward": batch,
                "model": f"{shape.layers} layers, H {shape.hidden}, V {shape.vocab}",
            },
        )

    axes = {"pairs": float(pairs), "prompt share": prompt / (prompt + answers)}
    return Case(name, axes, build, curves, settings.rounds_of(5 if len(curves) > 1 else 3))
