"""Which cell to take: the fastest that fits, and what it is better than."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from dpo_fast.plan.cells import Cell
from dpo_fast.plan.devices import Device

# Of the device's memory: the rest is for the driver's context, the allocator's fragments and what
# a plan cannot see (buffers inside of cuBLAS and of collectives).
USABLE = 0.92
# Times this close count as equal, and the smaller memory decides.
_EQUAL = 1.02


class Choice(NamedTuple):
    """``best``: None where nothing fits."""

    best: Cell | None
    reason: str


def fits(cell: Cell, device: Device) -> bool:
    """Whether the peak leaves the device some room."""
    return cell.peak <= USABLE * device.memory


def choose(cells: Sequence[Cell], device: Device, epochs: float = 1.0) -> Choice:
    """The fastest cell that fits; among equally fast ones, the smallest.

    The kinds of fine-tuning are not weighed against each other: where full fine-tuning fits it is
    what is named, since time is no reason to train fewer parameters. A moving reference (``ema``)
    is another objective, named only where no other was planned.
    """
    candidates = [c for c in cells if c.setting.reference != "ema"] or list(cells)
    fitting = [c for c in candidates if fits(c, device)]
    if not fitting:
        return Choice(None, _nothing(candidates, device))
    kind = "full" if any(c.setting.kind == "full" for c in fitting) else "lora"
    fitting = [c for c in fitting if c.setting.kind == kind]
    fastest = min(_cost(c, epochs) for c in fitting)
    near = [c for c in fitting if _cost(c, epochs) <= _EQUAL * fastest]
    best = min(near, key=lambda c: (c.peak, _cost(c, epochs)))
    return Choice(best, _reason(best, cells, candidates, device, epochs))


def _cost(cell: Cell, epochs: float) -> float:
    """Seconds a pair, the pass that was done once spread over the epochs."""
    return cell.seconds_per_pair + cell.once / cell.pairs / max(epochs, 1.0)


def _reason(
    best: Cell, cells: Sequence[Cell], candidates: Sequence[Cell], device: Device, epochs: float
) -> str:
    own = best.setting
    parts = [f"{best.peak / 2**30:.2f} of {device.memory / 2**30:.0f} GiB"]
    others = {
        "layout": ("padded", "padded rows"),
        "reference": ("frozen", "a frozen copy"),
    }
    for field, (value, name) in others.items():
        other = _find(cells, replace(own, **{field: value}))  # type: ignore[arg-type]
        if other is None or other is best:
            continue
        faster = _cost(other, epochs) / _cost(best, epochs)
        saved = (other.peak - best.peak) / 2**30
        parts.append(f"{faster:.2f}x the speed of {name} and {saved:.2f} GiB less")
    if own.reference == "precomputed":
        parts.append("its reference costs one pass, which every further run on these pairs reuses")
    if own.kind == "lora" and any(c.setting.kind == "full" for c in candidates):
        parts.append("no full fine-tuning fits")
    return "; ".join(parts)


def _nothing(cells: Sequence[Cell], device: Device) -> str:
    smallest = min(cells, key=lambda c: c.peak)
    part = max(smallest.memory, key=lambda name: smallest.memory[name])
    remedies = {
        "weights": "load them in bf16 (--precision bf16), or shard them over several devices",
        "reference": "use reference precomputed",
        "gradients": "train an adapter (--kind lora), or shard over several devices",
        "optimizer": "train an adapter (--kind lora), or shard over several devices",
        "head": "lower --lm_head_workspace",
        "activations": "fewer pairs a micro-batch (--per_device_train_batch_size), a smaller "
        "--max_length, or --checkpointing on",
    }
    return (
        f"nothing fits into {USABLE:.0%} of {device.memory / 2**30:.0f} GiB. The smallest is "
        f"{smallest.setting.describe()} with {smallest.peak / 2**30:.1f} GiB, most of it "
        f"{part}: {remedies[part]}"
    )


def _find(cells: Sequence[Cell], setting: object) -> Cell | None:
    return next((cell for cell in cells if cell.setting == setting), None)
