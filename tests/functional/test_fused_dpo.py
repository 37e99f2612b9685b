"""fused_linear_dpo against the naive twin: groups or all pairs at once, any reference, any head."""

import pytest
import torch

from dpo_fast.functional import HeadLoRA, fused_linear_dpo
from dpo_fast.naive import OUTPUTS, naive_linear_dpo, naive_linear_logprobs
from tests.functional.cases import LENGTHS, SigmoidLoss, borders, gradients, make_case, workspace_of
from tests.tolerances import assert_three_way, relative_error

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

HEADS = {
    "plain": {},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3, "rank": 4},
}
ROW = 4 * 112  # bytes of a stored row at V = 101 in float32, in the chunked backend
PLANS = {
    "one group": {},
    "groups": {"workspace": 16 * ROW},
    "a group a pair, and one too long": {"workspace": 7 * ROW},
    "all too long": {"workspace": 1},
    "min-memory": {"mode": "min-memory"},
    "store": {"mode": "store", "workspace": 1},
}
FIELDS = ("losses", "logps", "ref_logps", "chosen_rewards", "rejected_rewards")


def reference(case, dtype, seed=9):
    """Another model's states, weight, bias and adapter."""
    other = make_case(
        case.hidden.shape[0], dtype=dtype, seed=seed, bias=True, rank=3, requires_grad=()
    )
    return {
        "ref_hidden": other.hidden,
        "ref_weight": other.weight,
        "ref_bias": other.kwargs["bias"],
        "ref_lora": other.kwargs["lora"],
    }


def run(function, case, ref, loss, upstream=1.7, **options):
    found = function(
        case.hidden, case.weight, case.target, borders(), loss=loss, **ref, **case.kwargs, **options
    )
    if isinstance(found, tuple) and hasattr(found, "loss"):
        values = {name: getattr(found, name) for name in ("loss", *FIELDS)}
    else:
        values = dict(zip(("loss", *FIELDS), found, strict=True))
    grads = gradients(values["loss"] * upstream, case)
    return {k: v if v is None else v.detach() for k, v in values.items()}, grads


def cast(ref, dtype):
    move = lambda v: (
        HeadLoRA(v.a.to(dtype), v.b.to(dtype), v.scale) if hasattr(v, "a") else v.to(dtype)
    )
    return {name: move(value) for name, value in ref.items()}


def compare(case, dtype, ref, plan, *, separable=True, **options):
    ours, grads = run(
        fused_linear_dpo, case, ref, SigmoidLoss(separable=separable), **options, **PLANS[plan]
    )
    eager, eager_grads = run(naive_linear_dpo, case.to(dtype), ref, SigmoidLoss(), **options)
    gold, gold_grads = run(
        naive_linear_dpo, case.to(torch.float64), cast(ref, torch.float64), SigmoidLoss(), **options
    )
    for name, value in ours.items():
        if gold[name] is None:
            assert value is None, name
        else:
            assert_three_way(value, eager[name], gold[name], dtype, name)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_three_way(grad, eager_grads[name], gold_grads[name], dtype, name)


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_three_way(dtype, head, plan, separable):
    case = make_case(sum(LENGTHS), dtype=dtype, **HEADS[head])
    g = torch.Generator().manual_seed(4)
    options = {
        "pair_weight": torch.rand(5, generator=g),
        "token_weight": torch.rand(37, generator=g),
    }
    compare(case, dtype, reference(case, dtype), plan, separable=separable, **options)


@pytest.mark.parametrize("plan", PLANS)
def test_known_reference_logps(plan):
    case = make_case(37)
    ref = {"ref_logps": torch.randn(10) * 5 - 20}
    compare(case, torch.float32, ref, plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "wanted", [("hidden",), ("hidden", "lora_a", "lora_b"), ("bias",)], ids=str
)
def test_frozen_parts_of_the_head(wanted, plan):
    case = make_case(37, bias=True, rank=3, requires_grad=wanted)
    compare(case, torch.float32, reference(case, torch.float32), plan)


def test_reference_without_a_weight_shares_the_policys_and_its_bias():
    case = make_case(37, bias=True, rank=2, softcap=4.0)
    ref = {"ref_hidden": torch.randn(37, 24)}
    compare(case, torch.float32, ref, "groups")
    own = run(fused_linear_dpo, case, {**ref, "ref_bias": torch.zeros(101)}, SigmoidLoss())[0]
    shared = run(fused_linear_dpo, case, ref, SigmoidLoss())[0]
    assert not torch.allclose(own["ref_logps"], shared["ref_logps"])


def test_groups_are_what_a_separable_loss_is_called_with(each_cpu_backend):
    case = make_case(37)
    rows = lambda count: {"workspace": workspace_of(count, each_cpu_backend)}
    plans = rows(16), rows(7), {"workspace": 1}, {"workspace": 1, "mode": "store"}, {}
    for plan, calls in zip(plans, ([2, 2, 1], [1] * 5, [5], [1] * 5, [5]), strict=True):
        loss = SigmoidLoss()
        run(fused_linear_dpo, case, {"ref_logps": torch.zeros(10)}, loss, **plan)
        assert loss.calls == calls, plan
        whole = SigmoidLoss(separable=False)
        run(fused_linear_dpo, case, {"ref_logps": torch.zeros(10)}, whole, **plan)
        assert whole.calls == [5]


