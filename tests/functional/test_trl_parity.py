"""Against TRL's own chunked LM head: values, statistics and gradients to 1e-5."""

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from tests.functional.cases import make_case

chunked_logprob = pytest.importorskip("trl.kernels.chunked_logprob")

NAMES = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
HEADS = {
    "plain": {},
    "bias and temperature": {"bias": True, "temperature": 0.7},
    "softcap": {"softcap": 5.0, "temperature": 1.3},
    "scale": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("head", HEADS)
def test_values_statistics_and_gradients(head):
    case = make_case(61, 48, 1009, **HEADS[head])
    options = case.kwargs
    theirs = chunked_logprob.ChunkedLogProbFunction.apply(
        case.hidden,
        case.weight,
        options.get("bias"),
        case.target,
        options.get("temperature", 1.0),
        256,
        options.get("softcap"),
        options.get("logit_scale", 1.0),
    )
    ours = linear_logprobs(
        case.hidden, case.weight, case.target, outputs=tuple(NAMES.values()), **options
    )
    torch.testing.assert_close(ours.logps, theirs[0], rtol=1e-5, atol=2e-6)
    for value, name in zip(theirs[1:], NAMES, strict=False):
        own = getattr(ours, NAMES[name])
        torch.testing.assert_close(own, value.detach(), rtol=1e-5, atol=5e-6, msg=name)
    upstream = torch.randn(61)
    leaves = list(case.leaves().values())
    for a, b in zip(
        torch.autograd.grad(ours.logps, leaves, upstream),
        torch.autograd.grad(theirs[0], leaves, upstream),
        strict=True,
    ):
        assert ((a - b).norm() / b.norm()).item() < 1e-5


def test_order_of_their_outputs_is_as_assumed():
    assert chunked_logprob.OPTIONAL_OUTPUTS == tuple(NAMES)
