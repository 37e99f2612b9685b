"""Rows beyond what the known offset covers: found, compacted and redone exactly on the device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.functional.cases import Case
from tests.kernels.support import gold, interpreted, run
from tests.tolerances import relative_error

pytestmark = interpreted

ROWS, WIDTH, VOCAB = 37, 16, 53


def case_with(off: int, depth: float, head: dict | None = None) -> Case:
    """``off`` rows, spread over the batch, whose target's log-prob is about ``-depth``."""
    g = torch.Generator().manual_seed(off)
    weight = torch.randn(VOCAB, WIDTH, generator=g)
    hidden = torch.randn(ROWS, WIDTH, generator=g) * 0.5
    target = torch.randint(VOCAB, (ROWS,), generator=g)
    for row in torch.randperm(ROWS, generator=g)[:off].tolist():
        other = (target[row] + 1) % VOCAB
        direction = weight[other] - weight[target[row]]
        hidden[row] += direction * depth / direction.square().sum()
    return Case(hidden.requires_grad_(), weight.requires_grad_(), target, head or {})


@pytest.mark.parametrize("e_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store", [True, False], ids=["stored", "recomputed"])
@pytest.mark.parametrize("depth", [100.0, 200.0, 3000.0])
@pytest.mark.parametrize("off", [0, 1, 17, ROWS])
def test_values_and_gradients(off, depth, store, e_dtype):
    case = case_with(off, depth)
    upstream = torch.full((ROWS,), 1e-6)
    ours = run(case, "triton", e_dtype=e_dtype, store=store, upstream=upstream)
    right = gold(case, upstream=upstream)
    assert (right.logps < -85).sum() == off
    torch.testing.assert_close(ours.logps.double(), right.logps, rtol=2e-6, atol=1e-5)
    limit = 1e-4 if e_dtype == torch.float32 else 4e-3
    for name, grad in ours.grads.items():
        assert relative_error(grad, right.grads[name]) < limit, name
        if off:  # and of the off-range rows alone, which the others would hide
            rows = right.logps < -85
            if name == "hidden":
                assert relative_error(grad[rows], right.grads[name][rows]) < limit


@pytest.mark.parametrize("off", [1, 17, ROWS])
def test_statistics_of_off_range_rows(off):
    case = case_with(off, 150.0, {"softcap": 400.0, "temperature": 1.1})
    ours, right = run(case, "triton", stats=True), gold(case, stats=True)
    assert (right.logps < -85).sum() == off
    for name, values in ours.stats.items():
        expected = right.stats[name].double()
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=3e-5, msg=name)


