"""Every loss at numbers that can be checked with a pencil.

The log-ratios are ln 2 (chosen) and -ln 2 (rejected), so that with beta = 1 the sigmoids are 2/3
and 1/3, and that of the margin ln 4 is 4/5. The lengths are 2 and 4.
"""

import dataclasses
from math import log, log1p, sqrt

import pytest
import torch

from dpo_fast import losses
from dpo_fast.losses import LOSSES, PairStats, f_score

LN2 = log(2)
STATS = PairStats(
    chosen_len=torch.tensor([2.0]),
    rejected_len=torch.tensor([4.0]),
    chosen_nll_sum=torch.tensor([3.0], dtype=torch.float64),
    num_pairs=6,
    num_chosen_tokens=9,
)
EXPECTED = {
    "sigmoid": ({}, log(5 / 4)),
    "cdpo": ({"label_smoothing": 0.2}, 0.8 * log(5 / 4) + 0.2 * log(5)),
    "robust": ({"label_smoothing": 0.1}, (0.9 * log(5 / 4) - 0.1 * log(5)) / 0.8),
    "hinge": ({"beta": 0.5}, 1 - LN2),
    "ipo": ({}, (LN2 / 2 + LN2 / 4 - 1 / 2) ** 2),
    "sigmoid_norm": ({}, log1p(2**-0.75)),
    "exo_pair": ({"label_smoothing": 0.1}, 0.8 * log(0.8 / 0.9) + 0.2 * log(0.2 / 0.1)),
    "nca_pair": ({}, log(3 / 2) + log(3) / 2 + log(3 / 2) / 2),
    "bco_pair": ({}, 2 * log(3 / 2)),
    "sppo_hard": ({"beta": 0.5}, 2 * (LN2 - 1) ** 2),
    "apo_zero": ({}, 1 / 3 + 1 / 3),
    "apo_down": ({}, 2 / 3 + 1 / 5),
    "discopop": ({"discopop_tau": 0.5}, log(5 / 4) / 17 + (16 / 17) / 4),
    "sft": ({}, 3 * 6 / 9),
    # one pair: the sort does nothing
    "aot": ({"label_smoothing": 0.2}, 0.8 * log(5 / 4) + 0.2 * log(5)),
    "aot_unpaired": ({"label_smoothing": 0.2}, 0.8 * log(5 / 4) + 0.2 * log(5)),
    # z of the chosen half is max(0, -ln 2) = 0, that of the rejected half ln 2
    "kto_pair": (
        {"kto_desirable_weight": 3.0, "kto_undesirable_weight": 5.0},
        (3 * (1 / 3) + 5 * (1 - 4 / 5)) / 2,
    ),
    # logps -1 and -1 - 2 ln 2 (below): means -1/2 and -(1 + 2 ln 2) / 4
    "simpo": ({"simpo_gamma": 0.25 + LN2 / 2}, log1p(sqrt(2.718281828459045))),
    "cpo": ({"cpo_alpha": 0.5}, log(5 / 4) + 0.5 * 2),
}


def vectors():
    policy, reference = [[-1.0], [-1.0 - 2 * LN2]], [[-1.0 - LN2], [-1.0 - LN2]]
    return [torch.tensor(x, dtype=torch.float64) for x in policy + reference]


def test_the_log_ratios_are_what_the_docstring_says():
    chosen, rejected, ref_chosen, ref_rejected = vectors()
    assert (chosen - ref_chosen).item() == pytest.approx(LN2)
    assert (rejected - ref_rejected).item() == pytest.approx(-LN2)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"orpo"}))
def test_value(name):
    options, expected = EXPECTED[name]
    output = LOSSES[name](*vectors(), stats=STATS, **{"beta": 1.0, **options})
    assert output.losses.item() == pytest.approx(expected, rel=1e-12)


def test_simpo_margin_is_written_out():
    """beta * (mean chosen - mean rejected) - gamma = -1/2 + 1/4 + ln 2 / 2 - gamma."""
    value = losses.simpo(*vectors()[:2], stats=STATS, beta=1.0, simpo_gamma=0.0).losses.item()
    assert value == pytest.approx(log1p(2.718281828459045**0.25 / sqrt(2)), rel=1e-12)


