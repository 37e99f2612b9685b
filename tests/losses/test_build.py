"""build_loss: what is refused, what warns, what a user's callable may be."""

import copy
import functools
import logging
import pickle

import pytest
import torch

from dpo_fast import losses
from dpo_fast.losses import LOSSES, LossOutput, PairStats, build_loss
from tests.losses.cases import F_LOSSES, OPTIONS, make_stats, make_vectors

V, STATS = make_vectors(4), make_stats(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_type": "sigmod"}, ValueError, r"'sigmod'\. Did you mean 'sigmoid'\?.*kto_pair"),
        ({"loss_type": ["sigmoid", "zzz"]}, ValueError, "Unknown loss type: 'zzz'.*Known: sigmoid"),
        ({"loss_type": []}, ValueError, "empty"),
        ({"loss_type": 3}, TypeError, "name, a callable, or a list of them, got int 3"),
        ({"loss_type": build_loss("ipo")}, TypeError, "built already"),
        ({"loss_type": ["sft", build_loss("ipo")]}, TypeError, "built already"),
        ({"loss_type": [3]}, TypeError, "got int 3"),
        ({"loss_weights": [1.0, 2.0]}, ValueError, "2 entries and loss_type 1"),
        ({"loss_weights": [float("nan")]}, ValueError, "finite"),
        ({"loss_weights": [float("inf")]}, ValueError, "finite"),
        ({"beta": 0.0}, ValueError, "beta=0.0 must be positive"),
        ({"beta": -0.1}, ValueError, "beta=-0.1 must be positive"),
        ({"beta": float("nan")}, ValueError, "beta=nan must be a finite"),
        ({"beta": "0.1"}, TypeError, "beta must be a number, got str"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, ValueError, "discopop_tau=0.0"),
        ({"label_smoothing": float("inf")}, ValueError, "label_smoothing=inf"),
        ({"loss_type": "exo_pair"}, ValueError, r"\(0, 1\).*1e-3"),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, ValueError, "exo_pair"),
        ({"loss_type": "exo_pair", "label_smoothing": -0.1}, ValueError, "exo_pair"),
        ({"loss_type": "cdpo", "label_smoothing": 0.5}, ValueError, r"\[0, 0.5\)"),
        ({"loss_type": "cdpo", "label_smoothing": -0.1}, ValueError, r"\[0, 0.5\)"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "divide by"),
        ({"loss_type": "aot", "label_smoothing": 1.5}, ValueError, r"\[0, 1\]"),
        ({"f_divergence_type": "kl"}, ValueError, "'kl' must be one of reverse_kl"),
        (
            {"loss_type": "aot", "use_weighting": True},
            NotImplementedError,
            "not implemented for aot: ",
        ),
        (
            {"loss_type": ["sigmoid", "aot_unpaired"], "use_weighting": True},
            NotImplementedError,
            "aot_unpaired",
        ),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        build_loss(**arguments)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_which_losses_take_an_f_divergence(name, divergence):
    arguments = {"f_divergence_type": divergence, **OPTIONS.get(name, {})}
    if name in F_LOSSES:
        build_loss(name, **arguments)
    else:
        with pytest.raises(ValueError, match=f"no form for {name};.*supported for sigmoid, hinge"):
            build_loss(name, **arguments)
        with pytest.raises(ValueError, match=f"no form for {name};"):
            build_loss(["sigmoid", name], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "robust", "label_smoothing": 0.7}, "[0.0, 0.5)"),
        ({"loss_type": "cdpo"}, "is then the 'sigmoid' loss"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "no effect on sigmoid"),
        ({"loss_type": "sft", "use_weighting": True}, "no effect on sft"),
    ],
)
def test_warned(arguments, message, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        build_loss(**arguments)
    assert message in caplog.text


def test_the_usual_configurations_are_silent(caplog):
    with caplog.at_level(logging.DEBUG, logger="dpo_fast"):
        for name in LOSSES:
            build_loss(name, **OPTIONS.get(name, {}))
        build_loss(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], use_weighting=True)
        build_loss(["sigmoid", "robust"], label_smoothing=0.1)
    assert caplog.text == ""


def test_empty_weights_are_ones_as_in_trl():
    assert build_loss(["sigmoid", "sft"], []).terms[1].weight == 1.0


