"""One batch for the LM heads: hidden states, heads and targets, compact and as padded rows.

Legend: P pairs, S = 2P sequences, T padded length, N scored tokens, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

BETA = 0.1
PADDING_SHARE = 0.3  # of the slots of a padded batch


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a case.

    Attributes:
        prompt_share: of the real tokens; only padded rows have prompts.
        frozen: the head is not trained (LoRA elsewhere): no gradient of the weight.
        online: the reference's log-probs are computed in the step.
        dtype: of hidden states and weights.
    """

    rows: int
    vocab: int
    hidden: int
    pairs: int
    prompt_share: float = 0.5
    softcap: float | None = None
    frozen: bool = False
    online: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def num_gemms(self) -> int:
        """GEMMs of N x V x H that the setting cannot do without."""
        return 2 + (not self.frozen) + self.online


@dataclass
class Inputs:
    """Everything a head may read."""

    shape: HeadShape
    hidden: Tensor  # [N, H]
    ref_hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ref_weight: Tensor  # [V, H]
    target: Tensor  # [N]
    lens: list[int]
    cu_seqlens: Tensor  # [S + 1]
    ref_logps: Tensor  # [S] fp32
    padded: Tensor  # [S, T, H]: scored rows, then prompt and padding rows
    ref_padded: Tensor
    labels: Tensor  # [S, T], -100 where nothing is scored

    @property
    def pairs(self) -> int:
        """P."""
        return len(self.lens) // 2

    def scored(self, padded: Tensor) -> Tensor:
        """The scored rows of ``[S, T, ..]``, in the order of ``hidden``."""
        return padded[self.labels != -100]


def make_inputs(shape: HeadShape, device: str, seed: int = 0) -> Inputs:
    """Random rows, some sure of their target and some not, and a reference near the policy.

    A row's target is pulled up by 0 to 10 nats, so that its probability is anything from that of
    chance to nearly 1, as a trained model's is.
    """
    g = torch.Generator(device).manual_seed(seed)
    rows, vocab, width = shape.rows, shape.vocab, shape.hidden

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.empty(*size, device=device).normal_(std=std, generator=g)

    lens = split_rows(rows, 2 * shape.pairs)
    weight = normal(vocab, width, std=2.0 / width**0.5)
    target = torch.randint(vocab, (rows,), generator=g, device=device)
    pull = torch.rand(rows, 1, generator=g, device=device) * 2.5
    hidden = normal(rows, width) + pull * weight[target]
    ref_hidden = hidden + normal(rows, width, std=0.01)
    ref_weight = weight + normal(vocab, width, std=0.02 / width**0.5)
    cu_seqlens = torch.tensor([0, *accumulate(lens)], device=device)
    narrow = [t.to(shape.dtype) for t in (hidden, ref_hidden, weight, ref_weight)]
    hidden, ref_hidden, weight, ref_weight = narrow
    length = round(max(lens) / ((1 - shape.prompt_share) * (1 - PADDING_SHARE)))
    padded, ref_padded, labels = _padded(hidden, ref_hidden, target, lens, length)
    return Inputs(
        shape,
        hidden.requires_grad_(),
        ref_hidden,
        weight.requires_grad_(not shape.frozen),
        ref_weight,
        target,
        lens,
        cu_seqlens,
        _known_logps(ref_hidden, ref_weight, target, cu_seqlens, shape.softcap),
        padded.requires_grad_(),
        ref_padded,
        labels,
    )


def split_rows(rows: int, parts: int) -> list[int]:
    """``rows`` over ``parts`` sequences as evenly as it goes.

    Raises:
        ValueError: a sequence would be empty.
    """
    if rows < parts:
        raise ValueError(f"{rows} scored rows do not give {parts} sequences a row each")
    return [rows // parts + (i < rows % parts) for i in range(parts)]


def _padded(
    hidden: Tensor, ref_hidden: Tensor, target: Tensor, lens: list[int], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of every sequence at the start of its slot; the rest are prompt and padding."""
    shape = (len(lens), length, hidden.shape[1])
    padded, ref_padded = (torch.randn(shape, device=hidden.device).to(hidden) for _ in range(2))
    labels = torch.full(shape[:2], -100, device=hidden.device)
    for i, (start, stop) in enumerate(pairwise([0, *accumulate(lens)])):
        padded[i, : stop - start] = hidden[start:stop]
        ref_padded[i, : stop - start] = ref_hidden[start:stop]
        labels[i, : stop - start] = target[start:stop]
    return padded, ref_padded, labels


def _known_logps(
    hidden: Tensor, weight: Tensor, target: Tensor, cu_seqlens: Tensor, softcap: float | None
) -> Tensor:
    """What a precomputed reference would be: log-probs by this library, to fp32's accuracy."""
    from dpo_fast.functional import sequence_logprobs

    with torch.no_grad():
        found = sequence_logprobs(hidden, weight, target, cu_seqlens, softcap=softcap)
    assert isinstance(found, Tensor)
    return found