@pytest.mark.parametrize("head", [{"logit_scale": 0.01}, {"logit_scale": 30.0}])
def test_scale_far_from_one(head):
    case = case_with(5, 20.0, head)
    ours, right = run(case, "triton"), gold(case)
    torch.testing.assert_close(ours.logps.double(), right.logps, rtol=2e-6, atol=1e-5)
    for name, grad in ours.grads.items():
        assert relative_error(grad, right.grads[name]) < 1e-4, name


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("engine", ["triton", "cublas"])
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize(
    "logits",
    [[NAN, 1, 2], [1, NAN, 2], [INF, 1, 2], [1, INF, 2], [-INF, 1, 2], [1, -INF, -INF],
     [-INF, -INF, -INF], [INF, INF, 1], [NAN, INF, -INF]],
    ids=str,
)  # fmt: skip
def test_non_finite_logits_give_what_naive_gives(logits, target, engine):
    """As biases, since 0 * inf would make more of them NaN than the logits are."""
    hidden = torch.randn(3, 4)
    bias = torch.tensor(logits, dtype=torch.float32)
    case = Case(hidden, torch.randn(3, 4), torch.tensor([0, target, 1]), {"bias": bias})
    case.hidden.requires_grad_(), case.weight.requires_grad_(), bias.requires_grad_()
    ours, right = run(case, engine), gold(case)
    torch.testing.assert_close(
        ours.logps.double(), right.logps, equal_nan=True, rtol=2e-6, atol=1e-6
    )
    for name, grad in ours.grads.items():
        expected = right.grads[name]
        assert torch.equal(grad.isnan(), expected.isnan()), name
        torch.testing.assert_close(grad.double(), expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_one_bad_row_leaves_the_others_alone():
    case = case_with(3, 120.0)
    clean = run(case, "triton")
    with torch.no_grad():
        case.hidden[5] = NAN
    ours = run(case, "triton")
    keep = torch.arange(ROWS) != 5
    assert ours.logps[5].isnan() and ours.grads["hidden"][5].isnan().all()
    assert torch.equal(ours.logps[keep], clean.logps[keep])
    assert torch.equal(ours.grads["hidden"][keep], clean.grads["hidden"][keep])


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_compaction(flags):
    from dpo_fast_kernels.rows import compact

    rows, count = compact(torch.tensor(flags, dtype=torch.int32))
    expected = [i for i, flag in enumerate(flags) if flag]
    assert int(count) == len(expected)
    assert rows[: len(expected)].tolist() == expected


def test_compaction_over_several_blocks():
    from dpo_fast_kernels.rows import compact

    flag = (torch.arange(9001) % 7 == 3).int()
    rows, count = compact(flag)
    assert torch.equal(rows[: int(count)].long(), flag.nonzero().squeeze(1))


def test_invalid_and_ignored_targets():
    from dpo_fast_kernels.head import forward
    from dpo_fast_kernels.problem import Wanted, make_problem
    from dpo_fast_kernels.scoring import Vocabulary

    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=g), torch.randn(20, 8, generator=g)
    hidden[2] = NAN  # an ignored row may hold anything
    target = torch.tensor([3, 20, -100, -1, 2**40, 19])
    for engine in ("triton", "cublas"):
        problem = make_problem(hidden, weight, None, None, None, 1.0, engine=engine, stats=True)
        held = forward(
            problem, target, wanted=Wanted(True, True), stats=True, store=True,
            vocabulary=Vocabulary(-100),
        )  # fmt: skip
        logps = held.scored.state.logps
        assert logps.isnan().tolist() == [False, True, False, True, True, False]
        assert logps[2] == 0 and torch.isfinite(logps[[0, 5]]).all()
        assert (held.e[2] == 0).all()
        assert (held.scored.state.stats[:2, 2] == 0).all()


def test_maximum_pass_takes_the_targets_logit_again():
    """On a GPU it uses other matrix instructions than the GEMM: zy must come from the same ones."""
    from dpo_fast_kernels.off_range import off_range
    from dpo_fast_kernels.operands import make_operands, plan_launch
    from dpo_fast_kernels.target_logit import TargetLogits

    case = case_with(0, 0.0)
    x, w = case.hidden.detach(), case.weight.detach()
    operands, _ = make_operands(x, w, None, None, None, 1.0)
    launch = plan_launch(operands, False)
    index = torch.tensor([3, 8, 30] + [-7] * (ROWS - 3), dtype=torch.int32)
    zy = torch.full((ROWS,), NAN)
    rows = TargetLogits(zy, torch.ones(ROWS), torch.full((ROWS,), NAN), case.target.int())
    part = torch.full((1, -(-VOCAB // launch.tile.block_v), ROWS), NAN)
    count = torch.tensor([3], dtype=torch.int32)
    off_range(
        operands, launch, rows, index, count, part, maximum=True, e=None, lost=None, stats=False
    )
    z = x @ w.T
    listed = index[:3].long()
    torch.testing.assert_close(part[0].amax(0)[:3], z[listed].amax(1))
    torch.testing.assert_close(zy[listed], z[listed, case.target[listed]])
    assert zy.isnan().sum() == ROWS - 3 and part[0, :, 3:].isnan().all()
