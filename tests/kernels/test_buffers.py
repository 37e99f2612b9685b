"""No read of memory that nothing wrote, no write outside, the same bits every time."""

import pytest
import torch

from tests.functional.cases import make_case
from tests.kernels.support import gold, interpreted, run, small_case
from tests.kernels.test_off_range import case_with
from tests.tolerances import relative_error

pytestmark = interpreted

MODES = {"stored": {}, "recomputed": {"store": False}, "frozen": {"frozen": True}}


@pytest.fixture
def poisoned(monkeypatch):
    """Every new tensor without contents is filled with NaN (integers: a wild index)."""

    def poison(tensor):
        if tensor.numel():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)
        return tensor

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"),
    ):  # fmt: skip
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _f=original, **kwargs: poison(_f(*args, **kwargs))
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_poisoned_memory_is_never_read(engine, mode, poisoned):
    assert torch.empty(3).isnan().all()  # the fixture works
    for case in (small_case("all"), case_with(5, 120.0)):
        ours, right = run(case, engine, stats=True, **MODES[mode]), gold(case, stats=True)
        torch.testing.assert_close(ours.logps.double(), right.logps, rtol=1e-5, atol=1e-5)
        for name, grad in ours.grads.items():
            assert relative_error(grad, right.grads[name]) < 1e-4, name
        for name, values in ours.stats.items():
            assert torch.isfinite(values).all(), name


@pytest.mark.parametrize("width", [24, 23], ids=["tma", "pointers"])
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_nothing_is_written_outside_e(engine, width):
    from dpo_fast_kernels.problem import make_problem, padded
    from dpo_fast_kernels.scoring import Vocabulary

    case = make_case(19, width, 67)
    problem = make_problem(
        case.hidden.detach(), case.weight.detach(), None, None, None, 1.0, engine=engine
    )
    whole = torch.full((19 + 64, padded(67)), 7.0)  # sentinels in the padding and below
    e = whole[:19, :67]
    problem.engine.score(problem.operands, case.target, e=e, stats=False, vocabulary=Vocabulary())
    assert (whole[19:] == 7.0).all() and (whole[:19, 67:] == 7.0).all()
    assert not (e == 7.0).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_two_runs_agree_bit_for_bit(engine, mode):
    case = small_case("all")
    first = run(case, engine, stats=True, **MODES[mode])
    second = run(case, engine, stats=True, **MODES[mode])
    assert torch.equal(first.logps, second.logps)
    for a, b in ((first.grads, second.grads), (first.stats, second.stats)):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_log_ratio_of_equal_models_is_zero_in_bits(engine, head):
    """With the store and without, with statistics and without: the same log-probs."""
    case = small_case(head, rows=32)
    stored = run(case, engine)
    for options in ({"store": False}, {"frozen": True}):
        assert torch.equal(run(case, engine, **options).logps, stored.logps), options


def test_sums_do_not_depend_on_the_tile():
    """The statistics' tile is narrower; the sums are taken in the same units."""
    from dpo_fast_kernels import exp_gemm as module
    from dpo_fast_kernels.operands import make_operands, plan_launch
    from dpo_fast_kernels.target_logit import target_logits

    case = small_case("plain", rows=32)
    operands, _ = make_operands(case.hidden.detach(), case.weight.detach(), None, None, None, 1.0)
    plain, heavy = plan_launch(operands, False), plan_launch(operands, True)
    assert plain.tile.block_v > heavy.tile.block_v and plain.tile.unit == heavy.tile.unit
    options = dict(ignore_index=-100, vocab_start=0, vocab_total=67)
    rows = target_logits(operands, plain, case.target, **options)
    a, _ = module.exp_gemm(operands, plain, rows, e=None, stats=False)
    b, _ = module.exp_gemm(operands, heavy, rows, e=None, stats=True)
    assert a.shape[1:] == b.shape[1:]
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=0)


def test_rows_of_common_mean_weights_need_the_rounding_given_back():
    """E's one large entry is rounded once; dX multiplies it by a weight with a common mean."""
    from dpo_fast_kernels import head as kernels

    case = make_case(24, 32, 301, seed=5)
    with torch.no_grad():
        case.weight += 8.0
        case.hidden -= case.hidden.mean(1, keepdim=True)
    right = gold(case).grads["hidden"]
    ours = run(case, "triton", e_dtype=torch.bfloat16).grads["hidden"]
    without = kernels.give_back
    kernels.give_back = lambda *args: None
    try:
        lost = run(case, "triton", e_dtype=torch.bfloat16).grads["hidden"]
    finally:
        kernels.give_back = without
    assert relative_error(ours, right) < 4e-3 < relative_error(lost, right)
