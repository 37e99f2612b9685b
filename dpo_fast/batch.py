"""Which hidden states predict which completion tokens: the only shift by one in the library.

P pairs, S = 2P sequences (all chosen first, then all rejected), B rows of a batch (S where they are
padded), T their length, N scored tokens, H hidden.

A causal language model predicts the token at position t from the hidden state at position t - 1. A
completion token at position 0 (an empty prompt) has no predecessor and is not scored, as in TRL.
Everything downstream works on the N scored tokens in row order, cut into S sequences by
``cu_seqlens``; nothing downstream sees padding, prompts or masks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# What PlannedCollator adds to a batch. "pair_index" comes first in the dict: see PlannedCollator.
PLAN_KEYS = ("pair_index", "token_index", "target", "cu_seqlens", "seq_lens", "completion_lens")
# Host numbers of a batch: tokens by TRL's definition (attended positions of the padded rows, the
# prompt in both), positions of the padded rows, and positions that the model computes.
COUNT_KEYS = ("num_tokens", "padded_tokens", "executed_tokens")
# The dpo_fast.layouts.Segments of a packed batch, an argument of the model's attention.
SEGMENTS_KEY = "pair_segments"
# How the rows of a padded batch go through the backbone, other than all at once: the
# dpo_fast.row_groups.RowGroups or dpo_fast.layouts.joined_rows.JoinedRows.
GROUPS_KEY = "row_groups"
# Whether every row is padded on the right (or not at all), known on the host.
RIGHT_PADDED_KEY = "right_padded"
# Labels that are shifted already (what each position predicts): context parallel batches.
SHIFT_KEY = "shift_labels"
# With them: completion tokens of each whole sequence, S ints; a cut batch knows only its own.
WHOLE_LENS_KEY = "whole_completion_lens"
IGNORE_INDEX = -100


def plan_tokens(input_ids: Tensor, completion_mask: Tensor) -> dict[str, Any]:
    """Plan of the scored tokens of a padded batch.

    Args:
        input_ids: ``[S, T]`` integer token ids, chosen rows first, then the rejected rows.
        completion_mask: ``[S, T]`` any dtype; non-zero where a token belongs to a completion.

    Returns:
        dict with

        - ``token_index``: ``[N]`` int64, increasing, flat position ``row * T + (t - 1)`` of the
          hidden state that predicts each scored token;
        - ``target``: ``[N]`` int64, the token itself;
        - ``cu_seqlens``: ``[S + 1]`` int64, sequence s owns the tokens
          ``cu_seqlens[s]:cu_seqlens[s + 1]``;
        - ``seq_lens``: list of S ints, scored tokens of each sequence (``cu_seqlens`` on the host);
        - ``completion_lens``: list of S ints, completion tokens of each sequence, with position 0.

        The tensors are on the device of ``input_ids``. The two lists cost one device sync, which is
        why the plan is made on the CPU, in the data loader's worker.

    Raises:
        ValueError: shapes differ or are not ``[S, T]``, or S is odd.
    """
    if input_ids.dim() != 2 or input_ids.shape != completion_mask.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and completion_mask "
            f"{tuple(completion_mask.shape)} must have one shape [2P, T]: one row a sequence, "
            "chosen rows first, then rejected rows"
        )
    num_sequences = input_ids.shape[0]
    if num_sequences % 2:
        raise ValueError(
            f"a batch of {num_sequences} rows is not made of pairs: it must hold P chosen rows, "
            "then the P rejected rows in the same order"
        )
    return plan_rows(input_ids, completion_mask != 0)


def plan_rows(tokens: Tensor, scored: Tensor) -> dict[str, Any]:
    """:func:`plan_tokens` for any number of rows: ``tokens [B, T]`` where ``scored [B, T]`` (bool).

    A token at position 0 has no predecessor and is left out.
    """
    rows, width = tokens.shape
    completion_lens = scored.sum(dim=1)
    scored = scored.clone()
    scored[:, :1] = False
    seq_lens = scored.sum(dim=1)
    cu_seqlens = seq_lens.new_zeros(rows + 1)
    torch.cumsum(seq_lens, dim=0, out=cu_seqlens[1:])
    position = scored.reshape(rows * width).nonzero().squeeze(1)
    return {
        "token_index": position - 1,
        "target": tokens.reshape(rows * width)[position].long(),
        "cu_seqlens": cu_seqlens,
        "seq_lens": seq_lens.tolist(),
        "completion_lens": completion_lens.tolist(),
    }


def plan_shifted(shift_labels: Tensor) -> dict[str, Any]:
    """Plan of a batch whose labels are shifted already, as context and sequence parallel have them.

    Args:
        shift_labels: ``[S, T]``, at each position the token that its hidden state predicts, -100
            where none is scored. The rows may be any positions of the sequences, in any order: what
            a position predicts does not depend on its neighbours here.

    Returns:
        As :func:`plan_tokens`, of the positions given; ``completion_lens`` is ``seq_lens``.

    Raises:
        ValueError: ``shift_labels`` is not ``[S, T]``, or S is odd.
    """
    if shift_labels.dim() != 2 or shift_labels.shape[0] % 2:
        raise ValueError(
            f"shift_labels {tuple(shift_labels.shape)} must be [2P, T]: one row a sequence, chosen "
            "rows first, then rejected rows"
        )
    scored = shift_labels != IGNORE_INDEX
    seq_lens = scored.sum(dim=1)
    cu_seqlens = seq_lens.new_zeros(seq_lens.shape[0] + 1)
    torch.cumsum(seq_lens, dim=0, out=cu_seqlens[1:])
    position = scored.flatten().nonzero().squeeze(1)
    lens = seq_lens.tolist()
    return {
        "token_index": position,
        "target": shift_labels.flatten()[position].long(),
        "cu_seqlens": cu_seqlens,
        "seq_lens": lens,
        "completion_lens": lens,
    }


def shifted_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A planned batch of padded rows with ``shift_labels`` ``[2P, T]`` in place of its plan.

    This is the form that can be cut along the positions: pass ``input_ids``, ``position_ids`` and
    ``shift_labels`` as buffers to ``accelerator.maybe_context_parallel``.
    """
    plan = TokenPlan.from_batch(batch)
    ids = batch["input_ids"]
    if plan.rows != plan.num_sequences:
        raise ValueError(
            f"a batch of {plan.num_sequences} sequences in {plan.rows} rows is packed, and only "
            "padded rows can be cut along their positions: use batch_layout='padded'"
        )
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels.view(-1)[plan.token_index] = plan.target.to(ids.dtype)
    dropped = (*PLAN_KEYS, GROUPS_KEY, RIGHT_PADDED_KEY, "completion_mask", "labels")
    kept = {key: value for key, value in batch.items() if key not in dropped}
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
    return {
        **kept,
        "position_ids": kept.get("position_ids", positions),
        SHIFT_KEY: labels,
        WHOLE_LENS_KEY: list(plan.completion_lens),
    }


