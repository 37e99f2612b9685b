"""Gradients, extreme margins, dtypes, no host sync, one graph under torch.compile."""

import pytest
import torch

from dpo_fast.losses import F_DIVERGENCES, LOSSES, PairStats, build_loss
from dpo_fast.losses.orpo import log_odds
from tests.losses.cases import F_LOSSES, OPTIONS, Vectors, make_stats, make_vectors

CASES = [(name, "reverse_kl") for name in LOSSES]
CASES += [(name, f) for name in F_LOSSES if name != "sft" for f in F_DIVERGENCES[1:]]


def build(name, divergence="reverse_kl", **options):
    return build_loss(name, f_divergence_type=divergence, **OPTIONS.get(name, {}), **options)


# kto_pair holds its reference points fixed, which finite differences cannot; see test_values
@pytest.mark.parametrize(("name", "divergence"), [c for c in CASES if c[0] != "kto_pair"])
def test_gradcheck(name, divergence):
    loss, stats = build(name, divergence, beta=0.3), make_stats()
    vectors = make_vectors()

    def losses(chosen, rejected, nll):
        part = PairStats(
            stats.chosen_len,
            stats.rejected_len,
            nll,
            num_pairs=stats.num_pairs,
            num_chosen_tokens=stats.num_chosen_tokens,
        )
        return loss(chosen, rejected, vectors.ref_chosen, vectors.ref_rejected, stats=part).losses

    inputs = [x.clone().requires_grad_() for x in (*vectors[:2], stats.chosen_nll_sum)]
    assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize(("name", "divergence"), CASES)
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_huge_margins_stay_finite_and_keep_their_gradient(name, divergence, scale):
    if name == "ipo" and divergence != "reverse_kl":
        scale = 30.0  # the square of a score of e^80 is beyond float32
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
    policy = (-2.5 * scale + scale * signs).requires_grad_()
    reference = torch.full_like(policy, -2.5 * scale)
    stats = PairStats(torch.full((4,), 7.0), torch.full((4,), 5.0), torch.full((4,), 3.0 * scale))
    output = build(name, divergence)(*policy, *reference, stats=stats)
    assert all(x.isfinite().all() for x in output)
    if name == "sft":
        return
    (gradient,) = torch.autograd.grad(output.losses.sum(), policy)
    assert gradient.isfinite().all()
    if name in ("sigmoid", "cdpo", "hinge", "robust") and divergence == "reverse_kl":
        # pair 2 is ranked wrongly by 2 * scale: the pull on it is strongest, beta / a half of it
        assert gradient[0, 2] <= -0.04
        assert gradient[1, 2] >= 0.04


def test_discopop_does_not_multiply_infinity_by_zero():
    chosen = torch.tensor([-3000.0], requires_grad=True)
    output = build("discopop")(chosen, *torch.zeros(3, 1))
    assert output.losses.item() == pytest.approx(300.0)
    (gradient,) = torch.autograd.grad(output.losses.sum(), chosen)
    assert gradient.item() == pytest.approx(-0.1)


def test_f_divergences_of_extreme_ratios_do_not_make_nan():
    ratios = torch.tensor([-5000.0, -100.0, 100.0, 5000.0])
    zeros = torch.zeros(4)
    for divergence in F_DIVERGENCES:
        for coef in (-1.0, 0.5, 2.0):
            loss = build("sigmoid", divergence, f_alpha_divergence_coef=coef)
            both = loss(ratios, ratios, zeros, zeros).losses  # inf - inf without the cut
            assert both.isfinite().all(), (divergence, coef)


def test_log_odds_of_certain_and_hopeless_answers():
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([0.0, -1e-30, -1e-9, -1.0, -80.0, -1e4], dtype=dtype, requires_grad=True)
        odds = log_odds(x)
        assert odds.isfinite().all()
        assert (odds.diff() <= 0).all()
        (gradient,) = torch.autograd.grad(odds.sum(), x)
        assert gradient.isfinite().all()
        assert odds[-1].item() == -1e4


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_float32(name, dtype):
    output = build(name)(*make_vectors(dtype=dtype), stats=make_stats(dtype=dtype))
    expected = torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x in output} == {expected}
    # the arithmetic itself is float32: on the rounded inputs it agrees with float64
    exact = build(name)(
        *(x.double() for x in make_vectors(dtype=dtype)),
        stats=_double(make_stats(dtype=dtype)),
    )
    torch.testing.assert_close(output.losses.double(), exact.losses, rtol=1e-4, atol=1e-5)


def _double(stats):
    per_pair = (stats.chosen_len, stats.rejected_len, stats.chosen_nll_sum, stats.wpo_weight)
    return PairStats(
        *(x.double() for x in per_pair),
        num_pairs=stats.num_pairs,
        num_chosen_tokens=stats.num_chosen_tokens,
    )


def _on_meta():
    stats = make_stats(dtype=torch.float32)
    per_pair = (stats.chosen_len, stats.rejected_len, stats.chosen_nll_sum, stats.wpo_weight)
    return Vectors(*(x.to("meta") for x in make_vectors(dtype=torch.float32))), PairStats(
        *(x.to("meta") for x in per_pair),
        num_pairs=torch.tensor(5, device="meta"),
    )


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_no_host_sync(name, divergence):
    """Meta tensors hold no data: .item(), bool(tensor) and boolean indexing raise on them."""
    for weighting in (False, True):
        if weighting and name in ("aot", "aot_unpaired"):
            continue
        vectors, stats = _on_meta()
        output = build(name, divergence, use_weighting=weighting)(*vectors, stats=stats)
        assert all(x.shape == (5,) and x.device.type == "meta" for x in output)


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_carry_no_gradient(name):
    vectors = [x.requires_grad_() for x in make_vectors()]
    output = build(name)(*vectors, stats=make_stats())
    assert not output.chosen_rewards.requires_grad
    assert not output.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_under_compile(name):
    loss = build(name)
    vectors, stats = make_vectors(dtype=torch.float32), make_stats(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *v: loss(*v, stats=stats), backend="eager", fullgraph=True, dynamic=False
    )
    for ours, expected in zip(compiled(*vectors), loss(*vectors, stats=stats), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_gives_empty_vectors(name):
    output = build(name)(*make_vectors(pairs=0), stats=make_stats(pairs=0))
    assert all(x.shape == (0,) for x in output)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_completions_stay_finite(name):
    """A row that was truncated to nothing: log-probs, NLL and length 0."""
    zeros = torch.zeros(2)
    stats = PairStats(zeros, zeros, zeros)
    policy = zeros.clone().requires_grad_()
    output = build(name)(policy, zeros, zeros, zeros, stats=stats)
    assert all(x.isfinite().all() for x in output)
