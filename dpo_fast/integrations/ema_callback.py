"""TR-DPO's moving reference for trainers that are not ours: a callback of transformers' Trainer."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dpo_fast.files import sync_file, sync_folder
from dpo_fast.functional.ema import EmaPlan, make_shadow
from dpo_fast.reference.exchange import check_same

Rounding = Literal["auto", "nearest", "stochastic", "shadow"]

FILE = "ema_reference.safetensors"  # in each checkpoint folder
_ROUNDINGS = ("auto", "nearest", "stochastic", "shadow")


class EmaReferenceCallback(TrainerCallback):
    """``ref = alpha * policy + (1 - alpha) * ref`` every ``every`` optimizer steps.

    For a plain ``transformers.Trainer`` with a reference of its own, and for TRL's DPOTrainer in
    the place of its ``SyncRefModelCallback``::

        trainer = trl.DPOTrainer(model, ref_model, args=trl.DPOConfig(sync_ref_model=False), ...)
        trainer.add_callback(EmaReferenceCallback(trainer.ref_model, alpha=0.6, every=512))

    One launch for all tensors, in float32, exact where policy and reference are equal. It differs
    from TRL's in two points: a bf16 reference is rounded right on average or kept beside a float32
    copy, instead of losing small updates; and the moved reference is saved in each checkpoint and
    comes back on resume, instead of starting again from the initial one.

    Parameters move; buffers stay. Works with DDP, and with ZeRO-1 and ZeRO-2, where every process
    holds whole parameters and computes the same.

    Args:
        ref_model: the reference: a module of its own with the policy's parameters, or a wrapper
            of it.
        alpha: in [0, 1]; 1 copies the policy.
        every: optimizer steps between updates.
        rounding: of 16-bit references. ``"stochastic"``: unbiased, reproducible from ``seed``
            and step; ``"shadow"``: a float32 copy, 4 bytes a parameter; ``"nearest"``: loses
            updates below half a unit in the last place; ``"auto"``: stochastic for 16 bits.
        seed: of stochastic rounding.

    Raises:
        TypeError: ``ref_model`` is no module (None: TRL holds no reference with PEFT or with
            precomputed log-probs).
        ValueError: a number out of range. When training starts: policy and reference do not
            have the same parameters, or share them; they are sharded; TRL's own callback is
            active, too; the run is resumed and no moved reference is found.

    Source: TR-DPO, arXiv 2404.09656, eq. 5 and 6.
    """

    def __init__(
        self,
        ref_model: nn.Module,
        *,
        alpha: float = 0.6,
        every: int = 512,
        rounding: Rounding = "auto",
        seed: int = 0,
    ) -> None:
        if not isinstance(ref_model, nn.Module):
            raise TypeError(
                f"ref_model must be a module to average into, got {ref_model!r}. With PEFT or "
                "precomputed log-probs TRL holds none: give it a ref_model of its own, or use "
                "dpo_fast.Trainer with reference='ema', which averages adapters."
            )
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha={alpha} must lie in [0, 1]: 1 copies the policy.")
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 optimizer step.")
        if rounding not in _ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} must be one of {', '.join(_ROUNDINGS)}.")
        self.ref_model, self.alpha, self.every, self.seed = ref_model, alpha, every, seed
        self._refs = _whole_parameters(ref_model, "ref_model")
        exact = all(ref.dtype in (torch.float32, torch.float64) for ref in self._refs.values())
        self.rounding = ("nearest" if exact else "stochastic") if rounding == "auto" else rounding
        self._shadow: list[Tensor | None] | None = None
        if self.rounding == "shadow":
            self._shadow = make_shadow(self._refs.values())
        self._plan: EmaPlan | None = None
        self._loaded = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check both models, build the tables; on resume, take the moved reference back."""
        if getattr(args, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model=True: TRL's SyncRefModelCallback would move the reference, too. "
                "Set sync_ref_model=False; alpha and every are arguments of EmaReferenceCallback."
            )
        policies = _whole_parameters(kwargs["model"], "policy")
        self._plan = EmaPlan(self._refs, policies, shadow=self._shadow)
        if state.global_step > 0 and not self._loaded:
            folder = _checkpoint_folder(args, state)
            if not (folder / FILE).is_file():
                raise ValueError(
                    f"Resumed at step {state.global_step}, but {folder / FILE} does not exist, and "
                    "the initial reference is not the one of that step. If the checkpoint lies "
                    "elsewhere, call callback.load(<its folder>) before trainer.train(...)."
                )
            self.load(folder)
        self._loaded = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the reference if the step is a multiple of ``every``."""
        if state.global_step % self.every:
            return
        assert self._plan is not None  # on_train_begin comes first
        self._plan.update_(
            self.alpha,
            rounding="stochastic" if self.rounding == "stochastic" else "nearest",
            seed=self.seed,
            step=state.global_step // self.every,
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the reference into the checkpoint that was just saved."""
        if state.is_world_process_zero:
            self.save(_checkpoint_folder(args, state))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the reference, and its float32 copy, into ``folder``: whole, or not at all."""
        path = Path(folder) / FILE
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            save_file({name: t.contiguous() for name, t in self._state().items()}, temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)

    @torch.no_grad()
    def load(self, folder: str | os.PathLike[str]) -> None:
        """Take the reference back that :meth:`save` wrote into ``folder``.

        Raises:
            FileNotFoundError: there is none. ValueError: it is of another model, dtype or rounding.
        """
        own, stored = self._state(), load_file(Path(folder) / FILE)
        check_same(own, stored, "reference")
        for name, tensor in own.items():
            tensor.copy_(stored[name])
        self._loaded = True

    def _state(self) -> dict[str, Tensor]:
        state = {f"ref.{name}": ref.detach() for name, ref in self._refs.items()}
        if self._shadow is not None:
            masters = zip(self._refs, self._shadow, strict=True)
            state |= {f"shadow.{name}": master for name, master in masters if master is not None}
        return state


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _whole_parameters(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Parameters by name, below DDP, DeepSpeed and ``torch.compile``; sharded ones are refused."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    model = getattr(model, "_orig_mod", model)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, param in parameters.items():
        flat = getattr(param, "_is_flat_param", False)
        if flat or hasattr(param, "placements") or hasattr(param, "ds_id"):
            raise ValueError(
                f"{name!r} of the {what} is sharded over ranks; EmaReferenceCallback averages "
                "whole parameters: use DDP, ZeRO-1 or ZeRO-2."
            )
    return parameters
