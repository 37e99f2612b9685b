"""TR-DPO's reference update (arXiv 2404.09656): ours, TRL's loop, foreach, on real tensor sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.functional.ema import EmaPlan, make_shadow

ALPHA = 0.01


@dataclass(frozen=True)
class Decoder:
    """The weights of a decoder of Llama's kind, tied head."""

    hidden: int
    inner: int
    key_value: int
    layers: int
    vocab: int
    biases: bool = False

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all its tensors."""
        h, i, k = self.hidden, self.inner, self.key_value
        layer: list[tuple[int, ...]] = [(h, h), (k, h), (k, h), (h, h)]
        layer += [(i, h), (i, h), (h, i), (h,), (h,)]
        if self.biases:
            layer += [(h,), (k,), (k,)]
        return [(self.vocab, h), *(layer * self.layers), (h,)]


MODELS = {
    "0.25B": Decoder(640, 3456, 128, 24, 100_000, biases=True),  # 1 GB in fp32
    "0.5B": Decoder(896, 4864, 128, 24, 151_936, biases=True),  # Qwen2.5-0.5B, 1 GB in bf16
    "8B": Decoder(4096, 14_336, 1024, 32, 256_512),  # Llama-3-8B; its untied head counted here
    "tiny": Decoder(256, 1024, 64, 4, 4000, biases=True),
}


class Weights:
    """A reference and a policy of one model."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
        self.refs = [torch.empty(s, dtype=dtype, device=device).normal_(0, 0.02) for s in shapes]
        self.policies = [r + torch.randn_like(r).mul_(1e-3) for r in self.refs]
        self.dtype, self.device = dtype, device

    @property
    def numel(self) -> int:
        """Parameters of one of the two."""
        return sum(r.numel() for r in self.refs)


Update = Callable[[], None]
Maker = Callable[[Weights], tuple[Update, int]]  # the update, and the bytes that it moves


def trl_loop(w: Weights) -> tuple[Update, int]:
    """TRL 1.16's SyncRefModelCallback: two kernels a tensor, five passes over memory."""

    def update() -> None:
        for ref, policy in zip(w.refs, w.policies, strict=True):
            ref.mul_(1.0 - ALPHA).add_(policy, alpha=ALPHA)

    return update, 5 * w.dtype.itemsize * w.numel


def foreach_lerp(w: Weights) -> tuple[Update, int]:
    """torch's multi-tensor lerp, rounding to nearest."""

    def update() -> None:
        torch._foreach_lerp_(w.refs, w.policies, ALPHA)

    return update, 3 * w.dtype.itemsize * w.numel


def ours(rounding: str, backend: str = "auto") -> Maker:
    """``EmaPlan`` with "nearest", "stochastic" or "shadow" rounding."""

    def make(w: Weights) -> tuple[Update, int]:
        shadow = make_shadow(w.refs) if rounding == "shadow" else None
        plan = EmaPlan(w.refs, w.policies, shadow=shadow, backend=backend)
        steps = iter(range(2**62))
        if rounding == "stochastic":
            update = lambda: plan.update_(ALPHA, rounding="stochastic", step=next(steps))
        else:
            update = lambda: plan.update_(ALPHA)
        return update, plan.traffic

    return make


def makers(dtype: torch.dtype, backends: tuple[str, ...], shadows: bool) -> dict[str, Maker]:
    """What is compared in a dtype; "dpo_fast" is what the trainer does by default there."""
    found: dict[str, Maker] = {"TRL's loop": trl_loop, "torch._foreach_lerp_": foreach_lerp}
    for backend in backends:
        tail = "" if backend == backends[0] else f" {backend}"
        if dtype == torch.float32:
            found[f"dpo_fast{tail}"] = ours("nearest", backend)
            continue
        found[f"dpo_fast{tail}"] = ours("stochastic", backend)
        found[f"dpo_fast nearest{tail}"] = ours("nearest", backend)
        if shadows:
            found[f"dpo_fast shadow{tail}"] = ours("shadow", backend)
    return found


def ulps_off(make: Maker, dtype: torch.dtype, device: str) -> float:
    """Largest error of one update of a small model, in units of the operands' last place."""
    torch.manual_seed(0)
    w = Weights(MODELS["tiny"].shapes(), dtype, device)
    before = [r.double() for r in w.refs]
    make(w)[0]()
    return max(map(_ulps, w.refs, before, w.policies))


def gap_closed(make: Maker, dtype: torch.dtype, device: str, updates: int = 200) -> float:
    """Share of the way to a policy at rest that the reference has gone after so many updates."""
    torch.manual_seed(0)
    w = Weights([(64, 1024)], dtype, device)
    gaps = [float((w.policies[0].double() - w.refs[0].double()).norm())]
    update = make(w)[0]
    for _ in range(updates):
        update()
    gaps.append(float((w.policies[0].double() - w.refs[0].double()).norm()))
    return 1.0 - gaps[1] / gaps[0]


def _ulps(found: Tensor, before: Tensor, policy: Tensor) -> float:
    """In units of the larger operand's last place: where the two cancel, less is not to be had."""
    live, info = policy.double(), torch.finfo(found.dtype)
    largest = torch.maximum(before.abs(), live.abs()).clamp(min=info.tiny)
    unit = torch.exp2(largest.log2().floor()) * info.eps
    return float(((found.double() - before.lerp(live, ALPHA)).abs() / unit).max())
