"""The filtered mode: which tiles it keeps, what it computes from them, how far off it can be."""

import pytest
import torch

from dpo_fast.functional import (
    HeadLoRA,
    filter_report,
    fused_linear_dpo,
    host,
    linear_logprobs,
    sequence_logprobs,
)
from tests.functional.cases import LENGTHS, SigmoidLoss, borders, make_case
from tests.kernels.filtered_oracle import oracle
from tests.kernels.support import gold, interpreted, run, upstream_of
from tests.tolerances import relative_error

pytestmark = interpreted

ROWS, UNIT = 16, 16  # of a tile under the interpreter
BOUND = 0.02


def peaked(rows=37, width=24, vocab=603, **features):
    """A case whose rows put their probability into few tiles, other ones in each block of rows."""
    case = make_case(rows, width, vocab, **features)
    with torch.no_grad():
        centre = torch.randn(-(-vocab // UNIT), width) * 0.5
        case.weight.add_(centre[torch.arange(vocab) // UNIT])
        block = torch.arange(rows) // ROWS
        case.hidden.mul_(0.3).add_(centre[(3 * block) % centre.shape[0]])
    return case


def oracle_of(case, bound, upstream=None):
    kw, wide = case.kwargs, case.to(torch.float64)
    scale = kw.get("logit_scale", 1.0) / kw.get("temperature", 1.0)
    dlogps = upstream_of(case) if upstream is None else upstream
    bias = wide.kwargs.get("bias")
    return oracle(
        wide.hidden.detach(), wide.weight.detach(), case.target, dlogps.double(), bound=bound,
        rows=ROWS, unit=UNIT, bias=None if bias is None else bias.detach(),
        softcap=kw.get("softcap"), scale=scale,
    )  # fmt: skip


FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 20.0},
    "scale": {"logit_scale": 0.7, "temperature": 1.3},
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_equals_the_oracle(features, frozen):
    case = peaked(**FEATURES[features])
    right = oracle_of(case, BOUND)
    share = right.mask.double().mean()
    assert 0.1 < share < 0.9, "the case must have tiles of both kinds"
    filter_report()
    ours = run(case, "triton", bound=BOUND, frozen=frozen)
    assert relative_error(ours.logps, gold(case).logps) < 1e-6
    names = ["hidden"] if frozen else ["hidden", "weight"]
    for name in names:
        assert relative_error(ours.grads[name], getattr(right, name)) < 2e-6, name
        assert relative_error(getattr(right, name), gold(case).grads[name]) > 1e-5, name
    report = filter_report()
    assert report.kept_share == pytest.approx(float(share))
    assert report.most_skipped == pytest.approx(float(right.skipped.max()), rel=1e-4)
    assert filter_report() is None


def test_bound_zero_is_exact():
    case = peaked(bias=True, softcap=20.0)
    right, ours = gold(case), run(case, "triton", bound=0.0)
    dense = run(case, "triton")
    assert torch.equal(ours.logps, dense.logps)
    for name, grad in right.grads.items():
        assert relative_error(ours.grads[name], grad) < 2e-6, name
    assert filter_report().kept_share == 1.0


def test_logps_are_those_of_the_exact_mode_bit_for_bit():
    case = peaked()
    filtered, exact = run(case, "triton", bound=0.1), run(case, "triton")
    assert torch.equal(filtered.logps, exact.logps)


@pytest.mark.parametrize("bound", [1e-3, 1e-2, 0.1])
def test_error_bound(bound):
    """|dX - exact| <= |c| scale skipped max |W_j - W_y|, and skipped < tiles * bound."""
    case = peaked()
    right, exact = oracle_of(case, bound), gold(case)
    ours = run(case, "triton", bound=bound)
    c, w, x = upstream_of(case).double(), case.weight.detach().double(), case.hidden.double()
    farthest = torch.cdist(w[case.target], w).amax(1)
    error = (ours.grads["hidden"].double() - exact.grads["hidden"]).norm(dim=1)
    limit = c.abs() * right.skipped * farthest
    noise = 1e-5 * exact.grads["hidden"].norm(dim=1).max()
    assert (error <= limit + noise).all()
    assert (right.skipped < right.mask.shape[1] * bound).all()
    error = (ours.grads["weight"].double() - exact.grads["weight"]).norm(dim=1)
    noise = 1e-5 * exact.grads["weight"].norm(dim=1).max()
    assert (error <= bound * (c.abs() * x.norm(dim=1)).sum() + noise).all()


def test_a_common_mean_of_the_weights_cancels():
    case = peaked()
    before = run(case, "triton", bound=BOUND)
    with torch.no_grad():
        case.weight.add_(torch.randn(1, case.weight.shape[1]) * 3)
    after = run(case, "triton", bound=BOUND)
    assert relative_error(after.grads["hidden"], before.grads["hidden"]) < 2e-5
    assert relative_error(before.grads["hidden"], gold(case).grads["hidden"]) > 1e-5


def test_target_tiles_are_kept():
    case = peaked()
    right = oracle_of(case, 0.9)
    ours = run(case, "triton", bound=0.9)
    for name in ("hidden", "weight"):
        assert relative_error(ours.grads[name], getattr(right, name)) < 2e-6, name
    touched = torch.zeros(case.weight.shape[0])
    touched[case.target] = 1
    assert (ours.grads["weight"][touched == 1].abs().amax(1) > 0).all()


def test_rows_off_range_keep_everything():
    case = peaked()
    with torch.no_grad():
        case.hidden[5] *= 60  # its sums overflow at the offset known beforehand
        case.target[5] = int((case.hidden[5] @ case.weight.T).argmin())
    exact = gold(case)
    ours = run(case, "triton", bound=BOUND)
    assert relative_error(ours.logps[5], exact.logps[5]) < 1e-6
    block = slice(0, ROWS)  # of row 5
    assert relative_error(ours.grads["hidden"][block], exact.grads["hidden"][block]) < 1e-5
    after = slice(ROWS, None)
    assert relative_error(ours.grads["hidden"][after], exact.grads["hidden"][after]) > 1e-5


@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(1, 1, 1), (1, 7, 2), (17, 31, 127), (3, 8, 1031), (33, 5, 16)]
)
def test_odd_shapes(rows, width, vocab):
    case = make_case(rows, width, vocab)
    right, ours = oracle_of(case, 0.02), run(case, "triton", bound=0.02)
    for name in ("hidden", "weight"):
        assert relative_error(ours.grads[name], getattr(right, name)) < 2e-6, name


def test_no_rows():
    ours = run(make_case(0, 8, 67), "triton", bound=BOUND)
    assert ours.logps.shape == (0,) and ours.grads["hidden"].shape == (0, 8)
    assert ours.grads["weight"].shape == (67, 8) and (ours.grads["weight"] == 0).all()


def test_nan_is_kept_and_stays_in_its_block():
    case = peaked()
    with torch.no_grad():
        case.hidden[3] = torch.nan
    ours = run(case, "triton", bound=BOUND)
    assert ours.logps[3].isnan() and ours.grads["hidden"][3].isnan().all()
    assert not ours.grads["hidden"][:3].isnan().any()
    assert not ours.grads["hidden"][4:].isnan().any()
    assert ours.grads["weight"].isnan().any()


def test_statistics_and_wide_gradients():
    case = peaked()
    stats = run(case, "triton", bound=BOUND, stats=True)
    plain = run(case, "triton", stats=True)
    for name, values in stats.stats.items():
        assert torch.equal(values, plain.stats[name]), name
    right = oracle_of(case, BOUND)
    wide = run(case, "triton", bound=BOUND, wide=True)
    assert relative_error(wide.grads["weight"], right.weight) < 2e-6


def test_two_runs_are_equal():
    case = peaked()
    first, second = (run(case, "triton", bound=BOUND) for _ in range(2))
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name]), name


