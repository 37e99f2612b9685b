"""Every loss of TRL 1.16, x f-divergence x smoothing x WPO x LD x weights, against TRL's own code.

float64 where TRL allows it (its alpha divergence knows no float64). Value, gradient with respect to
every token, and the logged rewards are compared.
"""

import logging

import pytest
import torch

from dpo_fast.losses import build_loss
from tests.losses.cases import F_LOSSES, TRL_LOSSES
from tests.losses.trl_driver import make_trainer, our_inputs, random_batch, trl_loss
from tests.tiny import tiny_model, tiny_preferences, tiny_tokenizer

F64 = {"rtol": 1e-7, "atol": 1e-9}  # TRL takes exo_pair's logarithms in float32
F32 = {"rtol": 2e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(str(tmp_path_factory.mktemp("trl")))


def check(trainer, loss_type, *, dtype=torch.float64, pairs=5, seed=0, ld_alpha=None, **config):
    batch = random_batch(pairs, seed, dtype)
    theirs = trl_loss(trainer, batch, loss_type, ld_alpha=ld_alpha, **config)
    vectors, stats = our_inputs(batch, ld_alpha)
    output = build_loss(loss_type, **config)(*vectors, stats=stats)
    loss = output.losses.mean()
    (gradient,) = torch.autograd.grad(loss, batch.log_probs)
    tolerance = F64 if dtype == torch.float64 else F32
    assert loss.item() == pytest.approx(theirs.loss, rel=tolerance["rtol"], abs=tolerance["atol"])
    torch.testing.assert_close(gradient * batch.mask, theirs.gradient, **tolerance)
    assert gradient.abs().max() > 0, "a constant loss would prove nothing"
    for ours, logged in zip(output[1:], theirs[2:], strict=True):
        assert not ours.requires_grad
        assert ours.mean().item() == pytest.approx(logged, rel=1e-6, abs=1e-7)


def smoothing_of(loss):
    if loss == "exo_pair":
        return (1e-3, 0.2)
    return (0.0, 0.1) if loss in ("robust", "aot", "aot_unpaired") else (0.0,)


@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_losses(trainer, loss):
    for smoothing in smoothing_of(loss):
        for seed, beta, ld_alpha in ((0, 0.1, None), (1, 0.7, None), (2, 0.1, 0.3), (3, 0.5, 0.0)):
            check(
                trainer, [loss], label_smoothing=smoothing, beta=beta, seed=seed, ld_alpha=ld_alpha
            )


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss", sorted({*F_LOSSES} - {"cdpo"}))
def test_f_divergences(trainer, loss, divergence):
    dtype = torch.float32 if divergence == "alpha_divergence" else torch.float64
    for coef in (0.5, 0.2, 1.0, 2.0) if divergence == "alpha_divergence" else (0.5,):
        for smoothing in smoothing_of(loss):
            check(
                trainer,
                [loss],
                dtype=dtype,
                label_smoothing=smoothing,
                f_divergence_type=divergence,
                f_alpha_divergence_coef=coef,
                seed=5,
            )


@pytest.mark.parametrize(
    "loss", [x for x in TRL_LOSSES if x not in ("aot", "aot_unpaired", "sft", "hinge")]
)
def test_wpo(trainer, loss):
    smoothing = smoothing_of(loss)[-1]
    for ld_alpha in (None, 0.3):
        check(
            trainer,
            [loss],
            use_weighting=True,
            label_smoothing=smoothing,
            ld_alpha=ld_alpha,
            seed=7,
        )


@pytest.mark.parametrize(
    ("losses", "weights"),
    [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        (["sigmoid", "sft"], None),
        (["sft", "ipo", "aot"], [0.5, 0.0, -0.25]),
        (list(TRL_LOSSES), [0.1 * k for k in range(1, 16)]),
    ],
)
def test_weighted_lists(trainer, losses, weights):
    config = {} if weights is None else {"loss_weights": weights}
    check(trainer, losses, label_smoothing=0.1, **config)


def test_other_options(trainer):
    check(trainer, ["discopop"], discopop_tau=0.5, beta=0.3)
    for pairs in (1, 2, 9):
        check(trainer, ["aot"], pairs=pairs, label_smoothing=0.2)


def test_wpo_with_sft_is_the_weighted_preference_loss_plus_the_plain_likelihood(trainer):
    """TRL 1.16 multiplies an expanded scalar in place and raises. WPO weighs preference losses (its
    eq. 2); the likelihood of the chosen answer is none, so it stays as it is."""
    batch = random_batch(4, 3, torch.float64)
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_loss(trainer, batch, ["sigmoid", "sft"], use_weighting=True)
    preference = trl_loss(trainer, batch, ["sigmoid"], use_weighting=True).loss
    likelihood = trl_loss(trainer, batch, ["sft"]).loss
    vectors, stats = our_inputs(batch)
    ours = build_loss(["sigmoid", "sft"], [1.0, 0.5], use_weighting=True)(*vectors, stats=stats)
    assert ours.losses.mean().item() == pytest.approx(preference + 0.5 * likelihood, rel=1e-9)


def test_wpo_with_hinge_is_the_weighted_hinge(trainer):
    """TRL 1.16 multiplies relu's saved output in place, so its backward raises; its value is right,
    and the gradient is the weight times that of the plain hinge loss, pair by pair."""
    batch = random_batch(5, 4, torch.float64)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trl_loss(trainer, batch, ["hinge"], use_weighting=True)
    value = trl_loss(trainer, batch, ["hinge"], use_weighting=True, gradient=False).loss
    vectors, stats = our_inputs(batch)
    ours = build_loss("hinge", use_weighting=True)(*vectors, stats=stats).losses.mean()
    assert ours.item() == pytest.approx(value, rel=1e-9)
    (gradient,) = torch.autograd.grad(ours, batch.log_probs)
    plain = trl_loss(trainer, batch, ["hinge"]).gradient
    torch.testing.assert_close(gradient * batch.mask, plain * stats.wpo_weight.repeat(2)[:, None])


def test_the_driver_sets_what_the_constructor_sets(tmp_path, trainer):
    """The same numbers from a trainer that got its options through DPOConfig."""
    config = {"beta": 0.3, "label_smoothing": 0.2, "ld_alpha": 0.5, "discopop_tau": 0.1}
    losses = ["robust", "discopop", "sft"]
    made = make_trainer(str(tmp_path), loss_type=losses, loss_weights=[0.5, 2.0, 1.0], **config)
    attributes = ("loss_types", "loss_weights", "beta", "label_smoothing", "ld_alpha")
    expected = (losses, [0.5, 2.0, 1.0], 0.3, 0.2, 0.5)
    assert tuple(getattr(made, name) for name in attributes) == expected
    batch = random_batch(4, 1, torch.float64)
    theirs = trl_loss(trainer, batch, losses, loss_weights=[0.5, 2.0, 1.0], **config)
    again = trl_loss(made, batch, losses, loss_weights=[0.5, 2.0, 1.0], **config)
    assert theirs.loss == again.loss


CONSTRUCTION = [
    ({"loss_type": ["exo_pair"]}, ValueError),
    ({"loss_type": ["sigmoid", "exo_pair"]}, ValueError),
    ({"loss_type": ["bco_pair"], "f_divergence_type": "js_divergence"}, ValueError),
    ({"loss_type": ["sigmoid", "aot"], "f_divergence_type": "forward_kl"}, ValueError),
    ({"loss_type": ["aot"], "use_weighting": True}, NotImplementedError),
    ({"loss_type": ["sft", "aot_unpaired"], "use_weighting": True}, NotImplementedError),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, ValueError),
    ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, ValueError),
]