@pytest.mark.parametrize(
    ("loss_type", "use_weighting", "expected"),
    [
        ("sigmoid", False, (True, True, False, False, False)),
        ("ipo", False, (True, True, True, False, False)),
        ("aot", False, (False, True, False, False, False)),
        ("kto_pair", False, (False, True, False, False, False)),
        (
            "sft",
            False,
            (True, True, False, True, False),
        ),  # rewards are logged against it, as in TRL
        ("simpo", False, (True, False, True, False, False)),
        (["simpo", "sft"], False, (True, False, True, True, False)),
        (["simpo", "sigmoid"], True, (True, True, True, False, True)),
        (["sigmoid", "aot"], False, (False, True, False, False, False)),
        ("sft", True, (True, True, False, True, False)),
        ("orpo", True, (True, False, True, True, True)),
    ],
)
def test_attributes(loss_type, use_weighting, expected):
    loss = build_loss(loss_type, use_weighting=use_weighting)
    names = ("separable", "needs_reference", "needs_lengths", "needs_nll", "needs_wpo")
    assert tuple(getattr(loss, name) for name in names) == expected


@pytest.mark.parametrize(
    ("loss", "stats", "message"),
    [
        ("ipo", None, "'ipo' divides by completion lengths"),
        ("simpo", None, "'simpo' divides"),
        ("sft", None, "'sft' needs the negative log-likelihood"),
        ("orpo", PairStats(torch.ones(4), torch.ones(4)), "'orpo' needs the negative"),
    ],
)
def test_missing_stats_are_named(loss, stats, message):
    with pytest.raises(ValueError, match=message):
        build_loss(loss)(*V, stats=stats)


def test_missing_weights_and_references_are_named():
    weighted = build_loss("sigmoid", use_weighting=True)
    for stats in (None, PairStats(torch.ones(4), torch.ones(4))):
        with pytest.raises(ValueError, match="wpo_weight"):
            weighted(*V, stats=stats)
    with pytest.raises(ValueError, match=r"ref_chosen_logps.*simpo"):
        build_loss("sigmoid")(*V[:2])


def test_the_rewards_are_those_of_the_first_loss_that_has_some():
    def rewards(*names):
        return build_loss(list(names), beta=0.7)(*V, stats=STATS)[1]

    ratio = 0.7 * (V.chosen - V.ref_chosen)
    per_token = 0.7 * (V.chosen / STATS.chosen_len)
    assert torch.equal(rewards("sft"), ratio)
    assert torch.equal(rewards("sft", "simpo"), per_token)
    assert torch.equal(rewards("simpo", "sigmoid"), per_token)
    assert torch.equal(rewards("sigmoid", "simpo"), ratio)


def test_options_reach_their_losses_only():
    loss = build_loss(
        ["simpo", "kto_pair", "cpo", "discopop", "sppo_hard"],
        beta=0.3,
        simpo_gamma=1.5,
        cpo_alpha=0.2,
        kto_desirable_weight=2.0,
        kto_undesirable_weight=3.0,
        discopop_tau=0.5,
    )
    simpo, kto, cpo, discopop, sppo = (dict(term.options) for term in loss.terms)
    assert simpo == {"beta": 0.3, "simpo_gamma": 1.5}
    assert kto == {"beta": 0.3, "kto_desirable_weight": 2.0, "kto_undesirable_weight": 3.0}
    assert cpo == {"beta": 0.3, "cpo_alpha": 0.2}
    assert discopop["discopop_tau"] == 0.5
    assert sppo == {"beta": 0.3}
    assert "0.3" in repr(loss) and "simpo_gamma=1.5" in repr(loss)


def hinge_on_margin(chosen, rejected, ref_chosen, ref_rejected):
    return torch.relu(1 - (chosen - rejected - ref_chosen + ref_rejected))


def with_stats(chosen, rejected, ref_chosen, ref_rejected, *, stats):
    values = (chosen - ref_chosen) / stats.chosen_len
    return values, values, -values


def with_any_keyword(*vectors, **kwargs):
    return kwargs["stats"].chosen_nll_sum


def test_a_users_callable_alone():
    loss = build_loss(hinge_on_margin, beta=0.5)
    output = loss(*V)
    assert isinstance(output, LossOutput)
    assert torch.equal(output.losses, hinge_on_margin(*V))
    assert torch.equal(output.chosen_rewards, 0.5 * (V.chosen - V.ref_chosen))
    assert loss.names == ("hinge_on_margin",)
    assert (loss.separable, loss.needs_reference, loss.needs_nll) == (False, True, False)