def _mask_from_labels(input_ids: Tensor, labels: Tensor) -> Tensor:
    """``[S, T]`` int64 completion mask of unshifted labels (-100 outside of the completions)."""
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)} differ in shape; "
            "labels must be input_ids with -100 outside of the completions"
        )
    mask = labels != IGNORE_INDEX
    if not torch.equal(labels[mask], input_ids[mask].to(labels.dtype)):
        raise ValueError(
            "labels differ from input_ids where they are not -100 (are they shifted already?); "
            "labels must be input_ids with -100 outside of the completions, unshifted"
        )
    return mask.long()


def _completion_mask(batch: Mapping[str, Any]) -> Tensor:
    if "input_ids" in batch and "completion_mask" in batch:
        return batch["completion_mask"]
    if "input_ids" in batch and "labels" in batch:
        return _mask_from_labels(batch["input_ids"], batch["labels"])
    raise ValueError(
        f"the batch has the keys {sorted(batch)}; needed are input_ids [2P, T] (chosen rows first, "
        "then rejected rows) and completion_mask [2P, T] (1 on completion tokens), or labels "
        "[2P, T] (-100 outside of the completions) in its place. "
        "dpo_fast.DataCollatorForPreference returns them from prompt_ids, chosen_ids, rejected_ids"
    )


