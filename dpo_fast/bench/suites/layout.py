"""batch layouts: whole training steps with padded, packed and prefix-shared rows"""

from dpo_fast.bench.case import Case
from dpo_fast.bench.settings import Settings
from dpo_fast.bench.training.contest import training_contest
from dpo_fast.bench.workload import LENGTHS, Lengths, ModelShape, make_rows

VARIANTS = ("naive", "TRL", "dpo_fast", "dpo_fast packed", "dpo_fast shared_prefix")
SHARES = {False: (0.0, 0.25, 0.5, 0.65, 0.8, 0.9), True: (0.0, 0.8)}
PAIRS = {False: (1, 2, 4, 8), True: (1, 2)}
CHOSEN, REJECTED = LENGTHS["2:1"].chosen, LENGTHS["2:1"].rejected
SHAPES = {
    ("cpu", False): ModelShape(),
    ("cpu", True): ModelShape(64, 2, 2, 2000),
    ("cuda", False): ModelShape(896, 24, 14, 151_936),
    ("cuda", True): ModelShape(256, 4, 4, 32_000),
}


def cases(settings: Settings) -> list[Case]:
    """The three workloads of the goals; over the prompt's share of the tokens; over the pairs."""
    pairs = 2 if settings.quick else (16 if settings.device == "cuda" else 4)
    named = ("2:1",) if settings.quick else tuple(LENGTHS)
    found = [_case(f"prompt to answer {n}", LENGTHS[n], pairs, settings, ()) for n in named]
    for share in SHARES[settings.quick]:
        lengths = with_share(share)
        found.append(_case(f"prompt share {share:g}", lengths, pairs, settings, ("prompt share",)))
    scale = 4 if settings.device == "cuda" else 1
    for count in PAIRS[settings.quick]:
        name = f"pairs {count * scale}"
        found.append(_case(name, with_share(0.5), count * scale, settings, ("pairs",)))
    return found


def with_share(share: float) -> Lengths:
    """Lengths of real sets' answers after prompts that are ``share`` of prompt and one answer."""
    answer = (CHOSEN + REJECTED) / 2
    return Lengths(max(2.0, answer * share / (1 - share)), CHOSEN, REJECTED)


def _case(
    name: str, lengths: Lengths, pairs: int, settings: Settings, curves: tuple[str, ...]
) -> Case:
    shape = SHAPES[settings.device, settings.quick]
    rows = make_rows(lengths, pairs, shape.vocab)
    prompt = sum(2 * len(row["prompt_ids"]) for row in rows)
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    axes = {"pairs": float(pairs), "prompt share": prompt / (prompt + answers)}
    return Case(
        name,
        axes,
        lambda: training_contest(shape, rows, VARIANTS, settings.device, settings.dtype),
        curves,
        settings.rounds_of(3 if curves else None),
    )
