"""the reference update of TR-DPO: the fused EMA against STREAM, the loop of TRL, and foreach"""

import math
import shutil
from collections.abc import Callable

import torch

from dpo_fast.bench.case import Case, Contest, LeftOut, Step, Variant
from dpo_fast.bench.ema_variants import (
    ALPHA,
    MODELS,
    Maker,
    Weights,
    gap_closed,
    makers,
    ulps_off,
)
from dpo_fast.bench.gate import Errors, Gate
from dpo_fast.bench.settings import Settings
from dpo_fast.bench.stream import Triad

UPDATES = 200
# a single rounding is half a unit, a stochastic one a whole; mul_ and add_ round twice
LIMITS = {"ulp of one update": 1.01, f"share of the gap after {UPDATES}": math.inf}
HARD = {"ulp of one update": 4.0, f"share of the gap after {UPDATES}": math.inf}
TRIADS = ("STREAM triad", "STREAM triad, streaming stores")
ONE_TENSOR = "one tensor"
MODELS_OF = {
    ("cpu", False): (
        ("0.25B", torch.float32),
        ("0.5B", torch.bfloat16),
        (ONE_TENSOR, torch.float32),  # larger than any cache: mul_ and add_ both go to memory
    ),
    ("cpu", True): (("tiny", torch.float32), ("tiny", torch.bfloat16)),
    ("cuda", False): (("0.5B", torch.bfloat16), ("8B", torch.bfloat16)),
    ("cuda", True): (("tiny", torch.bfloat16),),
}


def cases(settings: Settings) -> list[Case]:
    """One gigabyte in fp32 and in bf16 on a CPU; 0.5B and 8B parameters in bf16 on a GPU."""
    found = []
    for model, dtype in MODELS_OF[settings.device, settings.quick]:
        whole: list[tuple[int, ...]] = [(241_000, 1024)]
        shapes = whole if model == ONE_TENSOR else MODELS[model].shapes()
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        what = ONE_TENSOR if model == ONE_TENSOR else f"{len(shapes)} tensors"
        name = f"{numel / 1e6:.0f} M parameters in {what}, {str(dtype).removeprefix('torch.')}"
        axes = {"parameters": float(numel), "tensors": float(len(shapes))}
        build = _builder(shapes, dtype, settings)
        found.append(Case(name, axes, build, rounds=settings.rounds or settings.default_rounds * 2))
    return found


def _builder(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, settings: Settings
) -> Callable[[], Contest]:
    device = settings.device

    def build() -> Contest:
        torch.manual_seed(0)
        w = Weights(shapes, dtype, device)
        backends = ("auto",) if device == "cpu" else ("compiled", "triton")
        found = makers(dtype, backends, shadows=True)
        variants = [_variant(name, make, w) for name, make in found.items()]
        if device == "cpu":
            variants += _triads(w)
        size = dtype.itemsize * w.numel
        return Contest(
            variants,
            _gate(found, dtype, device),
            moved=3.0 * size,
            yardsticks=TRIADS,
            eager="TRL's loop",
            notes={"alpha": ALPHA, "GB of parameters": size / 1e9},
        )

    return build


def _variant(name: str, make: Maker, w: Weights) -> Variant:
    """All variants move the same reference: what they compute does not depend on its values."""

    def prepare() -> Step:
        try:
            update, _ = make(w)
        except ValueError as refusal:  # a backend that cannot run here says why
            raise LeftOut(str(refusal)) from None

        def step() -> str:
            update()
            return name

        return torch.no_grad()(step)

    return Variant(name, prepare, work=float(_moved(name, w)))


def _moved(name: str, w: Weights) -> int:
    passes = {"TRL's loop": 5}.get(name, 3)
    size = passes * w.dtype.itemsize * w.numel
    return size + 6 * w.numel if "shadow" in name else size


def _triads(w: Weights) -> list[Variant]:
    size = w.numel * w.dtype.itemsize
    made: list[Triad] = []

    def prepare(streaming: bool) -> Callable[[], Step]:
        def make() -> Step:
            if not (shutil.which("g++") or shutil.which("clang++")):
                raise LeftOut("STREAM's triad needs a C++ compiler: install g++")
            if not made:
                made.append(Triad(max(16, size // 2**20)))
                made[0].check()
            run = made[0].run(streaming)

            def step() -> str:
                run()
                return "triad"

            return step

        return make

    moved = 3.0 * max(16 * 2**20, size)
    modes = zip(TRIADS, (False, True), strict=True)
    return [Variant(name, prepare(streaming), moved) for name, streaming in modes]


def _gate(found: dict[str, Maker], dtype: torch.dtype, device: str) -> Gate:
    """Each variant's own code on small models, against float64."""
    exact = 1.0 - (1.0 - ALPHA) ** UPDATES

    @torch.no_grad()
    def measure(name: str) -> Errors:
        if name not in found:  # a triad: checked when it was made
            return {}
        closed = gap_closed(found[name], dtype, device, UPDATES)
        return dict(
            zip(LIMITS, (ulps_off(found[name], dtype, device), abs(closed - exact)), strict=True)
        )

    return Gate(measure, LIMITS, HARD)
