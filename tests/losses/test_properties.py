"""What the papers promise of their losses, for any numbers.

Legend: P pairs.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.losses import LOSSES, PairStats, build_loss
from tests.losses.cases import OPTIONS, Vectors, make_stats, make_vectors

SEPARABLE = [name for name, fn in LOSSES.items() if fn.separable]
COUPLED = [name for name in LOSSES if name not in SEPARABLE]
REFERENCE_FREE = ["sft", "simpo", "orpo", "cpo"]
# functions of the margin between the two log-ratios: what depends on the prompt alone cancels
MARGIN = ["sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop", "aot"]

seeds = st.integers(0, 10_000)
logps = st.floats(-300, 0)
betas = st.floats(0.01, 5)


def build(name, **options):
    return build_loss(name, **{**OPTIONS.get(name, {}), **options})


def evaluate(name: str, vectors: Vectors, stats: PairStats | None = None, **options):
    stats = stats or make_stats(len(vectors.chosen))
    return build(name, **options)(*vectors, stats=stats)


def test_the_flags_are_the_documented_ones():
    assert COUPLED == ["aot", "aot_unpaired", "kto_pair"]
    assert [n for n, fn in LOSSES.items() if not fn.needs_reference] == REFERENCE_FREE
    assert [n for n, fn in LOSSES.items() if fn.needs_nll] == ["sft", "orpo", "cpo"]
    lengths = ["ipo", "sigmoid_norm", "simpo", "orpo"]
    assert [n for n, fn in LOSSES.items() if fn.needs_lengths] == lengths


@pytest.mark.parametrize("name", SEPARABLE)
@given(seed=seeds, pairs=st.integers(1, 9), cut=st.integers(0, 9), weighting=st.booleans())
def test_slices_of_a_separable_loss_are_the_whole(name, seed, pairs, cut, weighting):
    cut = min(cut, pairs)
    vectors, stats = make_vectors(pairs, seed), make_stats(pairs, seed)
    loss = build(name, use_weighting=weighting)
    whole = loss(*vectors, stats=stats)
    parts = [
        loss(*(v[i:j] for v in vectors), stats=stats.slice(i, j))
        for i, j in ((0, cut), (cut, pairs))
    ]
    for k, full in enumerate(whole):
        torch.testing.assert_close(torch.cat([p[k] for p in parts]), full, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", COUPLED)
def test_slices_of_a_coupled_loss_are_not_the_whole(name):
    vectors = make_vectors(6, 1)
    whole = evaluate(name, vectors).losses.sum()
    halves = sum(
        evaluate(name, Vectors(*(v[i : i + 3] for v in vectors))).losses.sum() for i in (0, 3)
    )
    assert abs(whole - halves) > 1e-6


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds, pairs=st.integers(2, 6))
def test_the_order_of_the_pairs_does_not_matter(name, seed, pairs):
    vectors, stats = make_vectors(pairs, seed), make_stats(pairs, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    shuffled = PairStats(
        *(getattr(stats, k)[order] for k in ("chosen_len", "rejected_len", "chosen_nll_sum")),
        num_pairs=stats.num_pairs,
        num_chosen_tokens=stats.num_chosen_tokens,
    )
    total = evaluate(name, vectors, stats).losses.sum()
    again = evaluate(name, Vectors(*(v[order] for v in vectors)), shuffled).losses.sum()
    torch.testing.assert_close(again, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {*REFERENCE_FREE}))
@given(seed=seeds, shift=st.floats(-50, 50))
def test_only_the_ratio_to_the_reference_matters(name, seed, shift):
    vectors = make_vectors(4, seed)
    shifts = torch.tensor([shift, -shift, 2 * shift, 0.0], dtype=torch.float64)
    moved = Vectors(*(v + s for v, s in zip(vectors, (shifts, -shifts) * 2, strict=True)))
    if name == "aot":  # it sorts policy and reference margins apart: one shift for all pairs
        moved = Vectors(vectors[0] + shift, vectors[1], vectors[2] + shift, vectors[3])
    torch.testing.assert_close(
        evaluate(name, moved).losses, evaluate(name, vectors).losses, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", MARGIN)
@given(seed=seeds, shift=st.floats(-50, 50), beta=betas)
def test_what_depends_on_the_prompt_alone_cancels_in_the_margin(name, seed, shift, beta):
    vectors = make_vectors(4, seed)
    moved = Vectors(vectors[0] + shift, vectors[1] + shift, *vectors[2:])
    torch.testing.assert_close(
        evaluate(name, moved, beta=beta).losses,
        evaluate(name, vectors, beta=beta).losses,
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    "name", sorted({*LOSSES} - {*MARGIN} - {*REFERENCE_FREE} - {"aot_unpaired"})
)
def test_it_does_not_cancel_elsewhere_which_is_why_those_have_no_f_divergence(name):
    vectors = make_vectors(4, 3)
    moved = Vectors(vectors[0] + 5, vectors[1] + 5, *vectors[2:])
    same = torch.allclose(evaluate(name, moved).losses, evaluate(name, vectors).losses)
    assert not same
    length_normalised = name in ("ipo", "sigmoid_norm")  # cancels where the lengths are equal
    assert length_normalised or not LOSSES[name].f_divergence
    if length_normalised:
        stats = PairStats(torch.full((4,), 6.0), torch.full((4,), 6.0))
        torch.testing.assert_close(
            evaluate(name, moved, stats).losses, evaluate(name, vectors, stats).losses
        )


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_reference_free_losses_take_no_reference(name):
    vectors = make_vectors(4)
    loss, stats = build(name), make_stats(4)
    with_reference = loss(*vectors, stats=stats)
    without = loss(vectors.chosen, vectors.rejected, None, None, stats=stats)
    zeros = torch.zeros(4)
    with_zeros = loss(vectors.chosen, vectors.rejected, zeros, zeros, stats=stats)
    assert torch.equal(with_reference.losses, without.losses)
    for a, b in zip(without, with_zeros, strict=True):
        assert torch.equal(a, b)


DECREASING: dict[str, Callable[[str], dict]] = {
    name: OPTIONS.get(name, {}) for name in ("sigmoid", "robust", "hinge", "bco_pair", "apo_zero")
} | {"simpo": {}, "cpo": {}, "sigmoid_norm": {}, "orpo": {}}


@pytest.mark.parametrize("name", DECREASING)
@given(chosen=logps, rejected=logps, step=st.floats(0.01, 50), beta=betas)
def test_a_better_margin_never_costs_more(name, chosen, rejected, step, beta):
    """Chosen up or rejected down; the likelihood terms of cpo and orpo are held fixed by stats."""
    stats = make_stats(1)
    ref = torch.tensor([-40.0], dtype=torch.float64)

    def loss(c, r):
        vectors = (torch.tensor([x], dtype=torch.float64) for x in (c, r))
        return build(name, beta=beta)(*vectors, ref, ref, stats=stats).losses.item()

    start = loss(chosen, rejected)
    assert loss(min(chosen + step, 0.0), rejected) <= start + 1e-12
    assert loss(chosen, rejected - step) <= start + 1e-12


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust", "exo_pair", "aot", "sigmoid_norm"])
def test_at_the_reference(name):
    """Step 0 of training. sigmoid: log 2, whatever the lengths."""
    vectors = make_vectors(5)
    same = Vectors(vectors[2], vectors[3], vectors[2], vectors[3])
    e = OPTIONS.get(name, {}).get("label_smoothing")
    expected = -math.log(2) - 0.5 * math.log(e * (1 - e)) if name == "exo_pair" else math.log(2)
    losses = evaluate(name, same).losses
    torch.testing.assert_close(losses, torch.full_like(losses, expected))


@given(seed=seeds, e=st.floats(0.001, 0.49), beta=betas)
def test_robust_is_unbiased_under_flipped_labels(seed, e, beta):
    v = make_vectors(4, seed)
    flipped = Vectors(v.rejected, v.chosen, v.ref_rejected, v.ref_chosen)
    robust = [evaluate("robust", x, beta=beta, label_smoothing=e).losses for x in (v, flipped)]
    expectation = (1 - e) * robust[0] + e * robust[1]
    torch.testing.assert_close(expectation, evaluate("sigmoid", v, beta=beta).losses)


@given(seed=seeds, e=st.floats(0.0, 0.49), beta=betas)
def test_cdpo_is_the_expected_loss_under_flipped_labels(seed, e, beta):
    v = make_vectors(4, seed)
    flipped = Vectors(v.rejected, v.chosen, v.ref_rejected, v.ref_chosen)
    plain = [evaluate("sigmoid", x, beta=beta).losses for x in (v, flipped)]
    ours = evaluate("cdpo", v, beta=beta, label_smoothing=e).losses
    torch.testing.assert_close(ours, (1 - e) * plain[0] + e * plain[1])


@given(e=st.floats(0.01, 0.45))
def test_cdpo_and_exo_rest_where_the_preference_probability_is_one_minus_e(e):
    margin = torch.tensor([math.log((1 - e) / e)], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(3, 1, dtype=torch.float64)
    for name in ("cdpo", "exo_pair"):
        loss = build(name, beta=1.0, label_smoothing=e)(margin, *zeros).losses.sum()
        assert torch.autograd.grad(loss, margin)[0].abs().item() < 1e-12
        worse = build(name, beta=1.0, label_smoothing=e)(margin.detach() + 1, *zeros).losses.sum()
        assert worse > loss
        if name == "exo_pair":
            assert abs(loss.item()) < 1e-12


@given(seed=seeds, beta=betas)
def test_bco_bounds_dpo_from_above(seed, beta):
    """Theorem of arXiv 2404.04656: the classifier's cross-entropy is above the DPO loss."""
    v = make_vectors(4, seed)
    bco, dpo = (evaluate(name, v, beta=beta).losses for name in ("bco_pair", "sigmoid"))
    assert (bco > dpo).all()


