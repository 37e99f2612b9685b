"""A causal LM that returns log-probs instead of logits when asked: for loops that are your own.

Legend: B rows, T padded length, N scored tokens, H hidden, V vocabulary.
"""

import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dpo_fast.batch import IGNORE_INDEX, TokenPlan, plan_rows
from dpo_fast.functional import LinearLogprobs, linear_logprobs
from dpo_fast.functional.segments import segment_sum
from dpo_fast.functional.validate import check_outputs, check_scalars
from dpo_fast.models import Head, base_causal_lm, install_scoring, uninstall_scoring

Kind = Literal["token", "sequence"]
Model = TypeVar("Model", bound=nn.Module)

_BELOW = "_dpo_fast_forward_below_logprobs"
_SETTINGS = "_dpo_fast_logprob_settings"
_MARK = "_dpo_fast_logprobs"  # on the function that is the patched forward


@dataclass
class LogprobsOutput(ModelOutput):
    """What ``model(..., labels=labels, return_logprobs=True)`` returns.

    Attributes:
        logps: ``[B, T - 1]`` float32, ``log p(labels[:, t + 1] | tokens up to t)``, 0 where the
            label is -100; with ``return_logprobs="sequence"`` ``[B]``, their sum of each row.
        mask: ``[B, T - 1]`` bool, where a token was scored.
        entropy, mean_logit, is_top1, log_sum_sq_probs: ``[B, T - 1]``, without gradient, those
            that ``patch_model(outputs=...)`` asked for; 0 (False) outside of the mask.
        aux_loss: load balancing loss of a mixture of experts whose config asks for it.
    """

    logps: Tensor | None = None
    mask: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None


class _Settings(NamedTuple):
    """How a patched model scores; ``scoring_was_installed`` is what unpatching has to leave."""

    temperature: float
    outputs: tuple[str, ...]
    backend: str
    scoring_was_installed: bool = False


def patch_model(
    model: Model,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    backend: str = "auto",
) -> Model:
    """Teach this instance ``model(..., labels=labels, return_logprobs=True)``; returns ``model``.

    The same as::

        logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1] / temperature
        logps = logits.float().log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]  # [B, T - 1]

    without the logits, and only where ``labels`` are not -100; labels are not shifted.
    ``return_logprobs="sequence"`` gives the sum of each row, ``[B]``. Without ``return_logprobs``
    the forward is the model's own, so that ``generate`` and evaluation are unchanged.

    The scoring runs inside of the model's forward, and of its head's: wrappers (PEFT before or
    after, DDP) pass the keywords on, and FSDP2's hooks gather the root's parameters first, or those
    of a head that is sharded apart. Call it before ``accelerator.prepare``. A PEFT prompt adapter
    that lengthens the rows lengthens the answer, on the left.

    Args:
        model: a causal LM of transformers, in any wrapper.
        temperature: the logits are divided by it.
        outputs: statistics to return as well, as of
            :func:`dpo_fast.functional.linear_logprobs`.
        backend: as of :func:`dpo_fast.functional.linear_logprobs`.

    Raises:
        ValueError: an option out of range; the model was patched with other options, or prepared by
            accelerate already; it has no LM head. When called: no labels, or of another shape; an
            adapter on the head that cannot be computed without logits.
    """
    names = check_outputs(outputs)
    check_scalars(None, 1.0, temperature, None, None)
    settings = _Settings(temperature, names, backend)
    lm = base_causal_lm(model)
    present = _settings_of(lm)
    if present is not None:
        if present[:3] != settings[:3]:
            raise ValueError(
                f"{type(lm).__name__} is patched already, with temperature={present.temperature}, "
                f"outputs={present.outputs}, backend={present.backend!r}: call "
                "dpo_fast.unpatch_model(model) first."
            )
        return model
    _check_model(lm)
    before = lm.__dict__.get("forward")
    install_scoring(lm)
    below = lm.__dict__["forward"]
    # Bound methods in the instance's dict follow a deepcopy.
    setattr(lm, _BELOW, below)
    setattr(lm, _SETTINGS, settings._replace(scoring_was_installed=below is before))
    lm.forward = types.MethodType(_patched_forward(type(lm)), lm)
    return model


