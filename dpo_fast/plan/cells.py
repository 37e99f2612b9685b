"""The cells of the plan: memory at the peak and time of a step, for each way to run a training.

Legend: P pairs, N scored tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from dpo_fast.layouts.support import why_not_packed, why_not_shared
from dpo_fast.plan.batches import Batches, collate
from dpo_fast.plan.devices import Device
from dpo_fast.plan.fake import FakeModel
from dpo_fast.plan.setting import ADAMW_STATES, KINDS, LAYOUTS, PRECISIONS, REFERENCES, Setting
from dpo_fast.plan.trace import Trace, TraceOptions, trace_step

MEMORY_PARTS = ("weights", "reference", "gradients", "optimizer", "head", "activations")
TIME_PARTS = ("policy", "reference", "head", "optimizer")


@dataclass(frozen=True)
class Cell:
    """One row of the plan.

    Attributes:
        memory: bytes by :data:`MEMORY_PARTS` at the moment of the peak.
        phase: "reference", "forward" or "backward", or "optimizer": when the peak is.
        seconds: of an optimizer step by :data:`TIME_PARTS`.
        once: seconds of the pass that computes a precomputed reference, for as many pairs as a
            step has: the cost a step if there is one epoch.
        pairs: of a micro-batch (time).
        tokens: positions that its forward computes (time).
    """

    setting: Setting
    memory: Mapping[str, int]
    phase: str
    seconds: Mapping[str, float]
    once: float
    pairs: int
    tokens: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Of a step, without what is done once."""
        return sum(self.seconds.values())

    @property
    def seconds_per_pair(self) -> float:
        """Of a step, without what is done once."""
        return self.step_seconds / self.pairs

    def shares(self) -> dict[str, float]:
        """Of the step's time."""
        total = self.step_seconds or 1.0
        return {name: value / total for name, value in self.seconds.items()}


class Run(NamedTuple):
    """What all cells have in common.

    Attributes:
        device: that trains.
        efficiency: share of the device's peak that matrix products reach; scales seconds, not
            shares, save the optimizer's.
        accumulation: micro-batches of an optimizer step.
        sync_steps: optimizer steps between two updates of an ``ema`` reference.
        max_length, truncation_mode, workspace: as in DPOConfig.
    """

    device: Device
    efficiency: float = 0.4
    accumulation: int = 1
    sync_steps: int = 512
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    workspace: int | None = None


def settings(
    kinds: Iterable[str] = KINDS,
    precisions: Iterable[str] = PRECISIONS[:1],
    checkpointing: Iterable[bool] = (True,),
    layouts: Iterable[str] = LAYOUTS,
    references: Iterable[str] = REFERENCES,
) -> list[Setting]:
    """All combinations that exist."""
    found = [
        Setting(*names) for names in product(kinds, precisions, checkpointing, layouts, references)
    ]
    return [setting for setting in found if setting.why_not() is None]


def plan_cells(
    config: Any, batches: Batches, wanted: Iterable[Setting], run: Run, lora: Any
) -> Iterator[Cell]:
    """Cells of the settings, in their order; each model and step is traced once.

    Args:
        config: of the model.
        lora: a ``peft.LoraConfig`` for the kind "lora".

    Raises:
        ValueError: the model cannot be planned.
    """
    models: dict[tuple[str, str], FakeModel] = {}
    traces: dict[Any, Trace] = {}
    for setting in wanted:
        key = (setting.kind, setting.precision)
        if key not in models:
            models[key] = FakeModel(config, setting, lora)
        yield _Planner(models[key], batches, run, traces).cell(setting)


def why_not_layouts(config: Any, lora: Any = None) -> dict[str, str]:
    """Layouts that the model's architecture excludes, with the reason."""
    model = FakeModel(config, Setting("full", "bf16", False, "padded", "precomputed"), lora).module
    reasons = {"packed": why_not_packed(model), "shared_prefix": why_not_shared(model)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


class _Planner:
    def __init__(
        self, model: FakeModel, batches: Batches, run: Run, traces: dict[Any, Trace]
    ) -> None:
        self.model, self.batches, self.run, self.traces = model, batches, run, traces

    def cell(self, setting: Setting) -> Cell:
        largest = self._trace(setting, self.batches.largest, "largest")
        typical = largest
        if self.batches.typical is not self.batches.largest:
            typical = self._trace(setting, self.batches.typical, "typical")
        memory, phase = self._memory(setting, largest)
        seconds, once = self._seconds(setting, typical)
        pairs = len(self.batches.typical)
        return Cell(setting, memory, phase, seconds, once, pairs, typical.tokens)

    def _trace(self, setting: Setting, rows: list[Any], name: str) -> Trace:
        if self.batches.typical is self.batches.largest:
            name = "both"
        key = (replace(setting, reference=""), name)
        if key not in self.traces:
            on_accelerator = self.run.device.kind != "cpu"
            batch = collate(
                rows,
                setting.layout,
                max_length=self.run.max_length,
                truncation_mode=self.run.truncation_mode,
                on_accelerator=on_accelerator,
                joins_rows=why_not_packed(self.model.module) is None,
            )
            self.traces[key] = trace_step(
                self.model,
                batch,
                checkpointing=setting.checkpointing,
                options=TraceOptions(
                    self.run.device.kind, self.run.accumulation > 1, self.run.workspace
                ),
            )
        return self.traces[key]

    def _memory(self, setting: Setting, trace: Trace) -> tuple[dict[str, int], str]:
        weights, trained = self.model.weight_bytes, self.model.trained_bytes
        reference = weights if setting.holds_second_model() else 0
        if setting.reference == "ema" and not setting.holds_second_model():
            reference = trained  # a copy of the adapter
        held, phase = trace.peak(setting.runs_reference)
        memory = {
            "weights": weights,
            "reference": reference,
            "gradients": held.get("gradients", 0),
            "optimizer": ADAMW_STATES * trained,
            "head": held.get("head", 0),
            "activations": held.get("activations", 0),
        }
        return memory, phase

    def _seconds(self, setting: Setting, trace: Trace) -> tuple[dict[str, float], float]:
        run, device = self.run, self.run.device
        rate = device.rate(setting.precision) * run.efficiency
        steps = run.accumulation
        # One product of the head scores the reference, in the step or beforehand.
        reference_pass = (trace.reference_flops + trace.head_flops) / rate
        # AdamW reads weight, gradient and both states, and writes weight and states.
        moved: float = (2 + 2 * ADAMW_STATES + 1) * self.model.trained_bytes
        if setting.reference == "ema":  # reads both, writes the reference
            moved += 3 * self.model.trained_bytes / run.sync_steps
        seconds = {
            "policy": steps * trace.policy_flops / rate,
            "reference": steps * reference_pass if setting.runs_reference else 0.0,
            "head": steps * trace.head_products * trace.head_flops / rate,
            "optimizer": moved / device.bandwidth,
        }
        return seconds, 0.0 if setting.runs_reference else steps * reference_pass