class PlannedCollator:
    """A data collator that also plans the scored tokens, in the loader's worker and on the CPU.

    Args:
        collator: any callable from a list of rows to a batch with TRL's keys ``input_ids``,
            ``attention_mask`` and ``completion_mask`` (each ``[2P, T]``, chosen rows first). A
            ``labels`` key (-100 outside of the completions) is accepted in place of
            ``completion_mask`` and replaced by it.
        plan_rows: also plan ``row_groups`` from attention mask and ``token_index``:
            :func:`dpo_fast.row_groups.group_rows` or
            :func:`dpo_fast.layouts.joined_rows.join_rows`.

    Calling it returns a dict with ``pair_index`` (``[P]``, 0..P-1), the collator's own keys, the
    keys of :func:`plan_tokens`, those of ``COUNT_KEYS`` and ``right_padded``. ``pair_index`` comes
    first because transformers takes the first tensor's first dimension as the batch size:
    evaluation losses are thus weighted by pairs.

    Raises:
        ValueError: when called, if the collator's batch lacks the keys, naming those seen.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        *,
        plan_rows: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> None:
        self.collator = collator
        self.plan_rows = plan_rows

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collator(rows)
        completion_mask = _completion_mask(batch)
        plan = plan_tokens(batch["input_ids"], completion_mask)
        kept = {key: value for key, value in batch.items() if key != "labels"}
        kept["completion_mask"] = completion_mask
        size = completion_mask.numel()
        attended = int(kept["attention_mask"].sum()) if "attention_mask" in kept else size
        executed = size
        if "attention_mask" in kept:
            kept[RIGHT_PADDED_KEY] = is_right_padded(kept["attention_mask"])
        if self.plan_rows is not None and "attention_mask" in kept:
            groups = self.plan_rows(kept["attention_mask"], plan["token_index"])
            if groups is not None:
                kept[GROUPS_KEY], executed = groups, groups.num_tokens
        counts = dict(zip(COUNT_KEYS, (attended, size, executed), strict=True))
        return {"pair_index": torch.arange(len(plan["seq_lens"]) // 2), **kept, **plan, **counts}

    def __repr__(self) -> str:
        return f"PlannedCollator({self.collator!r})"


def is_right_padded(attention_mask: Tensor) -> bool:
    """Whether nothing of ``attention_mask`` [B, T] is attended after a position that is not."""
    attended = attention_mask != 0
    return torch.equal(attended, attended.cummin(dim=1).values)


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """The scored tokens of one batch. Tensors on one device, lists on the host.

    Attributes:
        token_index: ``[N]`` int64, flat position in ``[B * T]`` that predicts each scored token.
        target: ``[N]`` int64, the scored tokens.
        cu_seqlens: ``[S + 1]`` int64, bounds of the sequences in the N tokens.
        seq_lens: S ints, scored tokens of each sequence.
        completion_lens: S ints, completion tokens of each sequence (unshifted; what IPO and
            length-normalised losses divide by).
        width: T of the batch that ``token_index`` refers to.
        rows: B, its rows: S of padded rows, 1 of packed ones.
    """

    token_index: Tensor
    target: Tensor
    cu_seqlens: Tensor
    seq_lens: Sequence[int]
    completion_lens: Sequence[int]
    width: int
    rows: int

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> "TokenPlan":
        """The plan that :class:`PlannedCollator` left in the batch; without one, it is made here,
        from ``shift_labels`` or ``completion_mask``.

        Making it here costs a device sync when the batch is on a GPU.

        Raises:
            ValueError: the batch has neither a plan nor what makes one.
        """
        if all(key in batch for key in PLAN_KEYS[1:]):
            plan: Mapping[str, Any] = batch
        elif SHIFT_KEY in batch:
            plan = plan_shifted(batch[SHIFT_KEY])
            plan["completion_lens"] = batch.get(WHOLE_LENS_KEY, plan["completion_lens"])
        else:
            completion_mask = _completion_mask(batch)
            plan = plan_tokens(batch["input_ids"], completion_mask)
        return cls(
            token_index=plan["token_index"],
            target=plan["target"],
            cu_seqlens=plan["cu_seqlens"],
            seq_lens=plan["seq_lens"],
            completion_lens=plan["completion_lens"],
            width=batch["input_ids"].shape[1],
            rows=batch["input_ids"].shape[0],
        )

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.seq_lens)

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.seq_lens) // 2

    @property
    def num_tokens(self) -> int:
        """N, the scored tokens of all sequences."""
        return self.target.shape[0]

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of the chosen sequences: what a token mean over them divides by."""
        return sum(self.seq_lens[: self.num_pairs])

    def to(self, device: torch.device | str) -> "TokenPlan":
        """The plan with its tensors on ``device``."""
        return replace(
            self,
            token_index=self.token_index.to(device, non_blocking=True),
            target=self.target.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
        )

    def gather(self, hidden_states: Tensor) -> Tensor:
        """Hidden states that predict the scored tokens.

        Equivalent to ``hidden_states[:, -T:].reshape(-1, H)[token_index]``, without a copy of the
        prompts. Differentiable to ``hidden_states``; no host sync.

        Args:
            hidden_states: ``[B, T', H]``. T' > T is what prompt-learning adapters return, which
                prepend virtual tokens: the last T positions belong to the batch's tokens.

        Returns:
            ``[N, H]`` in the dtype of ``hidden_states``.

        Raises:
            ValueError: ``hidden_states`` is not ``[B, T', H]`` with T' >= T.
        """
        shape = tuple(hidden_states.shape)
        if len(shape) != 3 or shape[0] != self.rows or shape[1] < self.width:
            raise ValueError(
                f"hidden_states {shape} do not belong to this batch: expected "
                f"[{self.rows}, T, H] with T = {self.width} (or more, when an adapter "
                "prepends virtual tokens)"
            )
        index = self.token_index.to(hidden_states.device, non_blocking=True)
        virtual = shape[1] - self.width
        if virtual:
            index = index + (index // self.width + 1) * virtual
        return hidden_states.reshape(-1, shape[2]).index_select(0, index)

    def sequence_ids(self) -> Tensor:
        """``[N]`` int64: the sequence of each scored token, on the plan's device; no host sync."""
        ids = torch.arange(self.num_sequences, device=self.cu_seqlens.device)
        return ids.repeat_interleave(self.cu_seqlens.diff(), output_size=self.num_tokens)

    def ld_weight(self, alpha: float) -> Tensor:
        """Token weights of length-desensitised DPO (LD-DPO, arXiv 2409.06411).

        With L the smaller number of scored tokens of a pair, the first L scored tokens of both of
        its sequences weigh 1, those beyond ``alpha``. alpha = 1 is plain DPO.

        Returns:
            ``[N]`` float32 on the plan's device; no host sync.

        Raises:
            ValueError: ``alpha`` is outside of [0, 1].
        """
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(
                f"ld_alpha={alpha} must lie in [0, 1]: 1 is plain DPO, 0 drops the longer tail"
            )
        ids = self.sequence_ids()
        position = torch.arange(self.num_tokens, device=ids.device) - self.cu_seqlens[ids]
        lengths = self.cu_seqlens.diff().view(2, self.num_pairs)
        shared = lengths.amin(dim=0).repeat(2)
        weight = torch.ones(self.num_tokens, dtype=torch.float32, device=ids.device)
        return weight.masked_fill_(position >= shared[ids], alpha)

    def pair_lengths(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Completion lengths ``(chosen [P], rejected [P])``, float32; no host sync.

        Args:
            device: where to put them; default the plan's own.
        """
        target = torch.device(device) if device is not None else self.cu_seqlens.device
        lengths = torch.tensor(
            self.completion_lens, dtype=torch.float32, pin_memory=target.type == "cuda"
        ).to(target, non_blocking=True)
        return lengths[: self.num_pairs], lengths[self.num_pairs :]
