"""One rank of a launch: the training of every cell, one after the other."""

from typing import Any

import accelerate
import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.distributed import cells
from tests.trainer.parity import rows

EVALUATED = ("frozen", "packed")  # before it is trained


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """``spec``: ranks, and runs: ``[[engine, [[strategy, layout], ...]], ...]``."""
    results = {}
    for engine, wanted in spec["runs"]:
        overrides = use(engine)
        for strategy, layout in wanted:
            reset()
            trainer = cells.build(strategy, layout, spec["ranks"], **overrides)
            cell = train(trainer, (strategy, layout), engine, spec["ranks"])
            if engine == "fsdp2" and layout == "padded":
                check_saved(trainer, cell["after"], rank)
            results[f"{engine}/{strategy}/{layout}"] = cell
    return results if rank == 0 else {}


def train(trainer: Any, name: tuple[str, str], engine: str, ranks: int) -> dict[str, Any]:
    """One cell: what it left."""
    assert (trainer.engine, trainer.layout.name) == (engine, name[1])
    assert trainer.accelerator.num_processes == ranks
    before, evaluated = cells.whole(trainer.model), {}
    if name == EVALUATED and not engine.startswith("zero"):
        evaluated = {"eval": trainer.evaluate(rows(8, seed=1))}
    trainer.train()
    check_engine(trainer, engine, ranks)
    return cells.result(trainer, before) | evaluated


def use(engine: str) -> dict[str, Any]:
    """Make this process one of the engine's; return what the run's arguments must say."""
    if engine == "fsdp2":
        from tests.distributed.fsdp_on_cpu import use_fsdp2

        use_fsdp2()
    if not engine.startswith("zero"):
        return {}
    from tests.distributed.deepspeed_on_cpu import use_deepspeed_on_cpu

    use_deepspeed_on_cpu()
    return cells.zero(int(engine.removeprefix("zero")))


def reset() -> None:
    """Before another run in this process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()  # models would be cut while they are made


def check_saved(trainer: Any, after: dict[str, Any], rank: int) -> None:
    """A model that is saved by name is whole, and what was trained."""
    from dpo_fast.models import is_peft_model

    folder = trainer.args.output_dir
    trainer.save_model(folder)
    if rank:
        return
    name = "adapter_model" if is_peft_model(trainer.model) else "model"
    saved = load_file(f"{folder}/{name}.safetensors")
    assert len(saved) == len(after)
    for key, tensor in saved.items():
        own = key.replace(".weight", ".default.weight") if name == "adapter_model" else key
        assert torch.equal(tensor, after[own]), key


def check_engine(trainer: Any, engine: str, ranks: int) -> None:
    """The engine is the one that the test is about, for the policy and for its reference."""
    models = [m for m in (trainer.model, trainer.ref_model) if m is not None]
    if engine == "fsdp2":
        mixed = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        assert trainer.args.bf16 == (mixed is not None and mixed.param_dtype == torch.bfloat16)
        assert mixed is None or mixed.output_dtype is None
        if mixed is not None and trainer.reference.name == "frozen":
            assert all(p.dtype == mixed.param_dtype for p in trainer.ref_model.parameters())
        from dpo_fast.reference.shards import reshard_all
        from tests.distributed.fsdp_on_cpu import assert_sharded

        for model in models:
            reshard_all(model)
            assert_sharded(model, ranks)
        assert not waits_on_the_host(trainer.model)
        if trainer.ref_model is not None:
            assert waits_on_the_host(trainer.ref_model) == trainer.args.ref_offload
    elif engine == "zero3":
        for model in models:
            assert all(p.ds_tensor.ds_numel < p.ds_numel for p in model.parameters())
        if trainer.args.ref_offload:
            assert trainer._reference_engine.zero_offload_param().device == "cpu"
            assert getattr(trainer.deepspeed.zero_offload_param(), "device", "none") == "none"
    elif engine == "ddp":
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"


def waits_on_the_host(model: Any) -> bool:
    """Whether every unit of FSDP2 copies its shards from the host; all do, or none does."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    from dpo_fast.reference.shards import is_unit

    groups = [
        group
        for unit in filter(is_unit, model.modules())
        for group in unit._get_fsdp_state()._fsdp_param_groups
    ]
    found = {isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups}
    assert len(groups) > 2 and len(found) == 1
    return found.pop()
