"""DeepSpeed's sequence parallelism (Ulysses): what it needs of batches, config and attention.

Every rank loads micro-batches of its own. DeepSpeed's ``UlyssesSPDataLoaderAdapter`` gathers those
of a group and hands out one after the other, each rank getting its positions: tensors must be
``[2P, T]``, and other values are pickled and reach all ranks whole. Its attention exchanges
positions for heads around the model's own. Training alone is cut: evaluation runs whole rows, each
rank its own.

DeepSpeed is imported only where accelerate has set it up. Legend: P pairs, T padded length.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from dpo_fast.batch import IGNORE_INDEX, SHIFT_KEY, WHOLE_LENS_KEY, plan_shifted
from dpo_fast.trainer.cut_rows import CUT_KEYS, cuttable

# What the adapter makes shift_labels of.
LABELS = "labels"
# Whatever is no tensor [2P, T], as one object: the adapter gathers objects key by key.
CARRIED = "carried"


class AdapterCollator:
    """The batches of ``collator`` as DeepSpeed's adapter takes them.

    Calling it returns ``input_ids``, ``position_ids``, ``labels`` (``[2P, T]``, T a multiple of
    ``ranks``) and ``carried``, a dict of everything else: tensors as numpy arrays, since a pickled
    tensor would come back on the device of the rank that sent it; ``seq_lens``, of whole sequences.

    Raises:
        ValueError: when called, as :func:`cuttable`.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], ranks: int, pad_token_id: int) -> None:
        self.collator = collator
        self.ranks = ranks
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collator(rows)
        cut = cuttable(batch, self.ranks, self.pad_token_id)
        carried = {key: value for key, value in cut.items() if key not in CUT_KEYS}
        carried["seq_lens"] = batch["seq_lens"]
        # what a position predicts is the next one's label; nothing predicts a row's first token
        labels = F.pad(cut[SHIFT_KEY], (1, 0), value=IGNORE_INDEX)[:, :-1].contiguous()
        return {
            "input_ids": cut["input_ids"],
            "position_ids": cut["position_ids"],
            LABELS: labels,
            CARRIED: {k: v.numpy() if isinstance(v, Tensor) else v for k, v in carried.items()},
        }

    def __repr__(self) -> str:
        return f"AdapterCollator({self.collator!r}, ranks={self.ranks})"


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of the adapter with what it carried beside its tensors; on the CPU."""
    carried = batch[CARRIED].items()
    kept = {key: value for key, value in batch.items() if key != CARRIED}
    return kept | {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in carried
    }


def plan_positions(batch: dict[str, Any]) -> dict[str, Any]:
    """An unpacked batch with the plan of the positions that this rank got; on the CPU, where the
    batch still is.
    """
    return {
        **batch,
        **plan_shifted(batch[SHIFT_KEY]),
        "completion_lens": batch[WHOLE_LENS_KEY],
    }


def group() -> Any:
    """The ``ProcessGroup`` of this rank's rows; DeepSpeed makes it when it takes the model."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    return parallel_state_sp.get_sequence_parallel_group()


def prepare(accelerator: Any, args: Any, model: nn.Module) -> None:
    """Called before DeepSpeed takes the model: its config gets the rows of a micro-batch, 2P, and
    the attention to wrap.

    Raises:
        ValueError: no DeepSpeed, micro-batches of varying size, or an attention that cannot be cut.
        ImportError: packages under which heads are exchanged in evaluation, too.
    """
    parallel = accelerator.parallelism_config
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        raise ValueError(
            f"sp_size={parallel.sp_size} is DeepSpeed's sequence parallelism, and DeepSpeed is not "
            "in use: launch with it (examples/accelerate/ulysses.yaml), or use context parallelism "
            "(cp_size) with FSDP2."
        )
    refuse_varying_batches(args)
    refuse_two_scales(plugin.deepspeed_config)
    require_whole_evaluation()
    handler = parallel.sp_handler
    handler.sp_attn_implementation = choose_attention(model, handler.sp_attn_implementation)
    # by this number of rows DeepSpeed's attention lays out what it exchanges
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2 * args.per_device_train_batch_size


def refuse_varying_batches(args: Any) -> None:
    """Raise ValueError where micro-batches may differ in pairs: DeepSpeed's adapter gathers them as
    equals, and its attention knows one number of rows.
    """
    loaders = args.accelerator_config
    for name, is_wrong in (
        ("auto_find_batch_size", args.auto_find_batch_size),
        ("split_batches", loaders.split_batches),
        ("even_batches", not loaders.even_batches),
    ):
        if is_wrong:
            holder = args if hasattr(args, name) else loaders
            raise ValueError(
                f"{name}={getattr(holder, name)!r} makes micro-batches of other sizes than "
                f"per_device_train_batch_size={args.per_device_train_batch_size}, and sp_size > 1 "
                f"needs all of one size: leave {name} at its default."
            )


