"""Whole DPO steps on a GPU: TRL 1.16 against dpo_fast in each layout, 0.5B- and 7B-shaped models.

    python -m benchmarks.train_gpu [--models 0.5B 7B] [--modes full lora] [--lengths 2:1 4:1]
        [--pairs N] [--profile]

A step is collator, batch preparation, policy and reference forward, backward, clipping and AdamW
(fused), with gradient checkpointing, bfloat16 weights and SDPA as both trainers find them; "full"
trains every weight beside a frozen copy, "lora" adapters over a shared base. Weights are random, in
the shapes of Qwen2.5. Variants of a part run one after another, each with models of its own (two of
7B do not fit side by side), on the same batches. Batches differ in tokens and padding: pairs a
second are those of all batches over the sum of each batch's median time. A variant whose first loss
is off the naive float32 log-softmax over the same bfloat16 model's logits reports no speed.

Peak memory is the allocator's, weights and optimizer included. Parts that
benchmarks/results/train_gpu.json holds for these sources are skipped.
"""

import argparse
import copy
import gc
import statistics
import time
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.resume import load_parts, save_parts
from benchmarks.step_profile import profile_step, show_profile
from dpo_fast.bench.training.naive import NaiveLoop
from dpo_fast.bench.training.trainers import TrainerLoop, our_trainer, trl_trainer
from dpo_fast.bench.workload import LENGTHS, Row, make_rows

