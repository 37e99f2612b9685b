"""What a training would need, from a model's config alone: memory and time, before any weight."""

from dpo_fast.plan.batches import Batches, batches_of_dataset, batches_of_lengths
from dpo_fast.plan.cells import Cell, Run, plan_cells, settings, why_not_layouts
from dpo_fast.plan.devices import DEVICES, Device, find_device
from dpo_fast.plan.setting import Setting

__all__ = [
    "DEVICES",
    "Batches",
    "Cell",
    "Device",
    "Run",
    "Setting",
    "batches_of_dataset",
    "batches_of_lengths",
    "find_device",
    "plan_cells",
    "settings",
    "why_not_layouts",
]