def unpatch_model(model: Model) -> Model:
    """Give the instance the forward that it had before :func:`patch_model`; returns ``model``.

    Raises:
        RuntimeError: another wrapper lies around the patched forward (accelerate's autocast).
    """
    lm = base_causal_lm(model)
    settings = _settings_of(lm)
    if settings is None:
        return model
    if not hasattr(getattr(lm.forward, "__func__", None), _MARK):
        raise RuntimeError(
            f"The patched forward of {type(lm).__name__} is wrapped by something else: take that "
            "off first, e.g. accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    lm.forward = getattr(lm, _BELOW)
    delattr(lm, _BELOW)
    delattr(lm, _SETTINGS)
    if not settings.scoring_was_installed:
        uninstall_scoring(lm)
    return model


def _settings_of(lm: Any) -> _Settings | None:
    """The settings of a model that is patched; marks that a removed forward left are cleared."""
    settings: _Settings | None = getattr(lm, _SETTINGS, None)
    if settings is not None and "forward" not in lm.__dict__:
        # uninstall_scoring, for one, takes off whatever forward the instance has
        delattr(lm, _BELOW)
        delattr(lm, _SETTINGS)
        return None
    return settings


def _check_model(lm: Any) -> None:
    if not hasattr(lm, "get_output_embeddings") or lm.get_output_embeddings() is None:
        raise ValueError(
            f"{type(lm).__name__} has no LM head (get_output_embeddings): patch_model needs a "
            "causal LM of transformers, such as AutoModelForCausalLM loads."
        )
    if hasattr(lm, "_original_forward"):
        raise ValueError(
            f"{type(lm).__name__} was prepared by accelerate already, whose autocast the scoring "
            "would bypass: call dpo_fast.patch_model(model) before accelerator.prepare(model)."
        )


def _patched_forward(model_class: type) -> Any:
    def forward(
        self: nn.Module,
        *args: Any,
        labels: Tensor | None = None,
        return_logprobs: bool | Kind = False,
        **kwargs: Any,
    ) -> Any:
        if not return_logprobs:
            given = {} if labels is None else {"labels": labels}
            return getattr(self, _BELOW)(*args, **given, **kwargs)
        return _logprobs(self, args, kwargs, labels, return_logprobs)

    # `generate` validates its arguments against the forward's signature.
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    setattr(forward, _MARK, True)
    return forward


def _logprobs(
    lm: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: Tensor | None,
    kind: bool | Kind,
) -> LogprobsOutput:
    if kind not in (True, "token", "sequence"):
        raise ValueError(
            f"return_logprobs={kind!r} must be True or 'token' for [B, T - 1], 'sequence' for [B], "
            "or False."
        )
    if labels is None:
        raise ValueError(
            "return_logprobs needs labels=[B, T] by keyword: input_ids with -100 where no "
            "log-prob is wanted, not shifted."
        )
    if getattr(lm.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    kwargs["use_cache"] = False
    settings: _Settings = getattr(lm, _SETTINGS)

    def scoring(hidden_states: Tensor, head: Head) -> LogprobsOutput:
        return _score(hidden_states, head, labels, settings, kind == "sequence")

    scored = getattr(lm, _BELOW)(*args, scoring=scoring, **kwargs)
    output: LogprobsOutput = scored.value
    output.aux_loss = scored.aux_loss
    return output


def _score(
    hidden_states: Tensor, head: Head, labels: Tensor, settings: _Settings, sequence: bool
) -> LogprobsOutput:
    """Hidden states ``[B, T, H]`` of the backbone to log-probs of the labels ``[B, T]``."""
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape {tuple(hidden_states.shape[:2])} of "
            "the tokens: one label a token, not shifted, -100 where no log-prob is wanted."
        )
    device = head.weight.device  # with `device_map` the backbone may end on another one
    labels = labels.to(device)
    rows, width = labels.shape
    plan = TokenPlan(**plan_rows(labels, labels != IGNORE_INDEX), width=width, rows=rows)
    result = linear_logprobs(
        plan.gather(hidden_states).to(device),
        head.weight,
        plan.target,
        **head.kwargs(),
        temperature=settings.temperature,
        outputs=settings.outputs,
        backend=settings.backend,
    )
    if isinstance(result, Tensor):
        result = LinearLogprobs(result)

    def per_token(values: Tensor | None) -> Tensor | None:
        """``[N]`` to ``[B, T - 1]``: the last position predicts nothing and is never scored."""
        if values is None:
            return None
        flat = values.new_zeros(rows * width).index_put((plan.token_index,), values)
        return flat.view(rows, width)[:, :-1]

    tokens = {name: per_token(values) for name, values in result._asdict().items()}
    if sequence:
        tokens["logps"] = segment_sum(result.logps, plan.cu_seqlens)
    mask = torch.zeros(rows * width, dtype=torch.bool, device=device)
    mask[plan.token_index] = True
    return LogprobsOutput(**tokens, mask=mask.view(rows, width)[:, :-1])
