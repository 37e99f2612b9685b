"""What a loss is told beyond sums: lengths, NLL and WPO weights, whole or by groups."""

import pytest
import torch

from dpo_fast.functional import fused_linear_dpo, linear_logprobs
from dpo_fast.losses import PairStats, build_loss
from tests.functional.cases import LENGTHS, SigmoidLoss, borders, gradients, make_case, workspace_of

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

PLANS = {"one group": {}, "groups": {"workspace": 16 * 4 * 241}, "again": {"mode": "min-memory"}}
REF = torch.tensor([-9.0, 0.0, -20.0, -25.0, -8.0, -15.0, -22.0, -4.0, 0.0, -30.0])
LENGTH = torch.tensor(LENGTHS, dtype=torch.float32)


def stats_of(**fields):
    return PairStats(LENGTH[:5], LENGTH[5:], num_pairs=7, num_chosen_tokens=40, **fields)


def by_hand(case, loss, token_weight=None):
    """The same objective on the tape, statistics made from plain per-token log-probs."""
    out = linear_logprobs(
        case.hidden, case.weight, case.target, outputs=("log_sum_sq_probs",), backend="naive"
    )
    weighted = out.logps if token_weight is None else out.logps * token_weight
    split = lambda t: list(t.split(LENGTHS))
    sums = torch.stack([part.sum() for part in split(weighted)])
    nll = -torch.stack([part.sum() for part in split(out.logps)][:5])
    with torch.no_grad():
        gap = split(out.logps - out.log_sum_sq_probs)
        mean = torch.stack([part.sum() / max(1, len(part)) for part in gap]).exp()
    stats = stats_of(chosen_nll_sum=nll, wpo_weight=mean[:5] * mean[5:])
    losses, *_ = loss(sums[:5], sums[5:], REF[:5], REF[5:], stats=stats)
    return (losses / 5).sum()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sft"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": ["ipo", "sft"], "use_weighting": True},
        {"loss_type": "sigmoid_norm"},
        {"loss_type": "orpo"},
        {"loss_type": "aot"},
    ],
    ids=lambda o: f"{o['loss_type']}{'+wpo' if 'use_weighting' in o else ''}",
)
def test_losses_get_their_statistics(options, weighted, plan):
    case = make_case(37)
    loss = build_loss(**options)
    token_weight = torch.rand(37, generator=torch.Generator().manual_seed(0)) if weighted else None
    expected = by_hand(case, loss, token_weight)
    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=REF,
        loss=loss,
        stats=stats_of(),
        token_weight=token_weight,
        **PLANS[plan],
    )
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    ours = gradients(output.loss, case)
    for name, grad in gradients(expected, case).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_given_statistics_are_not_replaced():
    case = make_case(37)
    loss = build_loss("sft")
    nll = torch.arange(5.0)
    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=REF,
        loss=loss,
        stats=stats_of(chosen_nll_sum=nll),
        **PLANS["groups"],
    )
    torch.testing.assert_close(output.losses, nll * 7 / 40)


def test_callable_statistics_see_each_group(each_cpu_backend):
    case = make_case(37)
    seen = []

    def stats(group):
        seen.append(group)
        pairs = group.cu_seqlens.numel() // 2
        lengths = group.cu_seqlens.diff().float()
        return PairStats(lengths[:pairs], lengths[pairs:])

    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=REF,
        loss=build_loss("ipo", beta=0.2),
        stats=stats,
        outputs=("entropy",),
        workspace=workspace_of(16, each_cpu_backend),
    )
    assert [g.pairs for g in seen] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    logps = linear_logprobs(case.hidden, case.weight, case.target)
    expected = torch.cat((logps[:3], logps[17:27]))  # sequences 0, 1 and 5, 6
    torch.testing.assert_close(seen[0].logps, expected)
    assert seen[0].logps.requires_grad and seen[0].token_stats.entropy.shape == (13,)
    whole = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=REF,
        loss=build_loss("ipo", beta=0.2),
        stats=stats_of(),
    )
    torch.testing.assert_close(output.losses, whole.losses)


def test_internal_outputs_are_not_handed_out():
    case = make_case(37)
    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=REF,
        loss=build_loss("sigmoid", use_weighting=True),
        stats=stats_of(),
        outputs=("entropy",),
    )
    assert output.token_stats.entropy is not None
    assert output.token_stats.log_sum_sq_probs is None


def test_a_loss_that_needs_statistics_and_gets_none():
    case = make_case(37)
    with pytest.raises(ValueError, match=r"needs_nll.*PairStats"):
        fused_linear_dpo(
            case.hidden, case.weight, case.target, borders(), ref_logps=REF, loss=build_loss("sft")
        )


def test_a_reference_free_loss_needs_no_reference():
    case = make_case(37)
    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        loss=build_loss("simpo", beta=2.0),
        stats=stats_of(),
    )
    assert output.ref_logps is None and torch.isfinite(output.loss)
    with pytest.raises(ValueError, match="needs a reference"):
        fused_linear_dpo(
            case.hidden, case.weight, case.target, borders(), loss=build_loss("sigmoid")
        )


def test_a_plain_callable_without_statistics_gets_four_vectors_only():
    case = make_case(37)
    output = fused_linear_dpo(
        case.hidden, case.weight, case.target, borders(), ref_logps=REF, loss=SigmoidLoss()
    )
    assert torch.isfinite(output.loss)
