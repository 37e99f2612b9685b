"""The two stages of the demo that train; each runs in a process of its own (see `processes`)."""

import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from transformers import PreTrainedModel

from dpo_fast.cli.logs import show_logs
from dpo_fast.config import DPOConfig
from dpo_fast.curves import write_curves, write_metrics
from dpo_fast.demo.checker import prefers
from dpo_fast.demo.data import Pair, path_of, read_pairs
from dpo_fast.demo.encode import encode
from dpo_fast.demo.measure import (
    PeakMemory,
    TimedTrainer,
    folder_bytes,
    now,
    reference_memory_bytes,
)
from dpo_fast.demo.model import build_model, train_tokenizer
from dpo_fast.demo.scores import accuracy_of, answers_of, preference_margins
from dpo_fast.demo.settings import Settings
from dpo_fast.demo.sft import finetune
from dpo_fast.progress import use_progress

BASE, CACHE, REF_CACHE = "base", "cache", "ref_cache"


class Verdict(NamedTuple):
    """How a model does on the held-out pairs."""

    accuracy: float  # share of pairs whose chosen answer is likelier
    margins: list[float]  # log p(chosen) - log p(rejected), pair by pair
    answers_right: float  # share of greedy answers that the checker accepts
    samples: list[dict[str, Any]]  # question, answer, verdict


def judge(model: PreTrainedModel, tokenizer: Any, pairs: list[Pair]) -> Verdict:
    """Preferences and answers on ``pairs``."""
    margins = preference_margins(model, tokenizer, pairs)
    said = answers_of(model, tokenizer, [pair.prompt for pair in pairs])
    verdicts = [prefers(pair.prompt, text) for pair, text in zip(pairs, said, strict=True)]
    samples: dict[str, dict[str, Any]] = {}
    for pair, text, right in zip(pairs, said, verdicts, strict=True):
        samples.setdefault(pair.kind, {"question": pair.prompt, "answer": text, "right": right})
    return Verdict(
        accuracy_of(margins),
        [round(margin, 4) for margin in margins],
        sum(verdicts) / len(verdicts),
        [samples[kind] for kind in sorted(samples)],
    )


def prepare_base(folder: str, settings: Settings) -> dict[str, Any]:
    """Tokenizer and model from the shipped text, saved in ``folder/base``; how they do before DPO.

    The model learns right and wrong answers alike, so it has no preference yet.
    """
    train, heldout = read_pairs("train"), read_pairs("heldout")
    texts = [text for pair in train for text in pair[1:]]
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    model = build_model(tokenizer, settings)
    if not settings.use_cpu:
        model = model.to("cuda")  # type: ignore[arg-type]
    dialogues = [
        encode(tokenizer, pair.prompt, answer)
        for pair in train
        for answer in (pair.chosen, pair.rejected)
    ]
    begin = now()

    def report(step: int, loss: float) -> None:
        print(f"  step {step}/{settings.sft_steps} | loss {loss:.3f}", flush=True)

    loss = finetune(model, dialogues, tokenizer.pad_token_id, settings, report)
    seconds = now() - begin
    model.save_pretrained(Path(folder) / BASE)
    tokenizer.save_pretrained(Path(folder) / BASE)
    return {
        "loss": loss,
        "seconds": seconds,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "tokens": _mean_tokens(dialogues),
        **judge(model, tokenizer, heldout)._asdict(),
    }


def _mean_tokens(dialogues: list[Any]) -> float:
    some = random.Random(0).sample(dialogues, min(200, len(dialogues)))
    return sum(len(d.prompt) + len(d.answer) for d in some) / len(some)


def train_strategy(name: str, folder: str, settings: Settings) -> dict[str, Any]:
    """DPO of ``folder/base`` with the reference ``name``; the model is saved in ``folder/name``."""
    show_logs()
    root = Path(folder)
    train, heldout = (_load(split, root / CACHE) for split in ("train", "heldout"))
    ref_cache = root / REF_CACHE
    shutil.rmtree(ref_cache, ignore_errors=True)  # an old one would make precomputed look free
    memory = PeakMemory()
    trainer = TimedTrainer(
        model=str(root / BASE),
        args=dpo_arguments(name, root, settings),
        train_dataset=train,
        eval_dataset=heldout,
        peft_config=_lora(settings) if name == "adapter" else None,
    )
    use_progress(trainer)
    held = reference_memory_bytes(trainer)
    disk = folder_bytes(ref_cache)
    trainer.train()
    peak = memory.bytes()
    final = trainer.evaluate()
    trainer.save_model(str(root / name))
    write_metrics(root / name, trainer.state.log_history)
    write_curves(root / name, trainer.state.log_history, title=f"demo, reference = {name}")
    policy = trainer.model
    return {
        "name": name,
        "describe": trainer.reference.describe(),
        "loss": final["eval_loss"],
        "margin": final["eval_rewards/margins"],
        "reward_accuracy": final["eval_rewards/accuracies"],
        "seconds": trainer.train_seconds + trainer.reference_seconds["before"],
        "reference_seconds": trainer.reference_seconds,
        "peak_bytes": peak,
        "reference_bytes": held,
        "reference_disk_bytes": disk,
        "trained_parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        "history": trainer.state.log_history,
        **judge(policy, trainer.processing_class, read_pairs("heldout"))._asdict(),
    }


def _load(split: str, cache: Path) -> Dataset:
    return load_dataset("json", data_files=str(path_of(split)), split="train", cache_dir=str(cache))


def _lora(settings: Settings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def dpo_arguments(name: str, root: Path, settings: Settings) -> DPOConfig:
    """The same for all strategies, but for the reference and the rate that LoRA needs."""
    return DPOConfig(
        output_dir=str(root / name),
        reference=name,
        ref_cache_dir=str(root / REF_CACHE),
        ref_model_mixup_alpha=settings.ema_alpha,
        ref_model_sync_steps=settings.ema_every,
        beta=settings.beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, settings.likelihood_weight],
        learning_rate=settings.lora_learning_rate if name == "adapter" else settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=70,
        adam_beta2=0.98,
        weight_decay=0.01,
        logging_steps=settings.eval_steps // 4,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=settings.use_cpu,
        seed=settings.seed,
    )
