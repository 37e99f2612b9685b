"""Where precomputed log-probs come from, before training and, for new data, long after it began."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn

from dpo_fast.models import base_causal_lm
from dpo_fast.reference.adapter import AdapterReference
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.reference.frozen import FrozenReference, frozen_copy
from dpo_fast.reference.scored import ScoredReference, Scoring

logger = logging.getLogger("dpo_fast")

Keep = Literal["auto", "path", "cpu", "none"]


class ReferenceSource(Protocol):
    """A reference that is there when it is asked for; the accelerator is free in between."""

    def fingerprint(self) -> str:
        """Of what :meth:`opened` gives."""
        ...

    def opened(self, device: torch.device) -> Any:
        """Context manager: a :class:`ScoredReference` on ``device``, which it leaves afterwards."""
        ...

    def release(self) -> None:
        """Called before training begins: from here on the policy changes."""
        ...

    def describe(self) -> str:
        """What is kept, in a few words."""
        ...


class AdapterSource:
    """A PEFT policy is its own reference at any time; the adapter's copy waits in host memory."""

    def __init__(self, reference: AdapterReference) -> None:
        self.reference = reference

    def fingerprint(self) -> str:
        return self.reference.fingerprint()

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[ScoredReference]:
        try:
            with lent(self.reference.model, device):
                yield self.reference
        finally:
            self.reference.offload()

    def release(self) -> None:
        self.reference.offload()

    def describe(self) -> str:
        return self.reference.describe()


class ModelSource:
    """A model that was given: on the device while it is used, else in host memory."""

    def __init__(self, reference: FrozenReference) -> None:
        self.reference = reference

    def fingerprint(self) -> str:
        return self.reference.fingerprint()

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[ScoredReference]:
        move_model(self.reference.model, device)
        try:
            yield self.reference
        finally:
            self.release()

    def release(self) -> None:
        move_model(self.reference.model, torch.device("cpu"))

    def describe(self) -> str:
        return "the given reference model, in host memory"


class _PolicyAsReference(ScoredReference):
    """The policy before its first step."""

    name = "precomputed"


class PolicySource:
    """The policy as it is at construction, without a second model on the device.

    Until training begins the policy itself answers. Afterwards, for datasets that were not there
    before, it is rebuilt from what ``keep`` names, and must have the fingerprint of the start:

    - ``"path"``: the folder or hub name that the policy was loaded from (local files only);
    - ``"cpu"``: a copy in host memory, taken by :meth:`release`;
    - ``"none"``: nothing; new data raises;
    - ``"auto"``: the path if there is one, else the copy.

    Raises:
        ValueError: ``keep="path"`` and the policy was not loaded from one.
    """

    def __init__(
        self, policy: nn.Module, scoring: Scoring | None = None, keep: Keep = "auto"
    ) -> None:
        self.policy, self.scoring = policy, scoring or Scoring()
        lm: Any = base_causal_lm(policy)
        self.path = str(getattr(lm.config, "_name_or_path", "") or "")
        if keep == "path" and not self.path:
            raise ValueError(
                "keep='path', but the policy was not loaded from a folder or the hub; use "
                "keep='cpu'."
            )
        self.keep: Keep = ("path" if self.path else "cpu") if keep == "auto" else keep
        self._dtype = lm.dtype
        self._attention = getattr(lm.config, "_attn_implementation", None)
        self._copy: nn.Module | None = None
        self._released = False
        self._fingerprint = model_fingerprint(lm)

    def fingerprint(self) -> str:
        return self._fingerprint

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[ScoredReference]:
        if not self._released or self._policy_is_unchanged():
            with lent(self.policy, device):
                yield _PolicyAsReference(self.policy, self.policy, self.scoring)
            return
        model = self._rebuilt()
        reference = FrozenReference(move_model(model, device), self.policy, self.scoring)
        if reference.fingerprint() != self._fingerprint:
            raise ValueError(
                f"The reference loaded again from {self.path!r} is not the model that training "
                f"started from (fingerprint {reference.fingerprint()[:16]} against "
                f"{self._fingerprint[:16]}): the policy was changed in memory before training, or "
                "the files were. Keep a copy: ref_keep='cpu'; or give the new dataset to the "
                "trainer before training."
            )
        try:
            yield reference
        finally:
            move_model(model, torch.device("cpu"))

    def release(self) -> None:
        if not self._released and self.keep == "cpu":
            self._copy = frozen_copy(self.policy, device=torch.device("cpu"))
        self._released = True

    def _policy_is_unchanged(self) -> bool:
        params = self.policy.parameters()
        if any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in params):
            return False
        return model_fingerprint(base_causal_lm(self.policy)) == self._fingerprint

    def _rebuilt(self) -> nn.Module:
        if self._copy is not None:
            return self._copy
        if self.keep == "none":
            raise ValueError(
                "This dataset has no precomputed log-probs, the policy has been trained since, "
                "and ref_keep='none' kept no reference: give the dataset to the trainer before "
                "training, or set ref_keep='auto'."
            )
        logger.info("Loading the reference again from %s for new data.", self.path)
        lm: Any = base_causal_lm(self.policy)
        return type(lm).from_pretrained(
            self.path,
            dtype=self._dtype,
            attn_implementation=self._attention,
            local_files_only=True,
        )

    def describe(self) -> str:
        kept = {
            "path": f"to be loaded from {self.path!r}",
            "cpu": "a copy in host memory",
            "none": "nothing",
        }
        return f"the initial policy; for data to come: {kept[self.keep]}"


@contextmanager
def lent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """``model`` is on ``device`` inside; a policy that an engine will shard waits on the host."""
    before = next(model.parameters()).device
    if before.type != "cpu" or device.type == "cpu":
        yield
        return
    move_model(model, device)
    try:
        yield
    finally:
        move_model(model, before)


def move_model(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` on ``device``, in place; models that are spread over devices or quantised stay."""
    spread = getattr(model, "hf_device_map", None)
    stays = (spread is not None and len(spread) > 1) or getattr(model, "is_quantized", False)
    return model if stays else model.to(device)
