"""The exactness promise against float64: every confidence, a common mean in the weight.

Sequence log-probs to 1e-3 + 1e-5 * |logp|, gradients to 4e-3 in relative L2; both far tighter for
float32 inputs. The bare naive loop breaks the first for bf16, which is why it is a promise.
"""

from functools import cache

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from dpo_fast.naive import naive_linear_logprobs
from tests.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

GRADIENT = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 3e-5}


def gold_of(hidden, weight, target, upstream):
    """Log-probs and gradients in float64, ``1 - p`` summed over the other columns.

    log_softmax forms it as a difference, wrong in the third digit at 1 - p = 1e-13 even in float64.
    """
    x, w = hidden.detach().double(), weight.detach().double()
    z = x @ w.T
    others = torch.ones_like(z).scatter_(1, target[:, None], 0.0)
    odds = ((z - z.gather(1, target[:, None])).exp() * others).sum(1)  # (1 - p) / p
    dz = -z.softmax(1) * others
    dz.scatter_(1, target[:, None], (odds / (1 + odds))[:, None])
    dz *= upstream.double()[:, None]
    return -odds.log1p(), dz @ w, dz.T @ x


@cache
def rows_of_confidence(odds, dtype, mean, rows=24, width=64, vocab=521):
    """Rows whose target leads the field by ``odds`` (negative: trails), exact in ``dtype``."""
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, width, generator=g) * 0.2 + mean * 0.2).to(dtype)
    target = torch.randint(vocab, (rows,), generator=g)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64)
    w, y = weight.double(), target.unsqueeze(1)
    direction = w[target] - w.mean(0)
    for _ in range(200):  # fixed-point steps: the field moves with the row
        z = hidden @ w.T
        lead = z.gather(1, y).squeeze(1) - z.scatter(1, y, -float("inf")).logsumexp(1)
        step = 0.5 * (odds - lead) / direction.square().sum(1)
        hidden += direction * step.unsqueeze(1)
    return hidden.to(dtype), weight, target


@pytest.mark.parametrize("mean", [0.0, 8.0])
@pytest.mark.parametrize("odds", [-200.0, -85.0, -20.0, 0.0, 5.0, 15.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logps_and_gradients_of_every_confidence(dtype, odds, mean):
    hidden, weight, target = rows_of_confidence(odds, dtype, mean)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    upstream = torch.full((24,), 1e-6)
    gold, *right = gold_of(hidden, weight, target, upstream)
    if dtype == torch.float16:  # whose users scale the loss into the range of the dtype
        upstream /= right[1].abs().max()
        gold, *right = gold_of(hidden, weight, target, upstream)
    logps = linear_logprobs(*leaves, target)
    assert abs(logps.double().sum() - gold.sum()) <= 1e-3 + 1e-5 * gold.sum().abs()
    assert relative_error(logps, gold) <= 2e-5
    ours = torch.autograd.grad(logps, leaves, upstream)
    for name, grad, expected in zip(("hidden", "weight"), ours, right, strict=True):
        assert relative_error(grad, expected) <= GRADIENT[dtype], name


def test_a_512_token_sequence_in_bf16():
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(4096, 128, generator=g) * 0.3).bfloat16()
    hidden = torch.randn(512, 128, generator=g).bfloat16()
    target = torch.randint(4096, (512,), generator=g)
    gold = naive_linear_logprobs(hidden.double(), weight.double(), target).sum()
    ours = linear_logprobs(hidden, weight, target).double().sum()
    eager = naive_linear_logprobs(hidden, weight, target).double().sum()
    assert abs(ours - gold) <= 1e-3 + 1e-5 * gold.abs()
    assert abs(eager - gold) > 10 * abs(ours - gold)  # what the promise is worth


def test_large_logits_keep_their_differences():
    hidden = torch.tensor([[1.0, 1e-3]])
    weight = torch.tensor([[3e4, 1.0], [3e4, 2.0], [3e4, -1.0]])
    for scale in (1.0, 0.01):
        ours = linear_logprobs(hidden, weight, torch.tensor([0]), logit_scale=scale)
        z = hidden @ weight.T
        gold = (scale * (z - z.max()).double()).log_softmax(-1)[:, 0]  # of the rounded logits
        torch.testing.assert_close(ours.double(), gold, atol=1e-6, rtol=0)


def test_softcap_gradients_where_tanh_has_saturated():
    hidden = torch.tensor([[1.0, 0.5]], requires_grad=True)
    weight = torch.tensor([[60.0, 0.0], [55.0, 1.0], [0.1, 0.2]], requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for target in range(3):
        y = torch.tensor([target])
        ours = linear_logprobs(hidden, weight, y, softcap=5.0)
        gold = naive_linear_logprobs(*exact, y, softcap=5.0)
        for grad, right in zip(
            torch.autograd.grad(ours, [hidden, weight]),
            torch.autograd.grad(gold, exact),
            strict=True,
        ):
            assert relative_error(grad, right) < 1e-5
            saturated = right.abs() < 1e-7
            torch.testing.assert_close(
                grad.double()[saturated], right[saturated], rtol=1e-4, atol=0
            )


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize(
    "logits",
    [[NAN, 1, 2], [1, NAN, 2], [INF, 1, 2], [1, INF, 2], [-INF, 1, 2], [1, -INF, -INF],
     [-INF, -INF, -INF], [INF, INF, 1], [NAN, INF, -INF]],
    ids=str,
)  # fmt: skip
def test_non_finite_logits_give_what_naive_gives(logits, target, softcap):
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor(logits, dtype=torch.float32).unsqueeze(1).requires_grad_()
    y = torch.tensor([target])
    names = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
    ours = linear_logprobs(hidden, weight, y, softcap=softcap, outputs=names)
    naive = naive_linear_logprobs(hidden, weight, y, softcap=softcap, outputs=names)
    for name, a, b in zip(naive._fields, ours, naive, strict=True):
        if name == "entropy" and not torch.isfinite(b):
            continue  # entr(0 * exp(-inf)): torch's own NaN where the limit is finite
        torch.testing.assert_close(a, b, equal_nan=True, msg=name)
    (a,) = torch.autograd.grad(ours.logps, weight)
    (b,) = torch.autograd.grad(naive.logps, weight)
    assert torch.equal(a.isnan(), b.isnan())
    torch.testing.assert_close(a, b, equal_nan=True)
