"""TR-DPO: a reference that follows the policy (arXiv 2404.09656).

``ref = alpha * policy + (1 - alpha) * ref`` every ``every`` optimizer steps (soft update, eq. 5);
``alpha = 1`` copies the policy (hard update, eq. 6). H hidden, N scored tokens.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dpo_fast.functional.ema import EmaPlan, make_shadow
from dpo_fast.functional.ema_shards import is_sharded, local_of
from dpo_fast.models import Head
from dpo_fast.reference.adapter import AdapterReference
from dpo_fast.reference.exchange import check_same
from dpo_fast.reference.fingerprint import persistent_buffers
from dpo_fast.reference.frozen import FrozenReference
from dpo_fast.reference.protocol import Batch
from dpo_fast.reference.shards import plain_name, range_of, reshard_all, wrap_like

logger = logging.getLogger("dpo_fast")

Rounding = Literal["auto", "nearest", "stochastic", "shadow"]


class EmaReference:
    """A frozen model or adapter copy that takes a step towards the policy every so often.

    The update is a lerp in float32, exact to the last bit where policy equals reference. Where the
    reference is in bf16 or fp16 its result must be rounded: ``"stochastic"`` (unbiased,
    reproducible from seed and step, no memory), ``"shadow"`` (a float32 copy beside it, 4 bytes a
    parameter), or ``"nearest"`` (loses updates below half a unit in the last place). ``"auto"``:
    nothing to round in float32, else stochastic.

    Sharded parameters (FSDP2, ZeRO-3) are averaged shard by shard, each on its rank, without
    communication, and rounded as on one rank: policy and reference are sharded alike.

    With PEFT the reference is a copy of the adapter and the average runs over the adapter's weights
    alone: of LoRA's factors A and B, not of their product; for small updates the two agree to first
    order. Buffers follow, too: floating ones by the same rule, others are copied.

    Args:
        base: what answers; it starts as the reference of step 0.
        policy: the model that is trained, without the wrappers of DDP.
        alpha: in [0, 1]. every: optimizer steps between updates.
        rounding: see above. seed: of stochastic rounding.

    Raises:
        ValueError: ``alpha`` or ``every`` out of range, nothing in the policy is trained, or base
        and
            policy do not have the same parameters (names the first difference).
    """

    name = "ema"

    def __init__(
        self,
        base: FrozenReference | AdapterReference,
        policy: nn.Module,
        *,
        alpha: float,
        every: int,
        rounding: Rounding = "auto",
        seed: int = 0,
    ) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(
                f"ref_model_mixup_alpha={alpha} must lie in [0, 1]: 1 copies the policy."
            )
        if every < 1:
            raise ValueError(f"ref_model_sync_steps={every} must be at least 1 optimizer step.")
        if not any(p.requires_grad for p in policy.parameters()):
            raise ValueError(
                "reference='ema' follows the policy, but no parameter of the policy is trained, "
                "so nothing would ever change: unfreeze some (PeftModel.from_pretrained(..., "
                "is_trainable=True))."
            )
        self.base, self.policy = base, policy
        self.alpha, self.every, self.seed = alpha, every, seed
        self.module = base.module
        self.updates = 0
        self._check_same_parameters()
        exact = all(ref.dtype in (torch.float32, torch.float64) for _, ref, _ in self._pairs())
        self.rounding = ("nearest" if exact else "stochastic") if rounding == "auto" else rounding
        self._plan: EmaPlan | None = None
        self._planned: list[int] = []
        self._shadow: dict[str, Tensor] = {}
        self.base.fingerprint()  # of the start; later the weights have moved

    def logps(self, batch: Batch) -> Tensor:
        """``[S]`` float32, no gradient."""
        return self.base.logps(batch)

    def hidden(self, batch: Batch) -> tuple[Tensor, Head] | None:
        """As the base has it; the tensors are valid until the next update."""
        return self.base.hidden(batch)

    def on_step_end(self, step: int) -> None:
        """Update the reference if ``step`` is a multiple of ``every``."""
        if step % self.every == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the policy."""
        plan = self._ema_plan()
        stochastic = self.rounding == "stochastic"
        plan.update_(
            self.alpha,
            rounding="stochastic" if stochastic else "nearest",
            seed=self.seed,
            step=self.updates,
        )
        for ref, live in self._other_buffers():
            ref.copy_(live)
        self.updates += 1

    def _ema_plan(self) -> EmaPlan:
        """The tables of the update, built again when an engine has replaced parameters."""
        pairs = list(self._pairs())
        tensors = [id(t) for _, ref, live in pairs for t in (ref, live)]
        if self._plan is None or tensors != self._planned:
            masters = self._masters(pairs)
            shadow = [masters.get(name) for name, _, _ in pairs] if masters else None
            refs = {name: ref for name, ref, _ in pairs}
            policies = {name: live for name, _, live in pairs}
            self._plan, self._planned = EmaPlan(refs, policies, shadow=shadow), tensors
        return self._plan

    def _masters(self, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, Tensor]:
        """The float32 shadows, sharded as the references are by now; made at their first use."""
        if self.rounding != "shadow":
            return {}
        for name, ref, _ in pairs:
            master = self._shadow.get(name)
            if master is None:
                master = make_shadow([ref])[0]
            elif is_sharded(ref) and local_of(master).shape != local_of(ref).shape:
                master = range_of(master, ref, name).clone()
            if master is not None:
                self._shadow[name] = master
        return self._shadow

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """``(name, reference's, policy's)`` of all that is averaged: shards where an engine has
        cut them.
        """
        if isinstance(self.base, AdapterReference):
            yield from self.base.exchange.pairs()
            return
        reshard_all(self.policy)
        reshard_all(self.base.model)
        live = {plain_name(name): param for name, param in self.policy.named_parameters()}
        for name, ref in self.base.model.named_parameters():
            yield plain_name(name), ref, live[plain_name(name)]
        for name, buffer, live_buffer in self._buffers():
            if buffer.is_floating_point():
                yield name, buffer, live_buffer

    def _buffers(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        live = {plain_name(name): buffer for name, buffer in persistent_buffers(self.policy)}
        for name, ref in persistent_buffers(self.base.model):
            yield plain_name(name), ref, live[plain_name(name)]

    def _other_buffers(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.base, FrozenReference):
            for _, ref, live in self._buffers():
                if not ref.is_floating_point():
                    yield ref, live

    def _check_same_parameters(self) -> None:
        if isinstance(self.base, AdapterReference):
            return
        ours = {n: tuple(p.shape) for n, p in self.policy.named_parameters()}
        theirs = {n: tuple(p.shape) for n, p in self.base.model.named_parameters()}
        differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        if differing:
            name = differing[0]
            raise ValueError(
                "reference='ema' averages policy and reference parameter by parameter, and "
                f"{name!r} is {ours.get(name, 'absent')} in the policy and "
                f"{theirs.get(name, 'absent')} in the reference: give a ref_model of the policy's "
                "architecture, or none."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """All that has moved: weights, buffers, float32 shadows, and the number of updates.

        Sharded weights are what the engine has: DTensors, or ZeRO-3's parameters.
        """
        pairs = list(self._pairs())
        state = {f"ref.{name}": ref for name, ref, _ in pairs}
        if isinstance(self.base, FrozenReference):
            state |= {f"ref.{name}": ref for name, ref, _ in self._buffers()}
        for name, master in self._masters(pairs).items():
            ref = state[f"ref.{name}"]
            plain = is_sharded(ref) and not is_sharded(master)
            state[f"shadow.{name}"] = wrap_like(master, ref) if plain else master
        state["updates"] = torch.tensor(self.updates)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint.

        Args:
            state: of sharded tensors this rank's part, in the shape of the local tensor.

        Raises:
            ValueError: names, shapes or dtypes differ, or the state is empty.
        """
        if not state:
            raise ValueError(
                "reference='ema' needs the moved reference to go on, and the checkpoint has "
                "none: it was written with another strategy. Resume with that, or start a new "
                "run."
            )
        own = {name: local_of(tensor) for name, tensor in self.state_dict().items()}
        check_same(own, state, "reference")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.updates = int(state["updates"])

    def fingerprint(self) -> str:
        """Of the reference at step 0."""
        return self.base.fingerprint()

    def describe(self) -> str:
        """What moves, how far, how often, and how it is rounded."""
        step = "copies the policy"
        if self.alpha < 1.0:
            step = f"moves {self.alpha:g} of the way to the policy"
        how = f"{step} every {self.every} steps, rounding {self.rounding}"
        return f"ema: {how}; {self.base.describe()}"