def test_a_frozen_head_needs_no_groups():
    case = make_case(37, requires_grad=("hidden",))
    loss = SigmoidLoss()
    run(fused_linear_dpo, case, {"ref_logps": torch.zeros(10)}, loss, workspace=1)
    assert loss.calls == [5]


def test_default_pair_weight_is_the_mean():
    case = make_case(37)
    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=torch.zeros(10),
        loss=SigmoidLoss(),
    )
    torch.testing.assert_close(output.loss, output.losses.mean())
    doubled = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=torch.zeros(10),
        loss=SigmoidLoss(),
        pair_weight=0.4,
    )
    torch.testing.assert_close(doubled.loss, 2 * output.loss)


@pytest.mark.parametrize("plan", PLANS)
def test_token_statistics_in_the_order_of_the_tokens(plan):
    case = make_case(37, bias=True, softcap=5.0)
    case.target[[8, 30]] = -100
    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=torch.zeros(10),
        loss=SigmoidLoss(),
        outputs=OUTPUTS,
        token_weight=torch.rand(37),
        **case.kwargs,
        **PLANS[plan],
    )
    naive = naive_linear_logprobs(
        case.hidden, case.weight, case.target, outputs=OUTPUTS, **case.kwargs
    )
    for name, value in naive._asdict().items():
        torch.testing.assert_close(getattr(output.token_stats, name), value.detach(), msg=name)


@pytest.mark.parametrize("plan", PLANS)
def test_ignored_rows(plan):
    case = make_case(37)
    case.target[[0, 4, 17, 36]] = -100
    compare(case, torch.float32, reference(case, torch.float32), plan, token_weight=torch.rand(37))


@pytest.mark.parametrize(
    "lengths", [[], [0, 0], [1, 0], [0, 1], [0, 0, 0, 5], [2, 3, 0, 0]], ids=str
)
@pytest.mark.parametrize("plan", PLANS)
def test_few_or_no_tokens(lengths, plan):
    case = make_case(sum(lengths), bias=True)
    options = {"loss": SigmoidLoss(), "ref_logps": torch.full((len(lengths),), -1.0)}
    options |= case.kwargs
    ours = fused_linear_dpo(
        case.hidden, case.weight, case.target, borders(lengths), **options, **PLANS[plan]
    )
    naive = naive_linear_dpo(case.hidden, case.weight, case.target, borders(lengths), **options)
    for name, value in zip(("loss", *FIELDS), naive, strict=True):
        torch.testing.assert_close(getattr(ours, name), value.detach(), check_dtype=False)
    for leaf, grad in zip(
        gradients(ours.loss, case).values(), gradients(naive[0], case).values(), strict=True
    ):
        torch.testing.assert_close(leaf, grad)


def test_lengths_on_the_host_change_nothing():
    case = make_case(37)
    ref = {"ref_logps": torch.zeros(10)}
    without = run(fused_linear_dpo, case, ref, SigmoidLoss(), **PLANS["groups"])
    given = run(fused_linear_dpo, case, ref, SigmoidLoss(), seq_lens=LENGTHS, **PLANS["groups"])
    for a, b in zip(without, given, strict=True):
        for name, value in a.items():
            assert value is None or torch.equal(value, b[name]), name


def test_fp32_gradients_to_one_millionth_of_naive():
    case = make_case(sum(LENGTHS), 48, 1999)
    ref = {"ref_hidden": case.hidden.detach() + 0.1, "ref_weight": case.weight.detach()}
    ours, grads = run(fused_linear_dpo, case, ref, SigmoidLoss())
    naive, naive_grads = run(naive_linear_dpo, case, ref, SigmoidLoss())
    assert relative_error(ours["loss"], naive["loss"]) < 1e-6
    for name, grad in grads.items():
        assert relative_error(grad, naive_grads[name]) < 1e-6, name


def test_a_loss_that_uses_the_op_itself_does_not_disturb_the_group():
    """The scratch of one call must not be lent to a second one inside it."""
    case = make_case(37)
    other = make_case(50, seed=5)

    class Nested(SigmoidLoss):
        def __call__(self, *vectors):
            fused_linear_dpo(
                other.hidden,
                other.weight,
                other.target,
                torch.tensor([0, 25, 50]),
                ref_logps=torch.zeros(2),
                loss=SigmoidLoss(),
            ).loss.backward()
            return super().__call__(*vectors)

    ref = {"ref_logps": torch.zeros(10)}
    expected = run(fused_linear_dpo, case, ref, SigmoidLoss(), **PLANS["groups"])
    nested = run(fused_linear_dpo, case, ref, Nested(), **PLANS["groups"])
    for name, grad in expected[1].items():
        assert torch.equal(grad, nested[1][name])


def test_constant_loss_gives_zero_gradients():
    case = make_case(37)

    def constant(chosen, rejected, ref_chosen, ref_rejected):
        value = torch.ones_like(chosen.detach())
        return value, value, value

    output = fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        ref_logps=torch.zeros(10),
        loss=constant,
    )
    assert output.loss == 1
    for grad in gradients(output.loss, case).values():
        assert (grad == 0).all()
