"""A DPO loss for torchtune's recipes that holds the model's output projection.

torchtune's own DPOLoss takes four vectors of log-probs, which its recipes get from logits
``[2P, T, V]``. This class takes them, too, and makes them from hidden states: the model leaves its
output projection out, and the loss has it as ``linear_projection``, as torchtune's
``LinearCrossEntropyLoss`` does. In a recipe of one's own (``tune cp``):

- YAML: ``loss: {_component_: dpo_fast.integrations.torchtune.FusedDPOLoss, beta: 0.05}``;
- after the model is set up: ``self._loss_fn.set_model_output(self._model)``;
- in ``concatenated_forward``: ``log_probs = self._loss_fn.log_probs(model(input_ids), labels)`` in
  the place of ``rlhf.get_batch_log_probs(all_logits, labels)``.

Known interface: torchtune 0.6.1 (``TransformerDecoder.unembed``), and the ``skip_output_layer`` of
its main branch. Legend: P pairs, T padded length, H hidden, V vocabulary.
"""

import types
from typing import Any

from torch import Tensor, nn

from dpo_fast.batch import IGNORE_INDEX, TokenPlan, plan_rows
from dpo_fast.functional import linear_logprobs
from dpo_fast.functional.segments import segment_sum
from dpo_fast.integrations.interface import InterfaceChanged
from dpo_fast.integrations.methods import seen
from dpo_fast.losses import build_loss


class FusedDPOLoss(nn.Module):
    """DPO, or any pair loss of ``dpo_fast.losses`` by name, with torchtune's call.

    Args:
        beta, label_smoothing: as torchtune's ``DPOLoss``; smoothing above 0 means cDPO.
        loss_type: another loss of ``dpo_fast.losses``.
        ignore_index: label of tokens that do not count.
        backend: of :func:`dpo_fast.functional.linear_logprobs`.

    Raises:
        ValueError: as ``dpo_fast.losses.build_loss``; a loss that needs more than four vectors.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        *,
        loss_type: str | None = None,
        ignore_index: int = IGNORE_INDEX,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = loss_type or ("cdpo" if label_smoothing else "sigmoid")
        loss = build_loss([name], beta=beta, label_smoothing=label_smoothing)
        if loss.needs_lengths or loss.needs_nll or loss.needs_wpo:
            raise ValueError(
                f"loss_type={name!r} needs more than the four vectors that torchtune's recipes "
                "pass: use a loss of log-ratios, such as 'sigmoid', 'hinge' or 'robust'."
            )
        self.preference_loss = loss
        self.ignore_index, self.backend = ignore_index, backend
        # not a submodule: its parameters belong to the model
        self._projection: list[nn.Module] = []

    @property
    def linear_projection(self) -> nn.Module:
        """The model's output projection.

        Raises:
            RuntimeError: ``set_model_output`` was not called.
        """
        if not self._projection:
            raise RuntimeError("call set_model_output(model) before the first forward")
        return self._projection[0]

    def set_model_output(self, model: Any) -> None:
        """Let ``model(tokens)`` return hidden states ``[B, T, H]`` instead of logits.

        Raises:
            InterfaceChanged: the model is no torchtune decoder as known here.
        """
        for name in ("output", "norm"):
            if not hasattr(model, name):
                raise InterfaceChanged(
                    f"{type(model).__name__} of {seen('torchtune')} has no {name!r}; dpo_fast "
                    "knows torchtune.modules.TransformerDecoder of 0.6.1. Nothing was changed."
                )
        if hasattr(model, "skip_output_layer"):
            model.skip_output_layer = True
        elif callable(getattr(type(model), "unembed", None)):
            model.unembed = types.MethodType(_norm_only, model)
        else:
            raise InterfaceChanged(
                f"{type(model).__name__} of {seen('torchtune')} has neither skip_output_layer nor "
                "unembed, so its output projection cannot be left out. Nothing was changed."
            )
        self._projection = [model.output]

    def log_probs(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """``[B]``: log-probs of ``labels [B, T]`` (unshifted) from hidden states ``[B, T, H]``.

        The same as ``rlhf.get_batch_log_probs(model.output(outputs), labels)``; with gradient to
        the hidden states and the projection.
        """
        weight, bias = _weight_of(self.linear_projection)
        if outputs.shape[:2] != labels.shape or outputs.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"outputs {tuple(outputs.shape)} must be hidden states "
                f"({labels.shape[0]}, {labels.shape[1]}, {weight.shape[1]}) of the labels "
                f"{tuple(labels.shape)}: was set_model_output called on this model?"
            )
        rows, width = labels.shape
        plan = TokenPlan(**plan_rows(labels, labels != self.ignore_index), width=width, rows=rows)
        logps = linear_logprobs(
            plan.gather(outputs), weight, plan.target, bias=bias, backend=self.backend
        )
        assert isinstance(logps, Tensor)
        return segment_sum(logps, plan.cu_seqlens)

    def forward(
        self,
        policy_chosen_logps: Tensor,  # [P]
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(losses, chosen_rewards, rejected_rewards)``, each ``[P]``, as torchtune's."""
        output = self.preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        )
        return output.losses, output.chosen_rewards, output.rejected_rewards


def _norm_only(self: Any, h: Tensor) -> Tensor:
    return self.norm(h)


def _weight_of(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[V, H]`` and bias of an output projection: a linear layer, or one tied to the
    embedding.
    """
    if hasattr(projection, "lora_a"):
        raise ValueError(
            "The output projection carries an adapter (apply_lora_to_output=True), which this loss "
            "does not compute: leave it off."
        )
    tied = getattr(projection, "tied_module", None)
    weight = getattr(projection if tied is None else tied, "weight", None)
    if not isinstance(weight, Tensor):
        raise InterfaceChanged(
            f"The output projection {type(projection).__name__} of {seen('torchtune')} has no "
            "weight; dpo_fast knows nn.Linear and TiedLinear."
        )
    return weight, getattr(projection, "bias", None)
