"""DPOConfig: TRL's field names, defaults and validation, and the fields that only dpo_fast has."""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

logger = logging.getLogger("dpo_fast")

# Names that TRL had and removed, or that its other trainers have -> what to write instead.
REMOVED_FIELDS = {
    "max_prompt_length": "max_length (prompt and answer; truncation_mode says which end is kept)",
    "max_target_length": "max_length (prompt and answer together)",
    "max_completion_length": "max_length (prompt and answer together)",
    "rpo_alpha": 'loss_type=["sigmoid", "sft"] with loss_weights=[1.0, alpha]',
    "reference_free": 'a reference-free loss_type such as "simpo", "cpo" or "orpo"',
    "label_pad_token_id": "nothing: labels are derived from the completion mask",
    "padding_value": "the tokenizer's pad token: processing_class.pad_token = ...",
    "generate_during_eval": "a TrainerCallback that calls model.generate",
    "model_adapter_name": 'reference="adapter": the active adapter is trained, whatever its name',
    "ref_adapter_name": 'reference="adapter": a frozen copy of the active adapter is kept',
    "ref_model_init_kwargs": "ref_model=<a loaded model>",
    "force_use_ref_model": "ref_model=<a model>, which is always used when given",
    "use_logits_to_keep": "nothing: prompt positions are never scored",
    "use_num_logits_to_keep": "nothing: prompt positions are never scored",
    "use_liger_loss": "nothing: the LM head is always fused",
    "base_model_attribute_name": "nothing: the backbone is model.base_model",
    "tools": "a `tools` column in the dataset",
    "chat_template_kwargs": "a `chat_template_kwargs` column in the dataset",
    "is_encoder_decoder": "nothing: encoder-decoder models are not supported",
}

