"""FusedLinearDPOLoss against Liger's own class: loss, return tuple and gradients."""

import inspect

import pytest
import torch

from dpo_fast.functional import FusedLinearDPOLoss
from tests.tolerances import relative_error

liger = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")

P, T, H, V = 3, 9, 16, 83
NAMES = (
    *("chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean"),
    *("nll_loss", "chosen_rewards", "rejected_rewards"),
)


def inputs(seed=0, bias=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    target = torch.randint(V, (2 * P, T), generator=g)
    target[:, :2] = -100  # a prompt
    for row, length in enumerate((9, 6, 7, 9, 4, 8)):
        target[row, length:] = -100
    values = {
        "lin_weight": normal(V, H).requires_grad_(),
        "_input": normal(2 * P, T, H).requires_grad_(),
        "target": target,
        "bias": normal(V).requires_grad_() if bias else None,
        "ref_input": normal(2 * P, T, H),
        "ref_weight": normal(V, H),
        "ref_bias": normal(V) if bias else None,
    }
    return values


def run(module, values, upstream=1.3):
    arguments = list(values.values())
    loss, details = module(*arguments)
    leaves = [t for t in arguments if t is not None and t.requires_grad]
    return loss.detach(), details, torch.autograd.grad(loss * upstream, leaves)


OPTIONS = {
    "default": {},
    "beta": {"beta": 0.5},
    "nll": {"compute_nll_loss": True, "alpha": 0.7},
    "average": {"average_log_prob": True},
    "nll and average": {"compute_nll_loss": True, "average_log_prob": True},
    "hinge": {"loss_type": "hinge"},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": "nca_pair"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "bco_pair": {"loss_type": "bco_pair"},
    "sppo_hard": {"loss_type": "sppo_hard"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.1},
    "no reference": {"use_ref_model": False},
    "ignore_index": {"ignore_index": 0},
}


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_liger(name, workspace):
    values, options = inputs(), OPTIONS[name]
    if "ignore_index" in options:
        target = values["target"]
        values["target"] = torch.where(target == -100, 0, target.clamp_min(1))
    theirs = run(liger.LigerFusedLinearDPOLoss(**options, compiled=False), values)
    ours = run(FusedLinearDPOLoss(**options, workspace=workspace), values)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for label, a, b in zip(NAMES, ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=2e-5, msg=label)
        assert not a.requires_grad
    for a, b in zip(ours[2], theirs[2], strict=True):
        assert relative_error(a, b) < 2e-5


def test_positional_arguments_are_ligers():
    for function in ("__init__", "forward"):
        theirs = inspect.signature(getattr(liger.LigerFusedLinearDPOLoss, function)).parameters
        ours = inspect.signature(getattr(FusedLinearDPOLoss, function)).parameters
        positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
        assert [p.name for p in positional] == list(theirs)
        assert [p.default for p in positional] == [p.default for p in theirs.values()]


def test_known_reference_logps_instead_of_a_model():
    values = inputs()
    loss, details = FusedLinearDPOLoss()(*values.values())
    reference = {"ref_input": None, "ref_weight": None, "ref_bias": None}
    with torch.no_grad():
        _, scored = FusedLinearDPOLoss(use_ref_model=False)(
            values["ref_weight"], values["ref_input"], values["target"], values["ref_bias"]
        )
    known, same = FusedLinearDPOLoss()(
        **(values | reference), ref_chosen_logps=scored[0], ref_rejected_logps=scored[1]
    )
    assert torch.equal(loss, known)
    for a, b in zip(details, same, strict=True):
        assert torch.equal(a, b)


def test_frozen_weight_and_evaluation():
    values = inputs()
    expected = run(FusedLinearDPOLoss(), values)
    frozen = values | {"lin_weight": values["lin_weight"].detach(), "bias": values["bias"].detach()}
    found = run(FusedLinearDPOLoss(), frozen)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2][0], expected[2][1])
    with torch.no_grad():
        loss, _ = FusedLinearDPOLoss()(*values.values())
    assert torch.equal(loss, expected[0]) and not loss.requires_grad


def test_an_answer_without_tokens():
    values = inputs()
    values["target"][1] = -100
    for average in (False, True):
        loss, details = FusedLinearDPOLoss(average_log_prob=average)(*values.values())
        assert torch.isfinite(loss) and details[0][1] == 0


def test_losses_that_liger_does_not_have():
    values = inputs()
    for loss_type in ("ipo", "sigmoid_norm", "aot", ["sigmoid", "ipo"][0]):
        loss, _ = FusedLinearDPOLoss(loss_type=loss_type)(*values.values())
        assert torch.isfinite(loss)


def test_mistakes():
    values = inputs()
    good = FusedLinearDPOLoss()
    with pytest.raises(ValueError, match="Unknown loss type"):
        FusedLinearDPOLoss(loss_type="sigmoidal")
    with pytest.raises(ValueError, match=r"\[2P, T, H\]"):
        good(**(values | {"_input": values["_input"][0]}))
    with pytest.raises(ValueError, match="chosen rows first"):
        good(**(values | {"_input": values["_input"][:5], "target": values["target"][:5]}))
    with pytest.raises(ValueError, match="same tokens"):
        good(**(values | {"ref_input": values["ref_input"][:, 1:]}))
    with pytest.raises(ValueError, match="needs a reference"):
        good(**(values | {"ref_input": None, "ref_weight": None, "ref_bias": None}))
    with pytest.raises(ValueError, match="both of"):
        good(**values, ref_chosen_logps=torch.zeros(P))
