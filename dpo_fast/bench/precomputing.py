"""One pass of the reference over a data set: by hand, TRL's, ours with its cache cold and warm.

Legend: P pairs of the data set.
"""

import copy
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.bench.case import Step
from dpo_fast.bench.gate import Errors, Gate
from dpo_fast.bench.machine import package_version
from dpo_fast.bench.training.naive import NaiveLoop
from dpo_fast.bench.training.trainers import our_trainer, trl_trainer
from dpo_fast.bench.workload import ModelShape, Row, make_model
from dpo_fast.integrations.interface import check_parameters

VARIANTS = ("naive", "TRL", "dpo_fast", "dpo_fast padded rows", "dpo_fast, found in the cache")
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# nats a sequence; as good as exact, and wrong
SOFT = {torch.float32: 2e-2, torch.bfloat16: 1.0}
HARD = {torch.float32: 1e-1, torch.bfloat16: 30.0}


def reference_model(shape: ModelShape, device: str, dtype: torch.dtype) -> nn.Module:
    """The same weights for every variant."""
    model: nn.Module = make_model(shape, seed=1)
    return model.to(device, dtype)


def precompute_gate(rows: list[Row], shape: ModelShape, device: str, dtype: torch.dtype) -> Gate:
    """Compares ``[2, P]`` log-probs with the float64 model's, row by row."""
    gold = _by_hand(reference_model(shape, device, torch.float64), rows, 1)

    def measure(found: Tensor) -> Errors:
        return {"logps": float((found.double().to(gold.device) - gold).abs().max())}

    return Gate(measure, {"logps": SOFT[dtype]}, {"logps": HARD[dtype]})


def make_pass(
    variant: str, rows: list[Row], batch: int, shape: ModelShape, device: str, dtype: torch.dtype
) -> Step:
    """A step that gives the log-probs of all rows, ``[2, P]``.

    Raises:
        LeftOut: TRL is not installed. InterfaceChanged: its pass takes other arguments.
    """
    model = reference_model(shape, device, dtype)
    if variant == "naive":
        return lambda: _by_hand(model, rows, batch)
    if variant == "TRL":
        return _trl_pass(model, rows, batch, device)
    layout = "padded" if variant.endswith("padded rows") else "auto"
    return _our_pass(model, rows, batch, device, layout, warm=variant.endswith("cache"))


@torch.no_grad()
def _by_hand(model: nn.Module, rows: list[Row], batch: int) -> Tensor:
    loop = NaiveLoop(model, model)
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(rows), batch):
        made = loop.collator(rows[start : start + batch])
        found.append(loop.logps(model, {k: v.to(device) for k, v in made.items()}).view(2, -1))
    return torch.cat(found, dim=1)


def _trl_pass(model: nn.Module, rows: list[Row], batch: int, device: str) -> Step:
    from datasets import Dataset

    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": batch}
    trainer = trl_trainer(model, None, device, **options)
    one_pass = trainer._precompute_ref_logps
    where = "DPOTrainer._precompute_ref_logps"
    seen = f"trl {package_version('trl')}"
    check_parameters(one_pass, ("dataset", "name", "batch_size"), where, seen)
    data = Dataset.from_list(rows)

    def step() -> Tensor:
        # TRL's cache goes by the data set's fingerprint: a new one is a data set not yet seen
        fresh = data.select(range(len(data)), new_fingerprint=uuid.uuid4().hex)
        with _no_bars():
            return _columns(one_pass(fresh, "bench", batch))

    return step


@contextmanager
def _no_bars() -> Iterator[None]:
    """TRL draws a progress bar for every pass unless the environment forbids it."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def _our_pass(
    model: nn.Module, rows: list[Row], batch: int, device: str, layout: str, warm: bool
) -> Step:
    from datasets import Dataset

    trainer = our_trainer(
        copy.deepcopy(model),  # a policy for the constructor; the pass never runs it
        model,
        device,
        reference="precomputed",
        precompute_ref_batch_size=batch,
        ref_cache_dir=_new_folder(),
        batch_layout=layout,
    )
    data = Dataset.from_list(rows)

    def step() -> Tensor:
        if not warm:
            trainer.reference.root = Path(_new_folder())
        return _columns(trainer.attach(data, "bench"))

    return step


def _new_folder() -> str:
    return tempfile.mkdtemp(prefix="dpo-fast-bench-")


def _columns(dataset: Any) -> Tensor:
    return torch.stack([torch.tensor(dataset[name][:]) for name in COLUMNS])