# ------------------------------------------------------------------ through the public functions


def through(function, case, **options):
    leaves = [case.hidden, case.weight]
    logps = function(*leaves, case.target, backend="triton", **options)
    return torch.autograd.grad(logps, leaves, upstream_of(case).to(logps.dtype))


def test_through_linear_logprobs():
    case = peaked()
    right = oracle_of(case, BOUND)
    grads = through(linear_logprobs, case, filter_bound=BOUND)
    for grad, name in zip(grads, ("hidden", "weight"), strict=True):
        assert relative_error(grad, getattr(right, name)) < 2e-6, name
    main_grad = torch.ones_like(case.weight)
    logps = linear_logprobs(
        case.hidden, case.weight, case.target, backend="triton", filter_bound=BOUND,
        main_grad=main_grad.detach(),
    )  # fmt: skip
    logps.backward(upstream_of(case))
    assert relative_error(main_grad.detach() - 1, right.weight) < 1e-5


def test_traced_whole(monkeypatch):
    """As on a GPU, where no value is known to the host."""
    monkeypatch.setattr(host, "on_host", lambda tensor: False)
    case = peaked(19, 16, 70)

    def loss(hidden, weight):
        kw = {"backend": "triton", "filter_bound": BOUND}
        return (linear_logprobs(hidden, weight, case.target, **kw) ** 2).sum()

    leaves = [case.hidden, case.weight]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(traced(*leaves), leaves), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [False, True])
