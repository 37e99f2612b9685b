"""the LM head of one DPO step: log-probs, pair loss and gradients from hidden states

Legend: N scored tokens, V vocabulary, H hidden, P pairs.
"""

import dataclasses
from typing import Any

import torch

from dpo_fast.bench.case import Case, Contest
from dpo_fast.bench.heads.gold import head_gate
from dpo_fast.bench.heads.inputs import HeadShape, make_inputs
from dpo_fast.bench.heads.variants import HEADS, head_variants
from dpo_fast.bench.settings import Settings

ALL = tuple(HEADS)
# A compiled variant is compiled again at every size: too slow for a quick run.
ON_CURVES = {
    False: ("naive", "TRL", "torch.compile", "dpo_fast"),
    True: ("naive", "TRL", "dpo_fast"),
}
SETTINGS = ("naive", "TRL", "Liger", "torch.compile", "dpo_fast")
COMPILED = ("Liger", "cut-cross-entropy", "torch.compile")
AXES = {"N": "rows", "V": "vocab", "H": "hidden", "prompt share": "prompt_share", "pairs": "pairs"}

BASE = {
    ("cpu", False): HeadShape(rows=256, vocab=32_000, hidden=384, pairs=4),
    ("cpu", True): HeadShape(rows=64, vocab=4_000, hidden=64, pairs=2),
    ("cuda", False): HeadShape(rows=8192, vocab=128_256, hidden=4096, pairs=16),
    ("cuda", True): HeadShape(rows=1024, vocab=32_000, hidden=1024, pairs=4),
}
CURVES: dict[tuple[str, bool], dict[str, tuple[float, ...]]] = {
    ("cpu", False): {
        "N": (64, 128, 512),
        "V": (8_000, 16_000, 64_000),
        "H": (96, 192, 768),
        "prompt share": (0.0, 0.25, 0.75),
        "pairs": (1, 32),
    },
    ("cpu", True): {
        "N": (16, 32),
        "V": (1_000, 2_000),
        "H": (16, 32),
        "prompt share": (0.0, 0.75),
        "pairs": (1, 8),
    },
    ("cuda", False): {
        "N": (1024, 2048, 4096, 16_384, 32_768),
        "V": (32_000, 64_000, 256_000),
        "H": (1024, 2048, 3584),
        "prompt share": (0.0, 0.25, 0.75),
        "pairs": (1, 4, 64),
    },
    ("cuda", True): {
        "N": (256, 512),
        "V": (8_000, 16_000),
        "H": (256, 512),
        "prompt share": (0.0, 0.75),
        "pairs": (1, 16),
    },
}


def cases(settings: Settings) -> list[Case]:
    """The four settings at the base shape, bf16 on the CPU, and one curve a size."""
    base = BASE[settings.device, settings.quick]
    base = dataclasses.replace(base, dtype=settings.dtype)
    found = [_case("full head, online reference", base, settings, ALL, tuple(AXES))]
    for name, frozen, online in (
        ("full head, precomputed reference", False, False),
        ("frozen head, online reference", True, True),
        ("frozen head, precomputed reference", True, False),
    ):
        if not settings.quick:
            shape = dataclasses.replace(base, frozen=frozen, online=online)
            found.append(_case(name, shape, settings, SETTINGS, rounds=5))
    if settings.device == "cpu":
        shape = dataclasses.replace(base, dtype=torch.bfloat16)
        if not settings.quick:  # torch multiplies bf16 at 1 GFLOP/s on CPUs without it
            shape = dataclasses.replace(shape, rows=64, vocab=8_000, hidden=256, pairs=2)
        names = tuple(n for n in ALL if not (settings.quick and n in COMPILED))
        found.append(_case("full head, online reference, bf16", shape, settings, names))
    for axis, sizes in CURVES[settings.device, settings.quick].items():
        for size in sizes:
            value = size if axis == "prompt share" else int(size)
            change: dict[str, Any] = {AXES[axis]: value}
            shape = dataclasses.replace(base, **change)
            name = f"{axis} = {size:g}"
            found.append(_case(name, shape, settings, ON_CURVES[settings.quick], (axis,), 3))
    return found


def _case(
    name: str,
    shape: HeadShape,
    settings: Settings,
    variants: tuple[str, ...],
    curves: tuple[str, ...] = (),
    rounds: int | None = None,
) -> Case:
    def build() -> Contest:
        x = make_inputs(shape, settings.device)
        return Contest(
            head_variants(x, variants),
            head_gate(x),
            flop=2.0 * shape.rows * shape.vocab * shape.hidden * shape.num_gemms,
            # a CPU multiplies bf16 as fp32: that is its limit, not torch's bf16 GEMM
            dtype=shape.dtype if settings.device == "cuda" else torch.float32,
            notes={
                "GEMMs of the limit": shape.num_gemms,
                "padded rows": x.labels.numel(),
                "dtype": str(shape.dtype).removeprefix("torch."),
            },
        )

    axes = {axis: float(getattr(shape, field)) for axis, field in AXES.items()}
    return Case(name, axes, build, curves, settings.rounds_of(rounds))