REFERENCES = ("auto", "frozen", "adapter", "precomputed", "ema")
REF_KEEP = ("auto", "path", "cpu", "none")
EMA_ROUNDING = ("auto", "nearest", "stochastic", "shadow")
BATCH_LAYOUTS = ("auto", "padded", "packed", "shared_prefix")
TOKEN_STATS = ("log_steps", "every", "never")
TRUNCATION_MODES = ("keep_start", "keep_end")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DPOConfig(TrainingArguments):
    """Arguments of :class:`dpo_fast.Trainer`: every field of ``transformers.TrainingArguments``,
    TRL 1.16's ``DPOConfig`` under the same names and defaults, and, last, those of dpo_fast. A
    ``trl.DPOConfig`` is accepted in its place (:meth:`from_args`). One default is not TRL's:
    ``logging_nan_inf_filter`` is off, since a loss that is NaN ends the run instead of being hidden
    in the log, and since hiding it takes a host sync in every micro-batch.

    Raises:
        ValueError: an invalid value or combination, at construction, with the remedy.
        TypeError: a field that TRL removed, with its replacement.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Defaults that differ from TrainingArguments, as in TRL
    learning_rate: float = _option(1e-6, "Initial learning rate of AdamW.")
    logging_steps: float = _option(
        10, "Log every so many optimizer steps; below 1: share of all steps."
    )
    gradient_checkpointing: bool = _option(
        True, "Recompute activations in the backward: less memory, about 20%% more time."
    )
    bf16: bool | None = _option(  # type: ignore[assignment]
        None, "bf16 mixed precision; None: on unless fp16 is."
    )
    logging_nan_inf_filter: bool = _option(
        False, "Hide NaN and infinite losses from the log (costs a host sync every micro-batch)."
    )
    # transformers writes these with a bare % in their help, which argparse rejects
    lr_scheduler_kwargs: dict | str | None = _option(
        None, "Extra arguments of the scheduler, JSON."
    )
    torch_empty_cache_steps: int | None = _option(
        None, "Empty the device cache every so many steps."
    )

    # Model
    model_init_kwargs: dict | str | None = _option(
        None, "Arguments of from_pretrained when the model is given by name, JSON."
    )
    trust_remote_code: bool = _option(False, "Run code that comes with the model.")
    router_aux_loss_coef: float | None = _option(
        None, "Weight of the mixture-of-experts load balancing loss; None: the model config's own."
    )
    disable_dropout: bool = _option(
        True, "Set every dropout of policy and reference to 0, LoRA's included."
    )

    # Data
    dataset_num_proc: int | None = _option(None, "Processes for tokenisation.")
    max_length: int | None = _option(
        1024, "Longest prompt + answer in tokens; None: no truncation."
    )
    truncation_mode: str = _option("keep_start", "keep_start or keep_end: the end that survives.")
    padding_free: bool = _option(False, "TRL's name for batch_layout=packed.")
    pad_to_multiple_of: int | str | None = _option(
        "auto", "Round the padded length up to a multiple; auto: none."
    )
    pad_token: str | None = _option(None, "Deprecated in TRL: set the tokenizer's pad token.")

    # Objective
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One loss or several, see dpo_fast.losses."},
    )
    loss_weights: list[float] | None = _option(None, "Weight of each loss; None: all 1.")
    beta: float = _option(0.1, "Strength of the tie to the reference (tau of IPO).")
    ld_alpha: float | None = _option(
        None, "LD-DPO: weight of the tokens beyond the shorter answer."
    )
    f_divergence_type: str = _option(
        "reverse_kl", "reverse_kl, forward_kl, js_divergence or alpha_divergence."
    )
    f_alpha_divergence_coef: float = _option(0.5, "alpha of the alpha divergence.")
    label_smoothing: float = _option(0.0, "Used by cdpo, robust, exo_pair, aot and aot_unpaired.")
    use_weighting: bool = _option(False, "WPO: weight pairs by how likely the policy finds them.")
    discopop_tau: float = _option(0.05, "Temperature of DiscoPOP.")
    simpo_gamma: float = _option(0.5, "SimPO: target margin (SimPO wants a beta of 2 or more).")
    cpo_alpha: float = _option(1.0, "CPO: weight of the likelihood of the chosen answers.")
    kto_desirable_weight: float = _option(1.0, "KTO: weight of the chosen answers.")
    kto_undesirable_weight: float = _option(1.0, "KTO: weight of the rejected answers.")

    # Reference, TRL's names
    precompute_ref_log_probs: bool = _option(
        False, "Compute the reference's log-probs before training."
    )
    precompute_ref_batch_size: int | None = _option(
        None, "Batch size of that pass; None: the run's."
    )
    sync_ref_model: bool = _option(
        False, "TR-DPO: move the reference towards the policy in training."
    )
    ref_model_mixup_alpha: float = _option(0.6, "TR-DPO: ref = alpha * policy + (1 - alpha) * ref.")
    ref_model_sync_steps: int = _option(512, "TR-DPO: optimizer steps between two updates.")
    activation_offloading: bool = _option(False, "Keep activations in host memory between passes.")

    # dpo_fast
    reference: str = _option(
        "auto", "auto, frozen, adapter, precomputed or ema; auto says what it chose and why."
    )
    ref_cache_dir: str | None = _option(
        None, "Folder of precomputed log-probs; None: the user cache."
    )
    ref_keep: str = _option(
        "auto",
        "What stays of a precomputed reference for data to come: path, cpu, none; auto: the path "
        "if there is one.",
    )
    ref_offload: bool = _option(
        False,
        "Keep the layers of a frozen reference in host memory and fetch each one layer ahead.",
    )
    ref_ema_rounding: str = _option(
        "auto",
        "TR-DPO in bf16: stochastic (unbiased), shadow (fp32 copy) or nearest (loses small steps); "
        "auto: stochastic.",
    )
    batch_layout: str = _option(
        "auto",
        "auto, padded, packed or shared_prefix; auto says what it chose and why.",
    )
    max_tokens_per_batch: int | None = _option(
        None,
        "Cut the pairs of an optimizer step into micro-batches of so many tokens; None: of "
        "per_device_train_batch_size pairs.",
    )
    token_stats: str = _option(
        "log_steps",
        "When entropy, logits and token accuracy are computed: log_steps, every, never.",
    )
    lm_head_backend: str = _option(
        "auto", "auto, naive, chunked, cpu or triton; a name runs or raises."
    )
    lm_head_workspace: int | None = _option(
        None, "Bytes of probabilities that the LM head may hold; None: by device (1 GiB on a GPU)."
    )
    lm_head_filter_bound: float | None = _option(
        None,
        "APPROXIMATE, CUDA and bfloat16 only: gradients leave out tiles of 128 rows by 128 tokens "
        "that hold less than this share of each row's probability, as 2e-4. None: exact.",
    )

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        self._use_cpu_without_accelerator()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        with warnings.catch_warnings():
            # every supported transformers knows this name; 5.23 prefers activation_checkpointing
            warnings.filterwarnings("ignore", ".*`gradient_checkpointing` is deprecated")
            super().__post_init__()
        self.validate()

    def _use_cpu_without_accelerator(self) -> None:
        import torch

        # DeepSpeed runs on devices that torch does not count, the CPU among them
        if not self.use_cpu and not self.deepspeed and not torch.accelerator.is_available():
            self.use_cpu = True
            logger.warning("No accelerator found: use_cpu=True, training runs on the CPU.")

    def validate(self) -> None:
        """Check values and combinations that need neither model nor data.

        Raises:
            ValueError: with the value, the rule and the remedy.
        """
        _one_of("reference", self.reference, REFERENCES)
        _one_of("batch_layout", self.batch_layout, BATCH_LAYOUTS)
        _one_of("ref_keep", self.ref_keep, REF_KEEP)
        _one_of("ref_ema_rounding", self.ref_ema_rounding, EMA_ROUNDING)
        _one_of("token_stats", self.token_stats, TOKEN_STATS)
        _one_of("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt and an answer token: "
                "give at least 2, or "
                "None for no truncation."
            )
        if not 0.0 <= self.ref_model_mixup_alpha <= 1.0:
            raise ValueError(
                f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} must lie in [0, 1]: 1 copies "
                "the policy."
            )
        if self.ref_model_sync_steps < 1:
            raise ValueError(
                f"ref_model_sync_steps={self.ref_model_sync_steps} must be at least 1."
            )
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(
                f"max_tokens_per_batch={self.max_tokens_per_batch} must be a positive number of "
                "tokens, or None for micro-batches of per_device_train_batch_size pairs."
            )
        if self.lm_head_workspace is not None and self.lm_head_workspace < 1:
            raise ValueError(f"lm_head_workspace={self.lm_head_workspace} bytes must be positive.")
        if self.lm_head_filter_bound is not None and not 0.0 <= self.lm_head_filter_bound < 1.0:
            raise ValueError(
                f"lm_head_filter_bound={self.lm_head_filter_bound} must lie in [0, 1): a share "
                "of a row's probability; None for exact gradients."
            )
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha={self.ld_alpha} must lie in [0, 1]: 1 is plain DPO.")
        self._resolve_padding()
        if self.ddp_broadcast_buffers is None:
            # DDP's own default broadcasts every buffer before every forward, and a causal LM's are
            # constants (rotary frequencies): a collective a micro-batch for nothing.
            self.ddp_broadcast_buffers = False
        if self.truncation_mode == "keep_end":
            warnings.warn(
                "truncation_mode='keep_end' is deprecated in TRL and will go with its 2.0; "
                "keep_start is the default.",
                FutureWarning,
                stacklevel=4,
            )

    def _resolve_padding(self) -> None:
        if self.padding_free:
            if self.batch_layout not in ("auto", "packed"):
                raise ValueError(
                    f"padding_free=True means batch_layout='packed', and batch_layout="
                    f"{self.batch_layout!r} was asked for, too: drop one."
                )
            self.batch_layout = "packed"
        if isinstance(self.pad_to_multiple_of, str):
            text = self.pad_to_multiple_of
            if text != "auto" and not text.isdigit():
                raise ValueError(
                    f"pad_to_multiple_of={text!r} must be 'auto', None or a positive integer."
                )
            self.pad_to_multiple_of = None if text == "auto" else int(text)

    @classmethod
    def from_args(cls, args: TrainingArguments) -> "DPOConfig":
        """``args`` as a DPOConfig: itself, or a ``trl.DPOConfig`` / ``TrainingArguments`` with the
        missing fields at their defaults. The values are taken over as they are; nothing is
        initialised twice.

        Raises:
            TypeError: ``args`` is no TrainingArguments.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                "args must be a dpo_fast.DPOConfig, a trl.DPOConfig or a TrainingArguments, got "
                f"{type(args).__name__}."
            )
        new = cls.__new__(cls)
        new.__dict__.update(args.__dict__)
        for f in dataclasses.fields(cls):
            if f.name not in new.__dict__:
                default = f.default_factory() if callable(f.default_factory) else f.default
                new.__dict__[f.name] = default
        if isinstance(new.loss_type, str):
            new.loss_type = [new.loss_type]
        new.validate()
        return new


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}.")


def refuse_removed(kwargs: dict[str, Any], table: dict[str, str], where: str) -> None:
    """Raise a TypeError that names the replacement if ``kwargs`` holds a name of ``table``."""
    for name in kwargs:
        if name in table:
            raise TypeError(f"{where} has no {name!r}: use {table[name]}.")


def _refusing_removed(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: DPOConfig, *args: Any, **kwargs: Any) -> None:
        refuse_removed(kwargs, REMOVED_FIELDS, "DPOConfig")
        init(self, *args, **kwargs)

    return wrapper


DPOConfig.__init__ = _refusing_removed(DPOConfig.__init__)  # type: ignore[method-assign]

Reference = Literal["auto", "frozen", "adapter", "precomputed", "ema"]
