"""What a backend of the LM head is: one forward and one backward over rows, nothing else.

Legend: N scored tokens, H hidden, V vocabulary, r rank of an adapter on the head.

How to add a backend: write a class with the members of :class:`HeadBackend` (it may live anywhere
that imports only what is below ``functional``), and name it in ``backends/select.py``: one row in
the table of factories, one rule in the automatic choice. Validation, ignored rows, autograd, the
preference loss, groups of pairs and the upstream gradient are the callers' business:

- every row of ``target`` is a valid index when ``forward`` is called (on CUDA a row out of range
  must give NaN and no stray read);
- ``forward`` computes log-probs, statistics, and whatever ``backward`` needs, as ``Saved.tensors``
  (autograd keeps and frees them) and ``Saved.meta`` (plain Python values); nothing may be saved
  elsewhere, and ``backward`` may run twice on one ``Saved`` (retain_graph) or never;
- ``backward`` gets ``dL/dlogp`` of every row; gradients are in the accumulator's dtype (float32,
  or float64 for float64 inputs), and are added to ``into`` where it is given;
- where ``head.shard`` is set, ``target`` counts over the whole vocabulary, log-probs and statistics
  are of the whole vocabulary, the gradients of hidden states and lora.a are this rank's part of a
  sum that the caller takes, and every rank makes the same collectives. Whether a backend can is
  said in ``backends/select.py``.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dpo_fast.backends.shard import VocabShard
from dpo_fast.naive import HeadLoRA, LinearLogprobs

ROW_MULTIPLE = 48  # rows that a backend may round a number of rows up to


class LinearHead(NamedTuple):
    """Everything between hidden states and ``z = scale * cap(x W^T + bias + lora)``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float  # logit_scale / temperature
    lora: HeadLoRA | None
    # None: the vocabulary is whole; else weight, bias and lora.b hold this rank's rows of it
    shard: VocabShard | None = None

    @property
    def vocab(self) -> int:
        """V over all ranks."""
        return self.weight.shape[0] if self.shard is None else self.shard.total

    def for_plans(self) -> "LinearHead":
        """What decisions are made with that all ranks must make alike: the longest shard's shape,
        without memory.
        """
        if self.shard is None:
            return self
        shape = (self.shard.longest, self.weight.shape[1])
        return self._replace(weight=self.weight.detach().new_empty(1).expand(shape))


class Needs(NamedTuple):
    """Which gradients are asked for; all False under ``no_grad``."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False

    @property
    def head(self) -> bool:
        """The backward reads the probabilities again: not so for dhidden and dlora_a."""
        return self.weight or self.bias or self.lora_b


class HeadGrads(NamedTuple):
    """Gradients in the accumulator's dtype; None where not asked for."""

    hidden: Tensor | None = None  # [N, H]
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [r, H]
    lora_b: Tensor | None = None  # [V, r]


class Saved(NamedTuple):
    """What a backward needs: tensors for autograd to keep, and plain values."""

    tensors: tuple[Tensor | None, ...]
    meta: Any


def buffer_bytes(rows: int, row_bytes: int) -> int:
    """Size of a buffer for ``rows`` rows of stored probabilities."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE * row_bytes


class HeadForward(NamedTuple):
    """Result of a backend's forward."""

    result: LinearLogprobs  # logps [N] float32 (float64 for float64 inputs), statistics asked for
    saved: Saved | None  # None when no gradient is asked for


class HeadBackend(Protocol):
    """The LM head over rows that are all scored."""

    name: str
    # Whether stored probabilities may live until the backward of a fused loss: its gradients are
    # then taken there, scaled by the upstream gradient beforehand and rounded once, and no float32
    # gradient of the head exists. Not where fresh memory is dear (page faults of a CPU).
    gradients_may_wait: bool

    def row_bytes(self, head: LinearHead) -> int:
        """Bytes of workspace that one row occupies while its probabilities are stored."""
        ...

    def default_workspace(self, head: LinearHead) -> int:
        """Bytes that stored probabilities may occupy; a function of shapes and device type only."""
        ...

    def forward(
        self,
        hidden: Tensor,  # [N, H]
        head: LinearHead,
        target: Tensor,  # [N] int64
        *,
        needs: Needs,
        outputs: tuple[str, ...],
        store: bool,
        buffer: Tensor | None = None,
        spare: int = 0,
    ) -> HeadForward:
        """Log-probs of all rows. ``store``: probabilities may be kept for ``backward``.

        ``buffer``: uint8 scratch of at least ``buffer_bytes(N, row_bytes)``. What ``store`` keeps
        goes there; the caller promises not to use it again before ``backward`` has run.
        ``spare``: bytes that may be used, beyond what must be, by a backward which computes
        probabilities again and by a frozen head's groups of rows; it may be ignored.
        """
        ...

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        """Gradients for ``dlogps`` [N]. Those of the head are added to ``into``, in place."""
        ...
