"""Steps of TRL's trainer and ours, outside of ``train()``: the tokens are the benchmark's."""

import contextlib
import tempfile
from typing import Any

from torch import Tensor

from dpo_fast.bench.case import LeftOut
from dpo_fast.bench.training.naive import BETA
from dpo_fast.bench.workload import Row


class TrainerLoop:
    """The step of a TRL-compatible trainer: its collator, its batch preparation, its loss."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.policy = trainer.model
        trainer.current_gradient_accumulation_steps = 1
        if hasattr(trainer, "layout_attention"):  # train() would be inside
            self.attention = trainer.layout_attention()
            self.attention.__enter__()

    def around_step(self) -> contextlib.AbstractContextManager[None]:
        """What the trainer's own ``train`` sets around all steps."""
        if hasattr(self.trainer, "training_memory"):
            context: contextlib.AbstractContextManager[None] = self.trainer.training_memory()
            return context
        return contextlib.nullcontext()

    def loss(self, rows: list[Row]) -> Tensor:
        """The loss of a micro-batch that is a whole batch."""
        trainer = self.trainer
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        counts = trainer._get_num_items_in_batch([batch], trainer.args.device)
        loss: Tensor = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
        return loss


def trl_trainer(policy: Any, ref: Any, device: str, **options: Any) -> Any:
    """TRL's ``DPOTrainer``.

    Raises:
        LeftOut: TRL is not installed.
    """
    try:
        import trl
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise LeftOut("trl is not installed: pip install trl") from None
    peft_config = options.pop("peft_config", None)
    config = trl.DPOConfig(**common_arguments(device), **options)
    return trl.DPOTrainer(
        policy,
        ref,
        args=config,
        train_dataset=text_rows(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def our_trainer(policy: Any, ref: Any, device: str, **options: Any) -> Any:
    """``dpo_fast.Trainer``."""
    import dpo_fast

    peft_config = options.pop("peft_config", None)
    config = dpo_fast.DPOConfig(**common_arguments(device), logging_steps=1000, **options)
    return dpo_fast.Trainer(
        policy,
        ref,
        args=config,
        train_dataset=text_rows(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def common_arguments(device: str) -> dict[str, Any]:
    """Both configs' arguments: the same beta, no truncation, no mixed precision, no reports."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="dpo-fast-bench-"),
        "use_cpu": device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_length": None,
        "beta": BETA,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    }


def text_rows() -> Any:
    """One text row: trainers want a data set at construction; the benchmark feeds its own
    tokens.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}])


def tokenizer() -> Any:
    """The smallest tokenizer that the trainers accept."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(("<pad>", "<eos>", "a", "b", "c"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
