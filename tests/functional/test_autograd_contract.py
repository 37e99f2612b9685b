"""What autograd's users rely on: any upstream gradient, graphs reused, retained, and refused."""

import gc
import weakref

import pytest
import torch

from dpo_fast.functional import fused_linear_dpo, linear_logprobs, sequence_logprobs
from dpo_fast.naive import naive_linear_logprobs
from tests.functional.cases import SigmoidLoss, borders, gradients, make_case

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

MODES = [None, "store", "min-memory"]


def fused(case, **options):
    options.setdefault("ref_logps", torch.zeros(10))
    return fused_linear_dpo(
        case.hidden, case.weight, case.target, borders(), loss=SigmoidLoss(), **options
    )


def small(**kwargs):
    return make_case(37, **kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_before_one_backward(mode):
    first, second = small(seed=1), small(seed=2)
    one = linear_logprobs(first.hidden, first.weight, first.target, mode=mode)
    two = linear_logprobs(second.hidden, second.weight, second.target, mode=mode)
    g = torch.randn(37)
    for case, logps in ((first, one), (second, two)):
        ours = gradients(logps, case, g)
        naive = naive_linear_logprobs(case.hidden, case.weight, case.target)
        for name, grad in gradients(naive, case, g).items():
            torch.testing.assert_close(ours[name], grad)


@pytest.mark.parametrize("op", ["linear", "fused"])
@pytest.mark.parametrize("mode", MODES)
def test_retain_graph_gives_the_same_gradients_again(mode, op):
    case = small()
    value = fused(case, mode=mode).loss if op == "fused" else None
    if value is None:
        value = linear_logprobs(case.hidden, case.weight, case.target, mode=mode).sum()
    leaves = list(case.leaves().values())
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for grad in first:
        grad.zero_()  # what a caller does with a gradient must not reach the graph
    again = torch.autograd.grad(value, leaves, torch.tensor(2.0), retain_graph=True)
    for a, b in zip(again, kept, strict=True):
        torch.testing.assert_close(a, 2 * b)
    torch.autograd.grad(value, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("op", ["linear", "fused"])
def test_double_backward_raises(op):
    case = small()
    if op == "fused":
        value = fused(case).loss
    else:
        value = linear_logprobs(case.hidden, case.weight, case.target).sum()
    (grad,) = torch.autograd.grad(value, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        torch.autograd.grad(grad.sum(), case.weight)


def test_gradients_accumulate():
    case = small()
    for _ in range(3):
        fused(case).loss.backward()
    once = gradients(fused(case).loss, case)
    for name, leaf in case.leaves().items():
        torch.testing.assert_close(leaf.grad, 3 * once[name])


@pytest.mark.parametrize("factor", [0.0, -3.0, 1.0, 1e-6])
def test_upstream_gradient_of_the_fused_loss(factor):
    case = small()
    once = gradients(fused(case).loss, case)
    for name, grad in gradients(fused(case).loss * factor, case).items():
        torch.testing.assert_close(grad, factor * once[name])


def test_tied_weight_gets_both_shares():
    case = small()
    weight = case.weight.detach().clone().requires_grad_()
    hidden = torch.tanh(weight[case.target])  # an embedding of the same matrix
    logps = linear_logprobs(hidden, weight, case.target)
    (ours,) = torch.autograd.grad(logps.sum(), weight)
    naive = naive_linear_logprobs(hidden := torch.tanh(weight[case.target]), weight, case.target)
    (expected,) = torch.autograd.grad(naive.sum(), weight)
    torch.testing.assert_close(ours, expected)


def test_chosen_and_rejected_in_separate_calls_equal_one_call():
    case, cu = small(), borders()
    split = int(cu[5])
    parts = [
        sequence_logprobs(case.hidden[rows], case.weight, case.target[rows], borders_part)
        for rows, borders_part in (
            (slice(0, split), cu[:6]),
            (slice(split, None), cu[5:] - split),
        )
    ]
    zeros = torch.zeros(5)
    loss, *_ = SigmoidLoss()(*parts, zeros, zeros)
    ours = gradients(loss.mean(), case)
    for name, grad in gradients(fused(case).loss, case).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-7)


def test_weight_changed_between_forward_and_backward_is_noticed_where_it_matters():
    case = small()
    logps = linear_logprobs(case.hidden, case.weight, case.target, mode="min-memory")
    with torch.no_grad():
        case.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_backward_of_stored_probabilities_needs_no_weight():
    """What frees a sharded weight from a second gather: nothing of it is kept."""
    case = small()
    expected = gradients(linear_logprobs(case.hidden, case.weight, case.target).sum(), case)
    weight = case.weight.detach().clone().requires_grad_()
    logps = linear_logprobs(case.hidden, weight, case.target, mode="store")
    with torch.no_grad():
        weight.zero_()
    ours = torch.autograd.grad(logps.sum(), [case.hidden, weight])
    for a, b in zip(ours, expected.values(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_saved_under_no_grad():
    case = small()
    with torch.no_grad():
        logps = linear_logprobs(case.hidden, case.weight, case.target)
        output = fused(case)
    assert logps.grad_fn is None and output.loss.grad_fn is None
    frozen = small(requires_grad=())
    assert linear_logprobs(frozen.hidden, frozen.weight, frozen.target).grad_fn is None


def test_only_the_loss_of_the_fused_op_carries_a_gradient():
    output = fused(small(), outputs=("entropy",))
    assert output.loss.requires_grad
    for value in (*output[1:6], *output.token_stats):
        assert value is None or not value.requires_grad


def test_the_graph_releases_its_memory():
    case = small()
    logps = linear_logprobs(case.hidden, case.weight, case.target, mode="store")
    gone = weakref.ref(logps.grad_fn)
    logps.sum().backward()
    del logps
    gc.collect()
    assert gone() is None


def test_inference_mode():
    case = small()
    with torch.inference_mode():
        logps = linear_logprobs(case.hidden, case.weight, case.target)
    torch.testing.assert_close(
        logps.clone(), naive_linear_logprobs(case.hidden, case.weight, case.target)
    )


def test_backward_from_another_thread():
    from concurrent.futures import ThreadPoolExecutor

    case = small()
    expected = gradients(fused(case).loss, case)
    with ThreadPoolExecutor(4) as pool:
        for ours in pool.map(lambda _: gradients(fused(case).loss, case), range(8)):
            for name, grad in expected.items():
                assert torch.equal(grad, ours[name])
