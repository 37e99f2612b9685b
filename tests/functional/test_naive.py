"""The oracle itself: literal values, torch's own functions, and gradients in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from dpo_fast import naive
from dpo_fast.naive import HeadLoRA
from tests.functional.cases import SigmoidLoss, borders, make_case


def test_values_by_hand():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    out = naive.naive_linear_logprobs(
        hidden, weight, torch.tensor([0, 0, -100]), outputs=naive.OUTPUTS
    )
    first, second = math.exp(1) + 2, math.exp(2) + 2
    expected = torch.tensor([1 - math.log(first), -math.log(second), 0.0])
    torch.testing.assert_close(out.logps, expected)
    assert out.is_top1.tolist() == [True, False, False]
    torch.testing.assert_close(out.mean_logit, torch.tensor([1 / 3, 2 / 3, 0.0]))
    squares = torch.tensor([(math.exp(2) + 2) / first**2, (math.exp(4) + 2) / second**2])
    torch.testing.assert_close(out.log_sum_sq_probs[:2], squares.log())
    p = math.exp(1) / first
    entropy = -p * math.log(p) - 2 / first * math.log(1 / first)
    torch.testing.assert_close(out.entropy[0], torch.tensor(entropy))


def test_ties_go_to_the_lowest_index():
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [1.0], [1.0]])
    out = naive.naive_linear_logprobs(hidden, weight, torch.tensor([0, 1, 2]), outputs=("is_top1",))
    assert out.is_top1.tolist() == [False, True, False]


def test_head_in_order_bias_lora_cap_scale():
    x, w = torch.tensor([[2.0]]), torch.tensor([[3.0], [1.0]])
    lora = HeadLoRA(torch.tensor([[5.0]]), torch.tensor([[1.0], [2.0]]), 0.1)
    z = naive.naive_logits(
        x,
        w,
        bias=torch.tensor([1.0, -1.0]),
        lora=lora,
        softcap=4.0,
        logit_scale=3.0,
        temperature=2.0,
    )
    raw = torch.tensor([[6.0 + 1.0 + 1.0, 2.0 - 1.0 + 2.0]])
    torch.testing.assert_close(z, 1.5 * 4 * torch.tanh(raw / 4))


def test_equals_cross_entropy():
    case = make_case()
    ours = naive.naive_linear_logprobs(case.hidden, case.weight, case.target)
    torch.testing.assert_close(
        -ours, F.cross_entropy(case.hidden @ case.weight.T, case.target, reduction="none")
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    case = make_case(
        5, 3, 7, dtype=torch.float64, bias=True, rank=2, softcap=softcap, temperature=1.3
    )
    case.target[2] = -100
    leaves = list(case.leaves().values())

    def run(hidden, weight, bias, a, b):
        return naive.naive_linear_logprobs(
            hidden,
            weight,
            case.target,
            **{**case.kwargs, "bias": bias, "lora": HeadLoRA(a, b, 0.5)},
        )

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, atol=1e-4)


def test_sequence_sums_with_empty_sequences_and_weights():
    case = make_case(6)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    logps = naive.naive_linear_logprobs(case.hidden, case.weight, case.target)
    sums = naive.naive_sequence_logprobs(
        case.hidden, case.weight, case.target, torch.tensor([0, 2, 2, 6]), token_weight=weight
    )
    expected = [logps[0] + 0.5 * logps[1], torch.zeros(()), 2 * logps[3] + logps[4] + logps[5]]
    torch.testing.assert_close(sums, torch.stack(expected))


def test_dpo_is_the_papers_formula():
    case = make_case(8)
    cu = borders([1, 2, 3, 2])
    ref = torch.tensor([-3.0, -7.0, -11.0, -6.0])
    objective, losses, logps, *_ = naive.naive_linear_dpo(
        case.hidden, case.weight, case.target, cu, ref_logps=ref, loss=SigmoidLoss(0.3)
    )
    for p in range(2):
        margin = 0.3 * ((logps[p] - ref[p]) - (logps[2 + p] - ref[2 + p]))
        torch.testing.assert_close(losses[p], torch.log1p(torch.exp(-margin)))
    torch.testing.assert_close(objective, losses.mean())


def test_ema_moves_towards_the_policy():
    ref, policy = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    naive.naive_ema_([ref], [policy], 0.25)
    torch.testing.assert_close(ref, torch.tensor([1.5, -1.0]))