def test_orpo():
    """Per-token means 1/2 and 1/5: odds 1 and 1/4, odds ratio 4; NLL 3 over 2 tokens."""
    chosen = torch.tensor([2 * log(1 / 2)], dtype=torch.float64)
    rejected = torch.tensor([4 * log(1 / 5)], dtype=torch.float64)
    output = losses.orpo(chosen, rejected, stats=STATS, beta=0.3)
    assert output.losses.item() == pytest.approx(3 / 2 + 0.3 * log(5 / 4), rel=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(0.3 * log(1 / 2))
    weighted = losses.orpo(
        chosen, rejected, stats=STATS, beta=0.3, preference_weight=torch.tensor([0.5])
    )
    assert weighted.losses.item() == pytest.approx(3 / 2 + 0.15 * log(5 / 4), rel=1e-12)


def test_rewards():
    for name in sorted({*LOSSES} - {"simpo", "orpo", "cpo"}):
        options, _ = EXPECTED[name]
        output = LOSSES[name](*vectors(), stats=STATS, **{**options, "beta": 0.5})
        assert output.chosen_rewards.item() == pytest.approx(LN2 / 2), name
        assert output.rejected_rewards.item() == pytest.approx(-LN2 / 2), name
    simpo = losses.simpo(*vectors(), stats=STATS, beta=2.0)
    assert simpo.chosen_rewards.item() == pytest.approx(2 * -1 / 2)
    assert simpo.rejected_rewards.item() == pytest.approx(2 * -(1 + 2 * LN2) / 4)
    cpo = losses.cpo(*vectors(), stats=STATS, beta=2.0)
    assert cpo.chosen_rewards.item() == pytest.approx(-2.0)
    sft = losses.sft(*vectors()[:2], stats=STATS, beta=2.0)
    assert sft.rejected_rewards.item() == pytest.approx(2 * (-1 - 2 * LN2))


def test_the_sorts_of_aot():
    """Paired: policy margins (3, 1) -> (1, 3), reference margins (0, -2) -> (-2, 0): both differ by
    3. Unpaired: log-ratios (5, 2) -> (2, 5) and (1, 4) -> (1, 4): differences 1 and 1."""
    zeros = torch.zeros(2, dtype=torch.float64)
    policy = torch.tensor([3.0, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.0, -2.0], dtype=torch.float64)
    paired = losses.aot(policy, zeros, reference, zeros, beta=1.0).losses
    assert paired.tolist() == pytest.approx([log1p(2.718281828459045**-3)] * 2)
    chosen = torch.tensor([5.0, 2.0], dtype=torch.float64)
    rejected = torch.tensor([1.0, 4.0], dtype=torch.float64)
    unpaired = losses.aot_unpaired(chosen, rejected, zeros, zeros, beta=1.0).losses
    assert unpaired.tolist() == pytest.approx([log1p(1 / 2.718281828459045)] * 2)


def test_the_reference_points_of_kto_come_from_the_other_half_and_carry_no_gradient():
    chosen = torch.tensor([LN2, 3 * LN2], dtype=torch.float64, requires_grad=True)  # mean 2 ln 2
    rejected = torch.tensor([LN2, LN2], dtype=torch.float64)  # mean ln 2
    zeros = torch.zeros(2, dtype=torch.float64)
    output = losses.kto_pair(chosen, rejected, zeros, zeros, beta=1.0)
    # chosen above their point by 0 and 2 ln 2, rejected below theirs by ln 2
    expected = [(1 / 2 + 1 / 3) / 2, (1 / 5 + 1 / 3) / 2]
    assert output.losses.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(output.losses.sum(), chosen)
    assert gradient.tolist() == pytest.approx([-(1 / 2) * (1 / 2) / 2, -(1 / 5) * (4 / 5) / 2])


@pytest.mark.parametrize(
    ("divergence", "coef", "expected"),
    [
        ("reverse_kl", 0.5, LN2),
        ("forward_kl", 0.5, 1 / 2),
        ("js_divergence", 0.5, log(4 / 3)),
        ("alpha_divergence", 0.5, 2 - sqrt(2)),
        ("alpha_divergence", 2.0, 1.0),
        ("alpha_divergence", 1.0, LN2),
        ("alpha_divergence", 0.0, 1 / 2),  # forward KL
    ],
)
def test_f_scores_of_a_ratio_of_two(divergence, coef, expected):
    x = torch.tensor([LN2, 0.0], dtype=torch.float64)
    assert f_score(x, divergence, coef).tolist() == pytest.approx([expected, 0.0], abs=1e-15)


def test_the_mean_of_sft_over_the_global_batch_is_the_mean_over_its_tokens():
    nll = torch.tensor([3.0, 5.0, 7.0])
    lens = torch.tensor([2.0, 4.0, 4.0])
    stats = PairStats(chosen_len=lens, rejected_len=lens, chosen_nll_sum=nll)
    zeros = torch.zeros(3)
    assert losses.sft(zeros, zeros, stats=stats).losses.mean().item() == pytest.approx(15 / 10)
    total = sum(
        losses.sft(zeros[i:j], zeros[i:j], stats=stats.slice(i, j)).losses.sum()
        for i, j in ((0, 1), (1, 3))
    )
    assert total.item() / 3 == pytest.approx(15 / 10)
    counted = PairStats(lens, lens, nll, num_pairs=torch.tensor(6), num_chosen_tokens=20)
    assert losses.sft(zeros, zeros, stats=counted).losses.tolist() == pytest.approx([0.9, 1.5, 2.1])
    third = PairStats(lens, lens, nll.double(), num_chosen_tokens=torch.tensor(3))
    assert losses.sft(zeros, zeros, stats=third).losses[1].item() == 5.0
    seventh = dataclasses.replace(third, num_chosen_tokens=torch.tensor(7))
    exact = losses.sft(zeros, zeros, stats=seventh).losses[1].item()
    assert exact == pytest.approx(15 / 7, rel=1e-15), "the ratio of the counts is not float32"
    empty = PairStats(zeros, zeros, chosen_nll_sum=zeros)
    assert losses.sft(zeros, zeros, stats=empty).losses.tolist() == [0.0, 0.0, 0.0]
