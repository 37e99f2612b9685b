"""The LM heads that benchmarks/head_gpu.py compares, each as one training step of a DPO head.

A step is: log-probs of the policy (and of the reference where it is online), the sigmoid loss of
the pairs, gradients of the hidden states and, unless frozen, of the head.

Legend: P pairs, S = 2P sequences, T padded length, N scored tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BETA = 0.1
PROMPT_SHARE, PADDING_SHARE = 0.4, 0.3  # of real tokens; of the slots of a padded batch


class Shape(NamedTuple):
    hidden: int
    vocab: int
    softcap: float | None = None


MODELS = {  # in the order of what the goals name
    "llama-3-8b": Shape(4096, 128256),
    "qwen3-0.6b": Shape(1024, 151936),
    "qwen2.5-7b": Shape(3584, 152064),
    "gemma-2-9b": Shape(3584, 256000, 30.0),
}


@dataclass
class Inputs:
    """One batch; everything a provider may read."""

    shape: Shape
    hidden: Tensor  # [N, H]
    ref_hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ref_weight: Tensor  # [V, H]
    target: Tensor  # [N]
    lens: list[int]
    cu_seqlens: Tensor  # [S + 1]
    ref_logps: Tensor  # [S]
    padded: Tensor  # [S, T, H]: scored rows, then prompt and padding rows
    ref_padded: Tensor
    labels: Tensor  # [S, T]
    frozen: bool
    online: bool

    def leaves(self) -> list[Tensor]:
        return [self.hidden] if self.frozen else [self.hidden, self.weight]


def make_inputs(shape: Shape, rows: int, pairs: int, *, frozen: bool, online: bool) -> Inputs:
    """Random bfloat16 data on the GPU; N is ``rows``, spread evenly over the sequences."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        out = torch.empty(*size, dtype=torch.bfloat16, device="cuda")
        return out.normal_(std=std, generator=g)

    sequences = 2 * pairs
    lens = [rows // sequences + (i < rows % sequences) for i in range(sequences)]
    length = round(max(lens) / ((1 - PROMPT_SHARE) * (1 - PADDING_SHARE)))
    hidden, ref_hidden = normal(rows, shape.hidden), normal(rows, shape.hidden)
    weight = normal(shape.vocab, shape.hidden, std=2.0 / shape.hidden**0.5)
    target = torch.randint(shape.vocab, (rows,), generator=g, device="cuda")
    padded, ref_padded = (normal(sequences, length, shape.hidden) for _ in range(2))
    labels = torch.full((sequences, length), -100, device="cuda")
    for i, (start, stop) in enumerate(pairwise([0, *accumulate(lens)])):
        padded[i, : stop - start] = hidden[start:stop]
        ref_padded[i, : stop - start] = ref_hidden[start:stop]
        labels[i, : stop - start] = target[start:stop]
    return Inputs(
        shape,
        hidden.requires_grad_(),
        ref_hidden,
        weight.requires_grad_(not frozen),
        weight.detach() if frozen else normal(*weight.shape, std=2.0 / shape.hidden**0.5),
        target,
        lens,
        torch.tensor([0, *accumulate(lens)], device="cuda"),
        torch.full((sequences,), -1000.0, device="cuda"),
        padded.requires_grad_(),
        ref_padded,
        labels,
        frozen,
        online,
    )


class Pairs:
    """The sigmoid loss over four [P] vectors."""

    separable = True

    def __call__(
        self, c: Tensor, r: Tensor, rc: Tensor, rr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return -logsigmoid(BETA * ((c - rc) - (r - rr))), BETA * (c - rc), BETA * (r - rr)


def pair_loss(logps: Tensor, refs: Tensor, pairs: int) -> Tensor:
    loss, *_ = Pairs()(logps[:pairs], logps[pairs:], refs[:pairs], refs[pairs:])
    return loss.mean()


def sums(per_token: Tensor, x: Inputs) -> Tensor:
    return torch.segment_reduce(per_token, "sum", offsets=x.cu_seqlens)


Step = Callable[[], list[Tensor]]


def from_logps(x: Inputs, logps_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """A step around a function (hidden, weight) -> per-token log-probs."""
    pairs = len(x.lens) // 2

    def step() -> list[Tensor]:
        refs = x.ref_logps
        if x.online:
            with torch.no_grad():
                refs = sums(logps_of(x.ref_hidden, x.ref_weight), x)
        loss = pair_loss(sums(logps_of(x.hidden, x.weight), x), refs, pairs)
        return list(torch.autograd.grad(loss, x.leaves()))

    return step


def ours(x: Inputs, **options: Any) -> Step:
    from dpo_fast.functional import fused_linear_dpo

    reference: dict[str, Any] = {"ref_logps": x.ref_logps}
    if x.online:
        reference = {"ref_hidden": x.ref_hidden, "ref_weight": x.ref_weight}

    def step() -> list[Tensor]:
        out = fused_linear_dpo(
            x.hidden, x.weight, x.target, x.cu_seqlens, loss=Pairs(), seq_lens=x.lens,
            backend="triton", softcap=x.shape.softcap, **reference, **options,
        )  # fmt: skip
        return list(torch.autograd.grad(out.loss, x.leaves()))

    return step


def ours_composed(x: Inputs) -> Step:
    from dpo_fast.functional import linear_logprobs

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        found = linear_logprobs(hidden, weight, x.target, backend="triton", softcap=x.shape.softcap)
        assert isinstance(found, Tensor)
        return found

    return from_logps(x, logps_of)


def naive(x: Inputs) -> Step:
    from dpo_fast.naive import naive_linear_logprobs

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        found = naive_linear_logprobs(hidden, weight, x.target, softcap=x.shape.softcap)
        assert isinstance(found, Tensor)
        return found

    return from_logps(x, logps_of)


def compiled(x: Inputs) -> Step:
    cap = x.shape.softcap

    @torch.compile
    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        z = (hidden @ weight.T).float()
        if cap is not None:
            z = cap * torch.tanh(z / cap)
        return z.gather(1, x.target[:, None])[:, 0] - z.logsumexp(1)

    return from_logps(x, logps_of)


def trl(x: Inputs) -> Step:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, x.target, 1.0, CHUNK, x.shape.softcap, 1.0, ()
        )[0]

    return from_logps(x, logps_of)


def liger_dpo(x: Inputs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if x.shape.softcap is not None or not x.online:
        raise ValueError("Liger's DPO loss has no softcap and takes no precomputed reference")
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=True)

    def step() -> list[Tensor]:
        loss, *_ = loss_of(
            x.weight, x.padded, x.labels, ref_input=x.ref_padded, ref_weight=x.ref_weight
        )
        leaves = [x.padded] if x.frozen else [x.padded, x.weight]
        return list(torch.autograd.grad(loss, leaves))

    return step


def liger_cross_entropy(x: Inputs) -> Step:
    """Not DPO: cross entropy over the same rows, no reference."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_of = LigerFusedLinearCrossEntropyLoss(softcap=x.shape.softcap)
    return lambda: list(torch.autograd.grad(loss_of(x.weight, x.hidden, x.target), x.leaves()))


def cut_cross_entropy(x: Inputs) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return -linear_cross_entropy(
            hidden, weight, x.target, softcap=x.shape.softcap, reduction="none", filter_eps=None
        )

    return from_logps(x, logps_of)


def gemms(x: Inputs) -> Step:
    """The floor: the GEMMs that the setting needs, at cuBLAS speed, and nothing else."""
    probabilities = torch.empty(
        x.hidden.shape[0], x.shape.vocab, dtype=torch.bfloat16, device="cuda"
    ).normal_()
    w, h = x.weight.detach(), x.hidden.detach()

    def step() -> list[Tensor]:
        for _ in range(1 + x.online):
            torch.mm(h, w.T, out=probabilities)
        found = [torch.mm(probabilities, w)]
        return found if x.frozen else [*found, torch.mm(probabilities.T, h)]

    return step


PROVIDERS: dict[str, Callable[[Inputs], Step]] = {
    "gemms": gemms,
    "ours": ours,
    "ours-composed": ours_composed,
    "ours-min-memory": lambda x: ours(x, mode="min-memory"),
    "trl": trl,
    "liger-dpo": liger_dpo,
    "liger-ce": liger_cross_entropy,
    "cce": cut_cross_entropy,
    "compiled": compiled,
    "naive": naive,
}


def gemm(x: Inputs) -> Step:
    """One GEMM of the logits' size, bfloat16 out."""
    out = torch.empty(x.hidden.shape[0], x.shape.vocab, dtype=torch.bfloat16, device="cuda")
    w, h = x.weight.detach(), x.hidden.detach()
    return lambda: [torch.mm(h, w.T, out=out)]


def scoring(x: Inputs, hidden: Tensor, target: Tensor, *, store: bool, engine: str | None) -> Step:
    """Log-probs, with E kept for the head's gradient or without."""
    from dpo_fast_kernels.ops import run_forward

    wanted = [False, store, False, False, False]
    weight, cap = x.weight.detach(), x.shape.softcap
    return lambda: list(
        run_forward(
            hidden, weight, target, None, None, None, 0.0, cap, 1.0, -100, wanted, False, store,
            engine,
        )
    )  # fmt: skip


def forward_of(x: Inputs, *, store: bool = False, engine: str | None = None) -> Step:
    return scoring(x, x.hidden.detach(), x.target, store=store, engine=engine)


def policy_and_reference(x: Inputs, *, stacked: bool) -> Step:
    """Both models' rows over one weight: one launch or two."""
    hidden, target = x.hidden.detach(), x.target
    if stacked:
        both = torch.cat((hidden, x.ref_hidden))
        return scoring(x, both, torch.cat((target, target)), store=False, engine=None)
    calls = [scoring(x, rows, target, store=False, engine=None) for rows in (hidden, x.ref_hidden)]
    return lambda: [out for call in calls for out in call()]


FORWARD: dict[str, Callable[[Inputs], Step]] = {
    "gemms": gemm,
    "ours": lambda x: forward_of(x, store=True),
    "ours-no-store": forward_of,
    "ours-triton": lambda x: forward_of(x, store=True, engine="triton"),
    "ours-cublas": lambda x: forward_of(x, store=True, engine="cublas"),
    "ours-two-launches": lambda x: policy_and_reference(x, stacked=False),
    "ours-one-launch": lambda x: policy_and_reference(x, stacked=True),
}
