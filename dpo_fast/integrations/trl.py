"""TRL's trainers on the fused LM head: an adapter in the place of its chunked log-prob function.

TRL 1.16 scores every token of its DPO, KTO, SFT, GRPO and RLOO trainers through one
``autograd.Function``, which ``trl.trainer.utils`` looks up at each call. The adapter takes its
arguments and returns its outputs, so everything around it (what is scored, losses, metrics,
distributed engines) stays TRL's.

Differences of the two interfaces, N tokens, H hidden, V vocabulary:

- TRL scales before it caps, ``z = k tanh(s a / k) / T``; here ``z = (s / T) cap_{k/s}(a)``, the
  same number.
- TRL's entropy carries a gradient (GRPO's entropy bonus), ours does not: where one arrives, TRL's
  own function, kept from before the patch, computes it, at TRL's price. Entropy that is only
  logged costs nothing extra.
- ``chunk_size`` is TRL's tile width and ignored: the backend chooses its own.
- Without autocast TRL casts each tile of the head to the dtype of the hidden states; here the whole
  head is cast at once where the two differ (``cast_lm_head_to_fp32``).
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast.functional import linear_logprobs
from dpo_fast.functional.autocast import autocast_head, no_autocast
from dpo_fast.integrations.interface import InterfaceChanged, check_parameters, reads_global

NAME = "_ChunkedLogProbFunction"  # in trl.trainer.utils
CALLER = "add_fused_lm_head"  # the function of trl.trainer.utils that looks it up
FORWARD = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
# TRL's names of optional outputs, in the order in which they are returned, and ours
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


class FusedLogProbs:
    """Stands where TRL expects its ``autograd.Function``; only ``apply`` is ever called.

    Args:
        original: the class that it replaces, for the gradient of the entropy.
        backend: of :func:`dpo_fast.functional.linear_logprobs`.
    """

    def __init__(self, original: Any, backend: str) -> None:
        self.original, self.backend = original, backend

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """``(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1)``, each ``[N]`` or None."""
        gathered = getattr(weight, "ds_status", None)
        hidden, weight, bias = _as_one_dtype(hidden, weight, bias)
        result = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            softcap=None
            if final_logit_softcapping is None
            else final_logit_softcapping / logit_scale,
            logit_scale=logit_scale,
            temperature=temperature,
            outputs=[OUTPUTS[name] for name in OUTPUTS if name in outputs],
            backend=self.backend,
        )
        if isinstance(result, Tensor):
            return result, None, None, None, None
        options = (temperature, chunk_size, final_logit_softcapping, logit_scale)
        entropy = result.entropy
        if entropy is not None and torch.is_grad_enabled():
            scoring = (self.original, gathered, options)
            entropy = _EntropyGradient.apply(entropy, hidden, weight, bias, targets, scoring)
        return result.logps, entropy, result.log_sum_sq_probs, result.mean_logit, result.is_top1


def _as_one_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Autocast's dtype, else that of the hidden states, as TRL computes."""
    if hasattr(weight, "ds_id"):
        # DeepSpeed ZeRO-3 empties the parameter when the forward is over; a view keeps what was
        # gathered until the backward has read it.
        weight = weight.view_as(weight)
        bias = None if bias is None else bias.view_as(bias)
    hidden, weight, bias, _ = autocast_head(hidden, weight, bias, None)
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


class _EntropyGradient(torch.autograd.Function):
    """The entropy unchanged; its gradient is TRL's own, computed if and only if one arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        entropy: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scoring: tuple[Any, Any, tuple[Any, ...]],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scoring = scoring
        return entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        original, gathered, options = ctx.scoring
        *head, targets = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        inputs = [
            None if t is None else t.detach().requires_grad_(needs)
            for t, needs in zip(head, needed, strict=True)
        ]
        for t in inputs[1:]:
            if t is not None:
                t.ds_status = gathered  # what TRL asks of ZeRO-3's parameters
        with torch.enable_grad(), no_autocast(dentropy):
            entropy = original.apply(*inputs, targets, *options, ("entropy",))[1]
            wanted = [t for t in inputs if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(entropy, wanted, dentropy))
        grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
        return (None, *grads, None, None)


def knows() -> bool:
    """Whether this TRL has the function."""
    return hasattr(_trl_utils(), NAME)


def apply(backend: str) -> bool:
    """Put the adapter in place; False if it was there already. See ``dpo_fast.patch``."""
    utils = _trl_utils()
    current = getattr(utils, NAME, None)
    if isinstance(current, FusedLogProbs):
        if current.backend != backend:
            raise ValueError(
                f"TRL is patched already, with backend={current.backend!r}: call "
                f"dpo_fast.unpatch('trl') before patching it with backend={backend!r}."
            )
        return False
    _check_interface(utils, current)
    setattr(utils, NAME, FusedLogProbs(current, backend))
    return True


def restore() -> None:
    """Put TRL's class back, the very object; nothing to do if TRL was never patched."""
    utils = sys.modules.get("trl.trainer.utils")
    current = getattr(utils, NAME, None)
    if isinstance(current, FusedLogProbs):
        setattr(utils, NAME, current.original)


def describe() -> str:
    """One line: what is replaced, in which version."""
    return f"{_seen()} scores tokens through dpo_fast.functional.linear_logprobs"


def _seen() -> str:
    import trl

    return f"trl {trl.__version__}"


def _trl_utils() -> Any:
    try:
        import trl.trainer.utils as utils
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "trl":
            raise
        raise ImportError(
            "dpo_fast.patch('trl') needs TRL, which is not installed: pip install 'trl>=1.16'."
        ) from error
    return utils


def _check_interface(utils: Any, current: Any) -> None:
    seen = _seen()
    where = f"trl.trainer.utils.{NAME}"
    if not (inspect.isclass(current) and issubclass(current, torch.autograd.Function)):
        found = "is missing" if current is None else f"is {current!r}"
        raise InterfaceChanged(
            f"{where} of {seen} {found}; dpo_fast.patch('trl') replaces that autograd.Function as "
            "TRL 1.16 has it. Nothing was patched."
        )
    check_parameters(current.forward, FORWARD, f"{where}.forward", seen)
    caller = getattr(utils, CALLER, None)
    if caller is None or not reads_global(caller, NAME):
        raise InterfaceChanged(
            f"trl.trainer.utils.{CALLER} of {seen} does not look {NAME} up when it runs, so a "
            "replacement would never be called. Nothing was patched."
        )
    default = inspect.signature(current.forward).parameters["outputs"].default
    if tuple(default) != tuple(OUTPUTS):
        raise InterfaceChanged(
            f"{where} of {seen} returns ({', '.join(default)}); dpo_fast knows it with "
            f"({', '.join(OUTPUTS)}). Nothing was patched."
        )
