"""What a command line says beside DPOConfig: model, adapter, quantisation and data, TRL's names."""

from dataclasses import dataclass, field, fields
from typing import Any

from dpo_fast.cli.errors import UsageError

DTYPES = ("auto", "bfloat16", "float16", "float32")
_PATTERN_SIGNS = frozenset("*+?()[]{}|^$\\")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelArguments:
    """Model and adapter; the names and defaults of TRL's ``ModelConfig``.

    Raises:
        UsageError: both quantisations, or a quantised model without an adapter to train.
    """

    _argument_group_name = "model"

    model_name_or_path: str | None = _option(None, "Folder or hub name of the policy.")
    model_revision: str = _option("main", "Branch, tag or commit of a model on the hub.")
    ref_model_name_or_path: str | None = _option(
        None, "Folder or hub name of the reference; default: the policy as it is at the start."
    )
    ref_model_revision: str = _option("main", "Branch, tag or commit of the reference.")
    dtype: str | None = _option(
        "float32", "Precision of the weights in memory.", choices=list(DTYPES)
    )
    attn_implementation: str | None = _option(
        None, "Attention: eager, sdpa, flash_attention_2, ...; default: the model's own."
    )
    use_peft: bool = _option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = _option(16, "LoRA: rank.")
    lora_alpha: int = _option(32, "LoRA: the adapter is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.05, "LoRA: dropout (0 where disable_dropout is on).")
    lora_target_modules: list[str] | None = _option(
        None, "LoRA: names of modules, one pattern, or all-linear; default: PEFT's for the family."
    )
    lora_target_parameters: list[str] | None = _option(
        None, "LoRA: names of parameters, for experts that are no modules."
    )
    lora_modules_to_save: list[str] | None = _option(None, "LoRA: modules trained in full.")
    lora_task_type: str = _option("CAUSAL_LM", "LoRA: task type.")
    use_rslora: bool = _option(False, "LoRA: scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = _option(False, "LoRA: DoRA, magnitude and direction apart.")
    load_in_8bit: bool = _option(False, "Load the policy in 8 bits (bitsandbytes, LoRA only).")
    load_in_4bit: bool = _option(False, "Load the policy in 4 bits (bitsandbytes, LoRA only).")
    bnb_4bit_quant_type: str = _option("nf4", "4-bit format.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = _option(False, "Quantise the quantisation constants, too.")
    bnb_4bit_quant_storage: str | None = _option(None, "dtype in which 4-bit weights are stored.")

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise UsageError("load_in_8bit and load_in_4bit exclude each other: drop one.")

    @property
    def quantised(self) -> bool:
        """Whether the policy is loaded in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def target_modules(self) -> str | list[str] | None:
        """As PEFT wants them: a list means names, a string ``"all-linear"`` or one pattern."""
        names = self.lora_target_modules
        if isinstance(names, str):
            names = [names]
        if names and len(names) == 1:
            (name,) = names
            if name == "all-linear" or not _PATTERN_SIGNS.isdisjoint(name):
                return name
        return names

    def unused_lora_options(self) -> list[str]:
        """LoRA options that differ from their defaults although there is no new adapter."""
        if self.use_peft:
            return []
        names = [f for f in fields(self) if f.name.startswith("lora_") or f.name.endswith("ora")]
        return [f.name for f in names if getattr(self, f.name) != f.default]


@dataclass
class DataArguments:
    """Data; the names and defaults of TRL's ``ScriptArguments``, and a file of its own for
    evaluation.
    """

    _argument_group_name = "data"

    dataset_name: str | None = _option(
        None, "File (json, jsonl, csv, parquet, arrow), folder or hub name of the pairs."
    )
    dataset_config: str | None = _option(None, "Configuration of a data set on the hub.")
    dataset_train_split: str = _option("train", "Split, or a slice of one: 'train[:90%%]'.")
    dataset_test_split: str | None = _option(
        None,
        "Split to evaluate on, read when eval_strategy is not 'no'. Default: test; train if "
        "eval_dataset_name is given.",
    )
    eval_dataset_name: str | None = _option(
        None, "File, folder or hub name of the pairs to evaluate on; default: dataset_name."
    )
    streaming: bool = _option(
        False, "Read the data as it is needed.", aliases=["--dataset_streaming"]
    )
    ignore_bias_buffers: bool = _option(
        False, "Leave boolean buffers out of DDP's broadcast (models that keep masks in buffers)."
    )
