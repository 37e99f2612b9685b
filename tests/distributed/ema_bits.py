"""One rank: every update of a sharded TR-DPO reference against the same update of whole tensors."""

from typing import Any

import torch

from tests.distributed import cells
from tests.distributed.train_cells import check_engine, reset, use
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import lora_config
from tests.trainer.parity import config_kwargs, perturbed, rows

CASES = ("stochastic", "shadow", "adapter")


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """The number of updates checked, by case."""
    engine, ranks = spec["engine"], spec["ranks"]
    overrides = use(engine)
    checked = {}
    for case in CASES:
        reset()
        trainer = build(case, ranks, overrides)
        updates = watch(trainer)
        trainer.train()
        check_engine(trainer, engine, ranks)
        checked[case] = len(updates)
        assert all(updates), (case, updates)
    return checked


def build(case: str, ranks: int, overrides: dict[str, Any]) -> Any:
    """A bf16 reference beside a float32 policy, or adapters; an update every step."""
    import dpo_fast

    config = {
        "reference": "ema",
        "ref_ema_rounding": "auto" if case == "adapter" else case,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.1,
        "per_device_train_batch_size": cells.PAIRS // ranks,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "ddp_backend": "gloo",
        **overrides,
    }
    model = tiny_model("llama", num_hidden_layers=3, intermediate_size=50)  # 50 rows: uneven shards
    more: dict[str, Any] = {"ref_model": perturbed(model).to(torch.bfloat16)}
    if case == "adapter":
        more = {"peft_config": lora_config()}
    return dpo_fast.Trainer(
        model=model,
        args=dpo_fast.DPOConfig(**config_kwargs(**config)),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        **more,
    )


def watch(trainer: Any) -> list[bool]:
    """From here on each update is done twice; the list fills with whether some weight moved."""
    from torch.distributed.tensor.debug import CommDebugMode

    from dpo_fast.functional.ema import EmaPlan

    reference, moved = trainer.reference, []
    update = reference.update

    def checked() -> None:
        pairs = list(reference._pairs())
        refs = {name: cells._whole_state(ref) for name, ref, _ in pairs}
        policies = {name: cells._whole_state(live) for name, _, live in pairs}
        shadow = None
        if reference.rounding == "shadow":
            state = reference.state_dict()
            shadow = [cells._whole_state(state[f"shadow.{name}"]) for name in refs]
        before = {name: ref.clone() for name, ref in refs.items()}
        plan = EmaPlan(refs, policies, shadow=shadow)
        step = reference.updates
        with CommDebugMode() as communication:
            update()
        assert communication.get_total_counts() == 0, communication.get_comm_counts()
        rounding = "stochastic" if reference.rounding == "stochastic" else "nearest"
        plan.update_(reference.alpha, rounding=rounding, seed=reference.seed, step=step)
        for name, ref, _ in reference._pairs():
            assert torch.equal(cells._whole_state(ref), refs[name]), name
        moved.append(any(not torch.equal(refs[name], before[name]) for name in refs))

    reference.update = checked
    return moved
