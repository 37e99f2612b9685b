"""Whole DPO steps on the CPU: naive full-logits loop, TRL 1.16, dpo_fast.

One process, the three variants interleaved, medians; a step is collator, batch preparation, policy
and reference forward, backward, clipping and AdamW. The model, rows, optimizer, clipping, attention
and thread count are the same for all. The naive loop and dpo_fast must first agree on the loss.
Peak memory is measured in a process of its own for each variant.

    python -m benchmarks.train_step [--quick]
"""

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import machine_line, write_result
from benchmarks.workload import LENGTHS, ModelShape, Row, make_model, make_rows

VARIANTS = ("naive", "trl", "dpo_fast")
BETA = 0.1


class NaiveLoop:
    """What one writes after reading the paper: full logits of both models, log-softmax, gather,
    sum.
    """

    def __init__(self, policy: nn.Module, ref: nn.Module) -> None:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        self.policy, self.ref = policy, ref.eval().requires_grad_(False)
        self.collator = DataCollatorForPreference(pad_token_id=0, max_length=None)

    def loss(self, rows: list[Row]) -> Tensor:
        batch = self.collator(rows)
        logps = self.logps(self.policy, batch)
        with torch.no_grad():
            ref = self.logps(self.ref, batch)
        chosen, rejected = (logps - ref).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    @staticmethod
    def logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        target, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
        per_token = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return (per_token * mask).sum(-1)


class TrainerLoop:
    """The step of a TRL-compatible trainer: its collator, its batch preparation, its loss."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.current_gradient_accumulation_steps = 1
        if hasattr(trainer, "layout_attention"):  # train() would be inside
            self.attention = trainer.layout_attention()
            self.attention.__enter__()

    def loss(self, rows: list[Row]) -> Tensor:
        trainer = self.trainer
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        counts = trainer._get_num_items_in_batch([batch], trainer.args.device)
        return trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)


def build(variant: str, shape: ModelShape) -> tuple[Any, nn.Module]:
    """The variant and its policy; the same weights for all.

    ``dpo_fast`` has padded rows, like the others; a layout's name stands for dpo_fast in it.
    """
    policy, ref = make_model(shape, seed=0), make_model(shape, seed=1)
    policy.train()
    if variant == "naive":
        return NaiveLoop(policy, ref), policy
    common = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_length": None,
        "beta": BETA,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    }
    if variant == "trl":
        import trl

        config, trainer_class = trl.DPOConfig(**common), trl.DPOTrainer
    else:
        import dpo_fast

        layout = "padded" if variant == "dpo_fast" else variant
        config = dpo_fast.DPOConfig(**common, logging_steps=1000, batch_layout=layout)
        trainer_class = dpo_fast.Trainer
    trainer = trainer_class(
        policy, ref, args=config, train_dataset=text_rows(), processing_class=tokenizer()
    )
    return TrainerLoop(trainer), trainer.model


def text_rows() -> Any:
    """One text row: trainers want a data set at construction; the benchmark feeds its own
    tokens.
    """
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}])


def tokenizer() -> Any:
    """The smallest tokenizer that the trainers accept."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(("<pad>", "<eos>", "a", "b", "c"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


class Stepper:
    """A variant with optimizer and clipping: ``step(rows)`` is one whole training step."""

    def __init__(self, variant: str, shape: ModelShape) -> None:
        self.loop, self.policy = build(variant, shape)
        self.policy.train()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)

    def step(self, rows: list[Row]) -> float:
        loss = self.loop.loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)


def measure_time(shape: ModelShape, batches: list[list[Row]], rounds: int) -> dict[str, Any]:
    """Medians of whole steps, variants interleaved, order rotated."""
    steppers = {v: Stepper(v, shape) for v in VARIANTS}
    losses = {v: s.step(copy.deepcopy(batches[0])) for v, s in steppers.items()}
    for variant, loss in losses.items():
        if abs(loss - losses["naive"]) > 1e-4 * abs(losses["naive"]):
            raise SystemExit(f"{variant} computes another loss: {losses}; no speed is reported.")
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for i in range(rounds):
        rows = batches[(i + 1) % len(batches)]
        for variant in VARIANTS[i % 3 :] + VARIANTS[: i % 3]:
            begin = time.perf_counter()
            steppers[variant].step(rows)
            seconds[variant].append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses}


def measure_memory(variant: str, shape: ModelShape, rows: list[Row]) -> dict[str, float]:
    """Peak resident memory of one step beyond what the built variant holds, MiB (run in its own
    process).
    """
    stepper = Stepper(variant, shape)
    stepper.step(make_rows(LENGTHS["1:1"], 1, shape.vocab, seed=9))  # optimizer state, thread pools
    before = resident_mib()
    peak = sampled_peak(lambda: stepper.step(rows))
    return {"before": before, "extra_peak": peak - before}


def resident_mib() -> float:
    """Resident memory of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS line: this benchmark needs Linux.")


def sampled_peak(work: Callable[[], Any]) -> float:
    """Highest resident memory while ``work`` runs, sampled every millisecond, MiB."""
    done, highest = threading.Event(), [resident_mib()]

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], resident_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return highest[0]


def memory_in_child(variant: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--memory-of", variant]
    done = subprocess.run(
        command + (["--quick"] if quick else []), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(timing: dict[str, Any], memory: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Table, ratios and goals."""
    medians = {v: statistics.median(s) for v, s in timing["seconds"].items()}
    ratios = [
        min(naive, trl) / ours
        for naive, trl, ours in zip(*(timing["seconds"][v] for v in VARIANTS), strict=True)
    ]
    baseline_memory = min(memory[v]["extra_peak"] for v in ("naive", "trl"))
    return {
        "pairs_per_second": {v: pairs / s for v, s in medians.items()},
        "median_seconds": medians,
        "speedup_over_faster_baseline": min(medians["naive"], medians["trl"]) / medians["dpo_fast"],
        "speedup_median_of_ratios": statistics.median(ratios),
        "extra_peak_mib": {v: memory[v]["extra_peak"] for v in VARIANTS},
        "memory_ratio": memory["dpo_fast"]["extra_peak"] / baseline_memory,
        "goals": {"speedup": ">= 3.0", "memory_ratio": "<= 0.5"},
        "seconds": timing["seconds"],
        "losses": timing["losses"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, three rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help="name of the result file")
    options = parser.parse_args()
    logging.getLogger("dpo_fast").setLevel(logging.WARNING)
    shape = ModelShape(128, 2, 4, 8000) if options.quick else ModelShape()
    pairs = 4
    batches = [make_rows(LENGTHS["2:1"], pairs, shape.vocab, seed=s) for s in range(4)]
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, shape, batches[0])))
        return
    memory = {v: memory_in_child(v, options.quick) for v in VARIANTS}
    timing = measure_time(shape, batches, 3 if options.quick else options.rounds)
    result = report(timing, memory, pairs)
    print(json.dumps({"machine": machine_line(), **result}, indent=1))
    if not options.quick:
        workload = {"shape": shape.__dict__, "lengths": LENGTHS["2:1"].__dict__, "pairs": pairs}
        write_result(options.out or "train_step_cpu", {"workload": workload, **result})


if __name__ == "__main__":
    main()
