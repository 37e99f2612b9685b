"""``main_grad``: the weight's gradient is added to a float32 tensor, in every backend and mode."""

import pytest
import torch

from dpo_fast.functional import fused_linear_dpo, linear_logprobs, sequence_logprobs
from tests.functional.cases import LENGTHS, SigmoidLoss, make_case
from tests.tolerances import relative_error

ROWS = sum(LENGTHS)
BORDERS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
UPSTREAM = torch.linspace(-1, 2, ROWS)
BACKENDS = ("naive", "chunked", "cpu", "triton")


def case_of(backend):
    features = {} if backend == "triton" else {"bias": True, "rank": 3}
    return make_case(ROWS, **features)


def check(case, run):
    """Gradients of ``run(None)``, against what ``run(main_grad)`` leaves behind, twice."""
    leaves = case.leaves()
    run(None)
    expected = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    start = torch.randn(case.weight.shape)
    main_grad = start.clone()
    for _ in range(2):
        run(main_grad)
    assert case.weight.grad is None
    assert relative_error(main_grad - start, 2 * expected.pop("weight")) < 1e-5
    for name, right in expected.items():
        assert relative_error(leaves[name].grad, 2 * right) < 1e-5, name


@pytest.mark.parametrize("mode", ["store", "min-memory"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs(backend, mode):
    case = case_of(backend)

    def run(main_grad):
        logps = linear_logprobs(
            case.hidden, case.weight, case.target, **case.kwargs, backend=backend, mode=mode,
            main_grad=main_grad,
        )  # fmt: skip
        (logps * UPSTREAM).sum().backward()

    check(case, run)


def test_sequences():
    case = make_case(ROWS)

    def run(main_grad):
        logps = sequence_logprobs(
            case.hidden, case.weight, case.target, BORDERS, main_grad=main_grad
        )
        (logps * UPSTREAM[: len(LENGTHS)]).sum().backward()

    check(case, run)


@pytest.mark.parametrize("workspace", [None, 101 * 4 * 20], ids=["one-group", "groups"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_loss(backend, workspace):
    case = case_of(backend)

    def run(main_grad):
        out = fused_linear_dpo(
            case.hidden, case.weight, case.target, BORDERS, **case.kwargs, loss=SigmoidLoss(),
            ref_logps=torch.zeros(len(LENGTHS)), backend=backend, workspace=workspace,
            main_grad=main_grad,
        )  # fmt: skip
        (out.loss * 3).backward()

    check(case, run)


def test_half_precision_is_not_rounded():
    """bfloat16 gradients lose what a float32 accumulator keeps."""
    case = make_case(ROWS, dtype=torch.bfloat16)
    main_grad = torch.zeros(case.weight.shape)
    logps = linear_logprobs(case.hidden, case.weight, case.target, main_grad=main_grad)
    (logps * UPSTREAM).sum().backward()
    assert not torch.equal(main_grad, main_grad.bfloat16().float())


def test_bad_accumulators_are_refused():
    case = make_case(ROWS)
    good = torch.zeros(case.weight.shape)

    def run(main_grad, weight=case.weight):
        return linear_logprobs(case.hidden, weight, case.target, main_grad=main_grad)

    for bad, said in (
        (good[:-1], r"\[100, 24\].*must be \[101, 24\] of torch.float32"),
        (good.half(), "torch.float16"),
        (good.T.contiguous().T, "contiguous"),
        (good.clone().requires_grad_(), "detach"),
    ):
        with pytest.raises(ValueError, match=said):
            run(bad)
    with pytest.raises(ValueError, match="requires_grad_"):
        run(good, case.weight.detach())