def test_through_the_fused_loss(groups):
    """In groups of pairs tiles begin with each group: so their mask is another one."""
    n = sum(LENGTHS)
    case = peaked(n)
    ref_logps = torch.full((len(LENGTHS),), -40.0)
    row = -(-603 // 64) * 64 * 4
    options = {"workspace": row * max(LENGTHS) * 3} if groups else {}
    kw = {"loss": SigmoidLoss(), "ref_logps": ref_logps, "backend": "triton", **options}
    run_fused = lambda bound: torch.autograd.grad(
        fused_linear_dpo(
            case.hidden, case.weight, case.target, borders(LENGTHS), filter_bound=bound, **kw
        ).loss,
        [case.hidden, case.weight],
    )
    exact, all_kept, filtered = run_fused(None), run_fused(0.0), run_fused(BOUND)
    share = filter_report().kept_share
    assert share < 0.95
    for a, b, c in zip(exact, all_kept, filtered, strict=True):
        assert relative_error(b, a) < 1e-5
        assert 1e-6 < relative_error(c, a) < 0.1
    if not groups:
        logps = lambda bound: sequence_logprobs(
            case.hidden, case.weight, case.target, borders(LENGTHS), backend="triton",
            filter_bound=bound,
        )  # fmt: skip
        assert torch.equal(logps(BOUND), logps(0.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"filter_bound": 1.0}, "must lie in \\[0, 1\\)"),
        ({"filter_bound": -0.1}, "must lie in \\[0, 1\\)"),
        ({"filter_bound": "1e-4"}, "filter_bound='1e-4' must lie in"),
        ({"filter_bound": 0.1, "backend": "chunked"}, "the backend here is 'chunked'"),
        ({"filter_bound": 0.1, "backend": "naive"}, "the backend here is 'naive'"),
        ({"filter_bound": 0.1, "mode": "min-memory"}, "exceed the workspace"),
        ({"filter_bound": 0.1, "workspace": 10}, "raise workspace to"),
    ],
)
def test_refused_by_name(options, said):
    case = make_case(9, 16, 37)
    options = {"backend": "triton", **options}
    with pytest.raises(ValueError, match=said):
        linear_logprobs(case.hidden, case.weight, case.target, **options)


def test_an_adapter_on_the_head_is_refused():
    case = make_case(9, 16, 37)
    lora = HeadLoRA(torch.randn(2, 16), torch.randn(37, 2), 1.0)
    with pytest.raises(ValueError, match="no adapter on the LM head"):
        linear_logprobs(
            case.hidden, case.weight, case.target, lora=lora, backend="triton", filter_bound=0.1
        )


def test_float16_is_refused():
    case = make_case(9, 16, 37, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"torch\.float16: the filtered mode"):
        linear_logprobs(case.hidden, case.weight, case.target, backend="triton", filter_bound=0.1)


def test_no_grad_filters_nothing():
    case = peaked()
    filter_report()
    with torch.no_grad():
        linear_logprobs(case.hidden, case.weight, case.target, backend="triton", filter_bound=0.1)
    assert filter_report() is None
