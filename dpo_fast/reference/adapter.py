"""The reference inside of a PEFT policy: its adapters off, or as they were before training.

N scored tokens, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from torch import Tensor, nn

from dpo_fast.models import Head, is_peft_model
from dpo_fast.naive import HeadLoRA
from dpo_fast.reference.adapters import (
    AdaptersOff,
    active_adapters,
    adapter_fingerprint,
    changes_base,
    owned_parameters,
    refuse_adaption_prompt,
)
from dpo_fast.reference.checks import check_finite
from dpo_fast.reference.estimate import size_text
from dpo_fast.reference.exchange import TensorExchange
from dpo_fast.reference.scored import ScoredReference, Scoring


class AdapterReference(ScoredReference):
    """One model for policy and reference; what the reference holds beside it is at most an adapter.

    - A **fresh** adapter (made for this training): the reference is the base with the adapters
      off. Trained tensors that stay in the forward then (biases of ``bias="all"``, parameters
      unfrozen by hand) are kept as copies and put in their place for the pass. An adapter whose
      initialisation changes the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA, OSF) is treated
      as one that goes on:
    - An adapter that **goes on** training: the reference is the model as it is now. All trained
      tensors (the adapter's, modules_to_save, trainable tokens, target_parameters, biases) are
      kept as frozen copies, the adapter ``ref`` of other trainers, and exchanged for the pass. No
      second adapter is registered: checkpoints, ``save_pretrained``, names and ``requires_grad``
      never see it, and every type of adapter, of any name, on the LM head or not, works alike.

    Args:
        policy: the ``PeftModel`` that is trained.
        fresh: whether its adapter was created for this training and has not been trained.
        scoring: how it is run.

    Raises:
        TypeError: ``policy`` is no PeftModel.
        ValueError: it has no active adapter, an adaption prompt, or NaN or infinite weights.
    """

    name = "adapter"

    def __init__(self, policy: nn.Module, *, fresh: bool, scoring: Scoring | None = None) -> None:
        if not is_peft_model(policy):
            raise TypeError(
                f"reference='adapter' needs a PeftModel, got {type(policy).__name__}: pass "
                "peft_config to the trainer, or use reference='frozen'."
            )
        if not active_adapters(policy):
            raise ValueError(
                "The PeftModel has no active adapter: call model.set_adapter(<name>) before "
                "training."
            )
        refuse_adaption_prompt(policy)
        check_finite(policy, "reference")
        self.changes_base = changes_base(policy) if fresh else None
        self._off = AdaptersOff(policy) if fresh and self.changes_base is None else None
        owned = owned_parameters(policy) if self._off else {}
        trained = [n for n, p in policy.named_parameters() if p.requires_grad and n not in owned]
        self.exchange = TensorExchange(policy, trained)
        super().__init__(policy, policy, scoring)

    @property
    def adapters_off(self) -> bool:
        """Whether the reference is the base without adapters (else: the adapters as they were)."""
        return self._off is not None

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the policy answers as the reference."""
        with self.exchange.swapped(), self._off() if self._off else nullcontext():
            yield

    def _keep(self, head: Head) -> Head:
        # A new tensor object on the copy's storage; the parameter itself is the policy's again in
        # a moment.
        def own(tensor: Tensor | None) -> Tensor | None:
            exchanged = tensor is not None and self.exchange.holds(tensor)
            return tensor.detach() if exchanged and tensor is not None else tensor

        lora = head.lora
        if lora is not None:
            lora = HeadLoRA(own(lora.a), own(lora.b), lora.scale)  # type: ignore[arg-type]
        return replace(head, weight=own(head.weight), bias=own(head.bias), lora=lora)  # type: ignore[arg-type]

    def _compute_fingerprint(self) -> str:
        return adapter_fingerprint(self.model, self.exchange.copies, adapters_off=self.adapters_off)

    def offload(self) -> None:
        """Copies to host memory, until they are asked for again."""
        self.exchange.offload()

    def describe(self) -> str:
        held = size_text(self.exchange.nbytes)
        if self.adapters_off:
            kept = (
                f"; {len(self.exchange)} trained base tensors kept, {held}"
                if len(self.exchange)
                else ""
            )
            return f"adapter: the policy with its adapters off, no second model{kept}"
        names = ", ".join(active_adapters(self.model))
        count = len(self.exchange)
        return f"adapter: the policy with a frozen copy of {names!r}, {count} tensors, {held}"
