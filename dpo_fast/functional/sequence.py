"""Log-probabilities of sequences: the LM head and one sum a sequence.

Legend: S sequences, N scored tokens, H hidden, V vocabulary.
"""

from typing import Any

from torch import Tensor

from dpo_fast.functional import validate
from dpo_fast.functional.linear import Mode, linear_logprobs
from dpo_fast.functional.segments import segment_sum, sum_over_ranks
from dpo_fast.naive import HeadLoRA


def sequence_logprobs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    cu_seqlens: Tensor,  # [S + 1] int64
    *,
    token_weight: Tensor | None = None,  # [N]
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    lora: HeadLoRA | None = None,
    group: Any = None,
    sequence_group: Any = None,
    backend: str = "auto",
    mode: Mode | None = None,
    workspace: int | None = None,
    main_grad: Tensor | None = None,
    filter_bound: float | None = None,
) -> Tensor:
    """Sum of the targets' log-probs of each sequence, ``[S]`` float32.

    The same as ``linear_logprobs(...)``, times ``token_weight`` where given, summed over
    ``cu_seqlens[s] : cu_seqlens[s + 1]``; see :func:`linear_logprobs` for everything else. Sums are
    taken in float64 in the order of the tokens; an empty sequence gives 0.

    ``sequence_group``: a ``ProcessGroup`` over which the tokens of each sequence are spread
    (context or sequence parallel). The ranks pass S sequences each, in one order, with their own
    tokens, and get the sums over all; the gradient is that of a rank's own tokens.

    Gradients: as :func:`linear_logprobs`, and to ``token_weight`` if it requires one.

    Raises:
        ValueError: as :func:`linear_logprobs`; borders that do not start at 0, end at N and ascend
            (checked on CPU tensors).
    """
    logps = linear_logprobs(
        hidden,
        weight,
        target,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        ignore_index=ignore_index,
        lora=lora,
        group=group,
        backend=backend,
        mode=mode,
        workspace=workspace,
        main_grad=main_grad,
        filter_bound=filter_bound,
    )
    assert isinstance(logps, Tensor)
    validate.check_borders(cu_seqlens, hidden.shape[0], hidden)
    validate.check_token_weight(token_weight, hidden.shape[0], hidden)
    sums = segment_sum(logps if token_weight is None else logps * token_weight, cu_seqlens)
    return sum_over_ranks(sums, sequence_group)