@given(seed=seeds)
def test_kto_with_its_reference_points_at_zero_is_half_of_apo_zero(seed):
    v = make_vectors(4, seed)
    below = Vectors(v.ref_chosen - v.chosen.abs(), v.ref_rejected - v.rejected.abs(), *v[2:])
    kto, apo = (evaluate(name, below).losses for name in ("kto_pair", "apo_zero"))
    torch.testing.assert_close(2 * kto, apo)


@given(
    seed=seeds,
    names=st.lists(st.sampled_from(sorted(LOSSES)), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_a_list_is_the_weighted_sum(seed, names, weights):
    vectors, stats = make_vectors(4, seed), make_stats(4, seed)
    weights = weights[: len(names)]
    combined = build_loss(names, weights, label_smoothing=0.1)
    expected = sum(
        w * build_loss(n, label_smoothing=0.1)(*vectors, stats=stats).losses
        for n, w in zip(names, weights, strict=True)
    )
    torch.testing.assert_close(combined(*vectors, stats=stats).losses, expected)
    assert combined.names == tuple(names)
    assert combined.separable == all(n in SEPARABLE for n in names)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"aot", "aot_unpaired"}))
def test_wpo_multiplies_the_preference_and_leaves_the_likelihood(name):
    vectors, stats = make_vectors(5), make_stats(5)
    plain = build(name)(*vectors, stats=stats)
    weighted = build(name, use_weighting=True)(*vectors, stats=stats)
    likelihood = torch.zeros(5, dtype=torch.float64)
    if name in ("sft", "cpo"):
        likelihood = build("sft")(*vectors, stats=stats).losses
    if name == "orpo":
        likelihood = stats.chosen_nll_sum / stats.chosen_len
    expected = likelihood + (plain.losses - likelihood) * stats.wpo_weight
    torch.testing.assert_close(weighted.losses, expected)
    for a, b in zip(weighted[1:], plain[1:], strict=True):
        assert torch.equal(a, b)