NAME = "train_gpu"
VARIANTS = ("TRL", "padded", "packed", "shared_prefix")
SHAPES = {  # of Qwen2.5: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
PAIRS = {"0.5B": 64, "7B": 8}  # 16 of 0.5B leave the device waiting for the host
GOALS = {"2:1": 2.0, "4:1": 3.0}  # shared prefix over TRL, pairs a second
BATCHES = 4
CLIP = 1.0
LOSS_LIMIT = 0.05  # of a bfloat16 step's loss against the gold's


def build(name: str, seed: int) -> Any:
    """A model of that shape on the GPU, bfloat16."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, inner, layers, heads, key_heads, vocab, tied = SHAPES[name]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=vocab,
        tie_word_embeddings=tied, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def models(name: str, mode: str) -> tuple[Any, Any, dict[str, Any]]:
    """Policy, reference (its weights, moved a little; None with adapters), trainers' options."""
    policy = build(name, 0)
    if mode == "lora":
        from peft import LoraConfig

        # Not the identity at the start, or the loss would be log 2 whatever is computed.
        adapter = LoraConfig(
            r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        return policy, None, {"peft_config": adapter}
    reference = build(name, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    return policy, reference, {}


def trainer_of(variant: str, name: str, mode: str) -> Any:
    policy, reference, options = models(name, mode)
    if variant == "TRL":
        return trl_trainer(policy, reference, "cuda", **options)
    options["reference"] = "frozen" if reference is not None else "adapter"
    return our_trainer(policy, reference, "cuda", batch_layout=variant, **options)


def gold_loss(trainer: Any, rows: list[Row]) -> float:
    """The loss by hand: full logits, float32 softmax, one pair at a time."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    frozen = getattr(trainer, "ref_model", None)

    def logps(model: nn.Module, batch: Any) -> torch.Tensor:
        target, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        out = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return (out.gather(-1, target.unsqueeze(-1)).squeeze(-1) * mask).sum(-1)

    losses = []
    with torch.no_grad():
        for row in rows:
            batch = {k: v.cuda() for k, v in NaiveLoop(policy, logps).collator([row]).items()}
            policy_logps = logps(policy, batch)
            if frozen is None:
                with policy.disable_adapter():
                    reference = logps(policy, batch)
            else:
                reference = logps(frozen, batch)
            chosen, rejected = (policy_logps - reference).chunk(2)
            losses.append(-nn.functional.logsigmoid(0.1 * (chosen - rejected)))
    return float(torch.cat(losses).mean())


def run_variant(
    variant: str, name: str, mode: str, batches: list[list[Row]], steps: int, profiled: bool
) -> dict[str, Any]:
    """Seconds a step and peak memory; where the time goes, if it is to be ``profiled``."""
    trainer = trainer_of(variant, name, mode)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    if mode == "lora":
        trainer.model.enable_input_require_grads()
    trainer.model.train()
    gold = gold_loss(trainer, batches[0]) if variant == "TRL" else None
    loop = TrainerLoop(trainer)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(rows: list[Row]) -> float:
        loss = loop.loss(copy.deepcopy(rows))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    first = step(batches[0])
    for rows in batches[1:]:
        step(rows)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for index in range(steps):
        rows = batches[index % len(batches)]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(rows)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    found: dict[str, Any] = {
        "loss": first,
        "seconds": seconds,
        "pairs_per_second": pairs_per_second(seconds, len(batches), len(batches[0])),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    if profiled:
        found["profile"] = profile_step(lambda: step(batches[0]))
    return found if gold is None else found | {"gold": gold}


def pairs_per_second(seconds: list[float], batches: int, pairs: int) -> float:
    """Of a run over all batches: ``seconds[i]`` is a step on batch ``i % batches``.

    Raises:
        ValueError: a batch has no step.
    """
    if len(seconds) < batches:
        raise ValueError(f"{len(seconds)} steps over {batches} batches: each needs one, --steps")
    times = [statistics.median(seconds[i::batches]) for i in range(batches)]
    return batches * pairs / sum(times)


def run_part(name: str, mode: str, lengths: str, pairs: int, options: Any) -> dict[str, Any]:
    """All variants on the same batches."""
    vocab = SHAPES[name][5]
    batches = [make_rows(LENGTHS[lengths], pairs, vocab, seed=s) for s in range(BATCHES)]
    rows: dict[str, Any] = {}
    for variant in options.variants:
        try:
            rows[variant] = run_variant(
                variant, name, mode, batches, options.steps, options.profile
            )
        except torch.OutOfMemoryError as error:
            rows[variant] = {"left_out": str(error).splitlines()[0][:200]}
        gc.collect()
        torch.cuda.empty_cache()
    gold = rows.get("TRL", {}).get("gold")
    base = rows.get("TRL", {}).get("pairs_per_second")
    for row in rows.values():
        if "loss" not in row or gold is None:
            continue
        if abs(row["loss"] - gold) > LOSS_LIMIT * max(1.0, abs(gold)):
            row["left_out"] = f"loss {row['loss']:.4f}, by hand {gold:.4f}: no speed is reported"
            del row["pairs_per_second"], row["seconds"]
        elif base:
            row["over_trl"] = row["pairs_per_second"] / base
    return {"pairs": pairs, "lengths": LENGTHS[lengths].__dict__, "variants": rows}


def show(part: str, found: dict[str, Any]) -> None:
    print(f"\n{part}")
    for variant, row in found["variants"].items():
        if "left_out" in row:
            print(f"  {variant:14s} {row['left_out']}")
            continue
        print(
            f"  {variant:14s} {row['pairs_per_second']:7.2f} pairs/s  "
            f"{row.get('over_trl', 0.0):5.2f} x TRL  {row['peak_gib']:6.1f} GiB  "
            f"loss {row['loss']:.4f} (by hand {found['variants']['TRL'].get('gold', 0.0):.4f})",
            flush=True,
        )
        if "profile" in row:
            show_profile(variant, row["profile"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--modes", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--lengths", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, help="of a batch")
    parser.add_argument("--profile", action="store_true", help="and where a step's time goes")
    parser.add_argument("--seconds", type=float, default=480.0)
    options = parser.parse_args()
    began, parts = time.monotonic(), load_parts(NAME)
    for name, mode, lengths in product(options.models, options.modes, options.lengths):
        pairs = options.pairs or PAIRS[name]
        part = f"{name} {mode} {lengths}" + (f", {pairs} pairs" if options.pairs else "")
        if part in parts:
            continue
        if time.monotonic() - began > options.seconds:
            print(f"\nout of time before {part}: run the same command again")
            break
        parts[part] = run_part(name, mode, lengths, pairs, options)
        show(part, parts[part])
        save_parts(NAME, parts)


if __name__ == "__main__":
    main()
