"""Peaks of real trainings, from the events of torch's own CPU allocator.

    python -m tests.plan.measure RESULTS.json CASE...

The allocator tells torch's profiler about every block that it gives out and takes back, made by an
operator, inside of one or by autograd: independent of the plan, which counts fake tensors as they
leave operators, and exact whatever else the machine does (resident memory would depend on what the
C library returns to the system).
"""

import gc
import json
import sys
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from tests.plan.cases import CASES, Case


class _Clock(TrainerCallback):
    """When the second step began: from then on the optimizer's states are there."""

    began = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.began = time.time_ns()


def measure(case: Case) -> int:
    """Bytes allocated at most, weights and all, from the second step on."""
    from torch.profiler import ProfilerActivity, profile

    from dpo_fast.backends.scratch import scratch

    scratch.release()
    gc.collect()
    clock = _Clock()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = build(case)
        trainer.add_callback(clock)
        trainer.train()
        del trainer
        gc.collect()  # a block that is freed in the next case would be missing there
    total = most = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    for when, change in memory:
        total += change
        if when >= clock.began:
            most = max(most, total)
    return most


def build(case: Case) -> Any:
    """The trainer of a case, with its model made from the config."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    import dpo_fast
    from tests.tiny import tiny_tokenizer

    setting = case.setting
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config(), dtype=setting.weight_dtype)
    args = dpo_fast.DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="dpo-fast-plan-"),
        per_device_train_batch_size=case.pairs,
        gradient_accumulation_steps=case.accumulation,
        max_steps=2,
        bf16=setting.autocast is not None,
        gradient_checkpointing=setting.checkpointing,
        batch_layout=setting.layout,
        reference=setting.reference,
        ref_model_sync_steps=1,
        lm_head_workspace=case.workspace,
        max_length=None,
        ref_keep="none",  # as for a model that was loaded by name
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=True,
        use_cpu=True,
        ref_cache_dir=tempfile.mkdtemp(prefix="dpo-fast-plan-"),
    )
    trainer = dpo_fast.Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(case.rows() * (2 * case.accumulation)),
        processing_class=tiny_tokenizer(),
        peft_config=case.lora() if setting.kind == "lora" else None,
    )
    # Each micro-batch holds the same pairs.
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def main(names: list[str], target: str) -> None:
    peaks = {}
    for name in names:
        peaks[name] = measure(CASES[name])
        print(name, peaks[name], flush=True)
    with open(target, "w") as file:
        json.dump(peaks, file)


if __name__ == "__main__":
    main(sys.argv[2:], sys.argv[1])