def test_a_users_callable_gets_stats_if_it_takes_them_and_may_return_rewards():
    output = build_loss(with_stats)(*V, stats=STATS)
    assert torch.equal(output.rejected_rewards, -output.losses)
    assert torch.equal(build_loss(with_any_keyword)(*V, stats=STATS).losses, STATS.chosen_nll_sum)


def test_a_users_callable_in_a_list_with_weights_and_wpo():
    loss = build_loss([hinge_on_margin, "sigmoid"], [2.0, 0.5], use_weighting=True)
    expected = (
        2.0 * hinge_on_margin(*V) + 0.5 * build_loss("sigmoid")(*V).losses
    ) * STATS.wpo_weight
    torch.testing.assert_close(loss(*V, stats=STATS).losses, expected)
    assert not loss.separable and loss.names == ("hinge_on_margin", "sigmoid")


def test_a_users_rewards_carry_no_gradient():
    policy = V.chosen.clone().requires_grad_()
    output = build_loss(with_stats)(policy, *V[1:], stats=STATS)
    assert output.losses.requires_grad and not output.chosen_rewards.requires_grad


def test_a_users_declarations_are_believed():
    class Free:
        separable, needs_reference, needs_nll, needs_lengths = True, False, True, True

        def __call__(self, chosen, rejected, ref_chosen, ref_rejected, *, stats):
            assert ref_chosen is None
            return rejected - chosen + stats.chosen_nll_sum

    loss = build_loss(Free(), beta=0.5)
    assert (loss.separable, loss.needs_reference) == (True, False)
    assert (loss.needs_nll, loss.needs_lengths) == (True, True)
    output = loss(*V[:2], stats=STATS)
    assert torch.equal(output.chosen_rewards, 0.5 * V.chosen)
    assert loss.names == ("Free",)


def test_a_users_callable_has_no_f_divergence_unless_it_says_so():
    with pytest.raises(ValueError, match="no form for hinge_on_margin"):
        build_loss(hinge_on_margin, f_divergence_type="js_divergence")


@pytest.mark.parametrize(
    "bad",
    [
        lambda *v: (v[0] - v[1]).mean(),
        lambda *v: (v[0], v[1]),
        lambda *v: None,
        lambda *v: 0.5,
        lambda *v: (v[0], v[1], v[2].sum()),
        lambda *v: v[0][:2],
    ],
)
def test_a_callable_that_returns_something_else_is_named(bad):
    with pytest.raises(ValueError, match=r"'<lambda>' returned.*one value a pair"):
        build_loss(bad)(*V)


def test_our_own_functions_get_their_options_when_passed_as_callables():
    loss = build_loss(losses.sigmoid, beta=0.7)
    assert torch.equal(loss(*V).losses, build_loss("sigmoid", beta=0.7)(*V).losses)
    assert loss.separable and loss.names == ("sigmoid",)


def test_a_partial_is_a_users_callable_with_its_functions_name():
    loss = build_loss(functools.partial(losses.cdpo, beta=0.7, label_smoothing=0.2))
    expected = build_loss("cdpo", beta=0.7, label_smoothing=0.2)
    assert torch.equal(loss(*V).losses, expected(*V).losses)
    assert loss.names == ("cdpo",)


def test_a_callable_that_weighs_pairs_itself():
    def own_weighting(chosen, rejected, *_, stats):
        return (rejected - chosen) * stats.wpo_weight

    own_weighting.needs_wpo = True
    loss = build_loss(own_weighting)
    assert loss.needs_wpo and not loss.use_weighting
    assert torch.equal(loss(*V, stats=STATS).losses, (V.rejected - V.chosen) * STATS.wpo_weight)


def test_it_can_be_copied_and_pickled():
    loss = build_loss(["sigmoid", "sft"], [1.0, 0.5], use_weighting=True)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(*V, stats=STATS).losses, loss(*V, stats=STATS).losses)
        assert repr(twin) == repr(loss)


def test_importing_the_losses_imports_torch_only():
    import subprocess
    import sys

    code = (
        "import sys, dpo_fast.losses;"
        "bad = {'transformers', 'trl', 'triton', 'datasets', 'peft'} & set(sys.modules);"
        "sys.exit(repr(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
