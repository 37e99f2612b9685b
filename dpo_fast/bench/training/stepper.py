"""A variant of a whole training step, with optimizer and clipping."""

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_fast.bench.workload import ModelShape, Row, make_model


class Loop(Protocol):
    """A policy, and the loss of a batch of rows."""

    policy: nn.Module

    def loss(self, rows: list[Row]) -> Tensor:
        """On the tape of the policy."""
        ...


VARIANTS = (
    *("naive", "TRL 0.24 style", "TRL", "Liger", "torch.compile"),
    *("dpo_fast", "dpo_fast packed", "dpo_fast shared_prefix"),
)
LAYOUT_PREFIX = "dpo_fast "
CLIP = 1.0  # norm of the gradient


class Stepper:
    """``step(rows)`` is one whole training step: loss, backward, clipping, AdamW in one fused pass,
    the default optimizer of transformers' trainers (``adamw_torch_fused``), for every variant.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop, self.policy = loop, loop.policy
        self._around = getattr(loop, "around_step", contextlib.nullcontext)
        self.policy.train()
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(self, rows: list[Row]) -> tuple[float, dict[str, Tensor]]:
        """The loss before the step, and the clipped gradients that it was made with."""
        with self._around():
            return self._step(rows)

    def _step(self, rows: list[Row]) -> tuple[float, dict[str, Tensor]]:
        loss = self.loop.loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP)
        self.optimizer.step()
        grads = {n: p.grad for n, p in self.policy.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), grads


def models(shape: ModelShape, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Policy and reference, different weights, the same for every variant."""
    policy: nn.Module = make_model(shape, seed=0)
    ref: nn.Module = make_model(shape, seed=1)
    policy.to(device, dtype).train()
    ref.to(device, dtype)
    return policy, ref


def build_loop(variant: str, shape: ModelShape, device: str, dtype: torch.dtype) -> Any:
    """The variant, with models of its own.

    Raises:
        LeftOut: it does not run here. ValueError: there is no such variant.
    """
    from dpo_fast.bench.compiler import require_compiler
    from dpo_fast.bench.peers import liger_dpo_loss
    from dpo_fast.bench.training.naive import CompiledLoop, LigerLoop, NaiveLoop, TRL024Loop
    from dpo_fast.bench.training.trainers import TrainerLoop, our_trainer, trl_trainer

    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: there are {', '.join(VARIANTS)}")
    if variant in ("Liger", "torch.compile"):
        require_compiler(device)
    policy, ref = models(shape, device, dtype)
    if variant == "TRL":
        return TrainerLoop(trl_trainer(policy, ref, device))
    if variant.startswith("dpo_fast"):
        layout = variant.removeprefix(LAYOUT_PREFIX) if " " in variant else "padded"
        return TrainerLoop(our_trainer(policy, ref, device, batch_layout=layout))
    if variant == "Liger":
        return LigerLoop(policy, ref, liger_dpo_loss())
    loops = {"naive": NaiveLoop, "TRL 0.24 style": TRL024Loop, "torch.compile": CompiledLoop}
    return loops[variant](policy, ref)
