"""Equal inputs give equal bits, and a policy that equals its reference a log-ratio of exactly 0."""

import pytest
import torch

from dpo_fast.functional import fused_linear_dpo, linear_logprobs, sequence_logprobs
from tests.functional.cases import LENGTHS, SigmoidLoss, borders, gradients, make_case

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

PLANS = [{}, {"workspace": 16 * 4 * 112}, {"workspace": 1}, {"mode": "min-memory"}]


def output(case, ref, **options):
    return fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        borders(),
        loss=SigmoidLoss(),
        **ref,
        **case.kwargs,
        **options,
    )


@pytest.mark.parametrize("options", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_ratio_is_bit_zero_when_policy_equals_reference(dtype, options):
    case = make_case(sum(LENGTHS), dtype=dtype, bias=True, softcap=8.0)
    ref = {
        "ref_hidden": case.hidden.detach().clone(),
        "ref_weight": case.weight.detach().clone(),
        "ref_bias": case.kwargs["bias"].detach().clone(),
    }
    out = output(case, ref, **options)
    assert torch.equal(out.logps, out.ref_logps)
    assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
    assert torch.equal(out.losses, torch.full((5,), 2.0).log())


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_two_runs_agree_bit_for_bit(options):
    case = make_case(37, bias=True, rank=2)
    ref = {"ref_hidden": torch.randn(37, 24)}
    first, second = (output(case, ref, **options) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.logps, second.logps)
    one, two = gradients(first.loss, case), gradients(second.loss, case)
    for name, grad in one.items():
        assert torch.equal(grad, two[name]), name


def test_statistics_and_gradients_do_not_change_the_values():
    case = make_case(37)
    with torch.no_grad():
        alone = linear_logprobs(case.hidden, case.weight, case.target)
    assert torch.equal(alone, linear_logprobs(case.hidden, case.weight, case.target))
    sums = sequence_logprobs(case.hidden, case.weight, case.target, borders())
    assert torch.equal(sums, output(case, {"ref_logps": torch.zeros(10)}).logps)


def test_uninitialised_memory_is_never_read():
    """Scratch and fresh tensors filled with NaN: the results must not notice."""
    case = make_case(37, bias=True, rank=2, softcap=5.0)
    ref = {"ref_hidden": torch.randn(37, 24)}
    expected = {}
    from dpo_fast.backends.scratch import scratch

    for poisoned in (False, True):
        scratch.release()
        torch.use_deterministic_algorithms(poisoned)  # fills torch.empty with NaN
        try:
            for i, options in enumerate(PLANS):
                out = output(case, ref, outputs=("entropy",), **options)
                found = [out.loss, out.token_stats.entropy, *gradients(out.loss, case).values()]
                if poisoned:
                    for a, b in zip(found, expected[i], strict=True):
                        assert torch.equal(a, b)
                expected[i] = found
        finally:
            torch.use_deterministic_algorithms(False)