def refuse_two_scales(config: dict[str, Any]) -> None:
    """Raise ValueError for a DeepSpeed config under which ZeRO-3 would average the gradients of
    large parameters over the ranks of a group, and sum those of small ones.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("reduce_scatter", True):
        raise ValueError(
            "zero_optimization.reduce_scatter=false: under sp_size > 1 ZeRO-3 would scale the "
            "gradients of small and of large parameters differently (by sp_size): leave "
            "reduce_scatter at true."
        )


def require_whole_evaluation() -> None:
    """Raise ImportError for packages under which attention exchanges heads in evaluation, too,
    where each rank has rows of its own.
    """
    import accelerate
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    register = UlyssesSPAttentionHF.register_with_transformers
    knows = "disable_in_eval" in inspect.signature(register).parameters
    if not knows or Version(accelerate.__version__) < Version("1.13"):
        raise ImportError(
            f"deepspeed {deepspeed.__version__} and accelerate {accelerate.__version__} exchange "
            "attention heads in evaluation, too, where every rank has rows of its own: "
            "sp_size > 1 needs accelerate>=1.13 and a deepspeed with disable_in_eval (tested: "
            "0.19.8)."
        )


def undo_replication(*models: nn.Module | None) -> None:
    """Key-value heads of attention modules as they are in whole rows: where there are fewer than
    ranks, DeepSpeed replicates them in each forward of training, and leaves their count behind.
    """
    for model in filter(None, models):
        config: Any = model.config
        config = config.get_text_config()
        groups = config.num_attention_heads // config.num_key_value_heads
        for module in model.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = groups


def choose_attention(model: nn.Module, asked: str | None) -> str:
    """The attention that DeepSpeed wraps: the model's own.

    Args:
        asked: ``sp_attn_implementation`` of the parallelism config; None: not said.

    Raises:
        ValueError: it is another one than the model's, or would see more than the model's does.
    """
    config: Any = model.config
    own = config._attn_implementation
    if asked not in (None, own) or own in (None, "eager"):
        raise ValueError(
            f"The model attends by {own!r} and sp_attn_implementation={asked!r}: sp_size > 1 wraps "
            "the model's attention, by name, and 'eager' needs a mask of whole rows. Load the "
            "model with attn_implementation='sdpa' or a flash attention, and set "
            "sp_attn_implementation to the same."
        )
    windows = local_layers(config.get_text_config())
    if own == "sdpa" and windows:
        raise ValueError(
            f"{type(model).__name__} has layers of {', '.join(windows)}, which are masks to SDPA, "
            "and DeepSpeed's sequence parallelism drops masks: load the model with a flash "
            "attention (attn_implementation='flash_attention_2'), or leave sp_size at 1."
        )
    return own


def local_layers(config: Any) -> list[str]:
    """Kinds of layers that see less than everything before them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    # accelerate refuses linear attention, with any implementation
    return sorted({kind for kind in kinds if "linear" not in kind} - {"full_attention"})


def refuse_other_attention(reference: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError for a reference whose heads DeepSpeed's attention, made for the policy,
    could not exchange.
    """
    names = ("_attn_implementation", "num_attention_heads", "num_key_value_heads", "head_dim")
    theirs, own = (m.config.get_text_config() for m in (reference, policy))  # type: ignore[operator, union-attr]
    for name in names:
        found, needed = getattr(theirs, name, None), getattr(own, name, None)
        if found != needed:
            raise ValueError(
                f"ref_model has {name.lstrip('_')}={found!r} and the policy {needed!r}: under "
                "sp_size > 1 both run through one attention, which is made for the policy. Load "
                "ref_model alike, or use reference='precomputed'."
            )


def epoch_of(checkpoint: str, steps_per_epoch: int, ignore_data_skip: bool) -> int:
    """The epoch that a run goes on with from ``checkpoint``.

    Raises:
        ValueError: its steps end within an epoch: DeepSpeed's loader cannot skip batches.
    """
    step = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if step % steps_per_epoch and not ignore_data_skip:
        raise ValueError(
            f"{checkpoint} was written at step {step}, within an epoch of {steps_per_epoch} steps, "
            "and under sp_size > 1 DeepSpeed's loader cannot skip the batches before it: resume "
            "from the end of an epoch (save_strategy='epoch'), or set ignore_data_skip=True, which "
            "starts that epoch anew."
        )
    return step // steps_per_epoch


@contextmanager
def exchanged_in_eval_mode(implementation: str) -> Iterator[None]:
    """Inside, modules in eval mode exchange heads as those in training mode do: a reference that
    answers for cut rows.

    DeepSpeed decides by the module's mode. The model has read it before (its dropout is off), and
    gets it back.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    exchange = ALL_ATTENTION_FUNCTIONS[implementation]

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = module.training
        module.training = True
        try:
            return exchange(module, *args, **kwargs)
        finally:
            module.training = before

    ALL_ATTENTION_FUNCTIONS[implementation] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[implementation] = exchange
