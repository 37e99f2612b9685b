"""One rank: what FSDP2 holds at each moment of a step, policy and frozen reference.

Peaks are those of :mod:`tests.distributed.census`. Gathered bytes are those of parameters that are
not shards, looked at before and after every decoder layer and every model, forwards and backwards.
"""

import copy
import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.distributed import cells
from tests.distributed.census import watch_second_step
from tests.distributed.train_cells import check_engine, reset, use
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import config_kwargs, perturbed, rows

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6}


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """Bytes by name. ``spec``: engine "single" or "fsdp2", ranks, folder."""
    reset()
    if spec["engine"] == "single":
        trainer = build(1, {"ddp_backend": None})
        census = watch_second_step(trainer)
        trainer.train()
        return {"peaks": census.peaks, "before": census.before}
    overrides = use("fsdp2")
    check_completed(rank)
    trainer = build(spec["ranks"], overrides)
    gathered = Gathered([trainer.model, trainer.ref_model])
    whole = cells.whole(trainer.model)
    census = watch_second_step(trainer)
    trainer.train()
    check_engine(trainer, "fsdp2", spec["ranks"])
    found = {
        "layer": sum(t.nbytes for n, t in whole.items() if ".layers.0." in n),
        "root": sum(t.nbytes for n, t in whole.items() if ".layers." not in n),
        "model": sum(t.nbytes for t in whole.values()),
        "gathered": gathered.most,
        "looks": gathered.looks,
        "peaks": census.peaks,
        "before": census.before,
    }
    reset()
    trainer = build(spec["ranks"], {**overrides, "reference": "precomputed"})
    census = watch_second_step(trainer)
    trainer.train()
    return {
        **found,
        "peaks without": census.peaks,
        "example": run_example(spec["folder"]),
    }


def check_completed(rank: int) -> None:
    """Weights that were left on the meta device of all ranks but the first come from there."""
    from accelerate import PartialState

    from dpo_fast.trainer.engines import complete_weights

    PartialState(cpu=True, backend="gloo")
    expected = tiny_model("llama", tie_word_embeddings=True)
    model = copy.deepcopy(expected)
    if rank:
        model.to("meta")
        for name, buffer in expected.named_buffers():  # transformers keeps these
            model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    complete_weights(model, "policy")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for name, param in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), param), name


def run_example(folder: str) -> float:
    """``examples/fsdp2_two_processes.py``, as it is but shorter: this rank's share of the model."""
    reset()
    os.chdir(folder)
    sys.path.insert(0, str(EXAMPLES))
    offline = importlib.import_module("offline")
    offline.ARGUMENTS |= {"max_steps": 6, "ddp_backend": "gloo"}  # type: ignore[attr-defined]
    return runpy.run_path(str(EXAMPLES / "fsdp2_two_processes.py"))["main"]()


def build(ranks: int, overrides: dict[str, Any]) -> Any:
    import dpo_fast

    config = {
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "max_length": 8,
        "ddp_backend": "gloo",
        "batch_layout": "packed",
        **overrides,
    }
    model = tiny_model("llama", **SHAPE)
    return dpo_fast.Trainer(
        model=model,
        ref_model=perturbed(model),
        args=dpo_fast.DPOConfig(**config_kwargs(**config)),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )


class Gathered:
    """The most bytes of whole parameters that the models held at once."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.models, self.most, self.looks = models, 0, 0
        for model in models:
            for name, module in model.named_modules():
                if name == "" or name.rpartition(".")[0].endswith("layers"):
                    module.register_forward_pre_hook(self.look, prepend=False)
                    module.register_forward_hook(self.look)
                    module.register_full_backward_pre_hook(self.look)

    def look(self, *_: Any) -> None:
        self.looks += 1
        held = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for model in self.models
            for p in model.parameters()
            if not isinstance(p, DTensor)
        }
        self.most = max(self.most, sum(held.values()))