@pytest.mark.parametrize(("config", "error"), CONSTRUCTION)
def test_the_same_mistakes_raise_the_same_errors_at_construction(tmp_path, config, error):
    with pytest.raises(error):
        make_trainer(str(tmp_path), **config)
    with pytest.raises(error):
        build_loss(config.pop("loss_type"), config.pop("loss_weights", None), **config)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_the_validity_table_of_f_divergences_is_trls(tmp_path, loss, divergence):
    from trl import DPOConfig, DPOTrainer

    config = {"loss_type": [loss], "f_divergence_type": divergence, "label_smoothing": 0.1}
    args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", **config)
    verdicts = []
    for build in (
        lambda: DPOTrainer.__init__(_Stub(), **_constructor_arguments(args)),
        lambda: build_loss(loss, f_divergence_type=divergence, label_smoothing=0.1),
    ):
        try:
            build()
        except ValueError as error:
            verdicts.append("divergence" in str(error))
        except _Reached:
            verdicts.append(False)
        else:
            verdicts.append(False)
    assert verdicts[0] == verdicts[1]


class _Reached(Exception):
    """TRL's checks of the losses are behind us."""


class _Stub:
    """Stands for the trainer: the constructor's next step after its checks is the dataset."""

    def _prepare_dataset(self, *_):
        raise _Reached


_SHARED: dict = {}


def _constructor_arguments(args):
    from datasets import Dataset

    if not _SHARED:
        _SHARED["model"], _SHARED["processing_class"] = tiny_model(), tiny_tokenizer()
        _SHARED["train_dataset"] = Dataset.from_list(tiny_preferences(2))
    return {**_SHARED, "args": args}


def test_robust_warns_under_the_same_condition(tmp_path, caplog):
    for smoothing, warns in ((0.2, False), (0.6, True), (-0.1, True)):
        for build in (
            lambda s=smoothing: make_trainer(
                str(tmp_path), loss_type=["robust"], label_smoothing=s
            ),
            lambda s=smoothing: build_loss("robust", label_smoothing=s),
        ):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                build()
            assert ("[0.0, 0.5)" in caplog.text) == warns
