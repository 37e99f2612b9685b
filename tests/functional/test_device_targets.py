"""Targets whose values the host may not read, as on a GPU: masked, never waited for, never clamped.

``host.on_host`` is switched off, so that CPU tensors take the way of CUDA tensors.
"""

import pytest
import torch

from dpo_fast.functional import FusedLinearDPOLoss, fused_linear_dpo, host, linear_logprobs
from dpo_fast.functional.masked import mask_targets
from tests.functional.cases import LENGTHS, SigmoidLoss, borders, gradients, make_case

NAN = float("nan")


@pytest.fixture(params=["cpu", "chunked", "triton"])
def unknown(request, monkeypatch):
    """Values are on a device; returns the backend that runs."""
    from dpo_fast.backends import cpu_refusal, triton_refusal

    refusal = {"cpu": cpu_refusal, "triton": triton_refusal}.get(request.param, lambda *_: None)
    why = refusal("cpu", torch.float32)
    if why is not None:
        pytest.skip(f"{request.param}: {why}")
    monkeypatch.setattr(host, "on_host", lambda tensor: False)
    return request.param


def known(function, *args, **kwargs):
    """The same call with values that the host knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "on_host", lambda tensor: True)
        return function(*args, **kwargs)


def test_mask_targets():
    masked = mask_targets(torch.tensor([3, -100, -1, 7, 2**40, 0]), 7, -100)
    assert masked.target.tolist() == [3, 0, 0, 0, 0, 0]
    assert masked.counts.tolist() == [True, False, False, False, False, True]
    torch.testing.assert_close(
        masked.fill, torch.tensor([NAN, 0.0, NAN, NAN, NAN, NAN]), equal_nan=True
    )
    assert masked.values(torch.ones(6, dtype=torch.bool)).tolist() == masked.counts.tolist()


def test_out_of_range_is_nan_and_ignored_is_zero(unknown):
    case = make_case(12, 16, 53)
    with torch.no_grad():
        case.hidden[4] = NAN  # ignored: may hold anything
    case.target[[1, 4, 6, 9]] = torch.tensor([-1, -100, 53, 2**40])
    names = ("entropy", "is_top1")
    found = linear_logprobs(case.hidden, case.weight, case.target, backend=unknown, outputs=names)
    assert found.logps.isnan().nonzero().flatten().tolist() == [1, 6, 9]
    assert found.logps[4] == 0 and found.entropy[4] == 0
    assert not found.is_top1[[1, 4, 6, 9]].any()
    dhidden, dweight = torch.autograd.grad(found.logps.nan_to_num().sum(), case.leaves().values())
    assert torch.isfinite(dweight).all() and (dhidden[[1, 4, 6, 9]] == 0).all()
    case.target[[1, 6, 9]] = -100
    right = known(linear_logprobs, case.hidden, case.weight, case.target, backend=unknown)
    keep = torch.tensor([0, 2, 3, 5, 7, 8, 10, 11])
    torch.testing.assert_close(found.logps[keep], right[keep], rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(right.sum(), case.weight)[0]
    assert right[keep].norm() > 1e-2 and expected.norm() > 1e-2  # zeros would not pass
    torch.testing.assert_close(dweight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workspace", [None, 64 * 4 * 12], ids=["one group", "groups"])
def test_fused_loss_masks_whatever_ignored_rows_hold(unknown, workspace):
    case = make_case(sum(LENGTHS), 16, 53)
    case.target[[2, 11, 30]] = -100
    reference = torch.randn(sum(LENGTHS), 16)
    with torch.no_grad():
        case.hidden[11], reference[2] = NAN, torch.inf
    args = (case.hidden, case.weight, case.target, borders())
    options = {
        "ref_hidden": reference, "loss": SigmoidLoss(), "backend": unknown,
        "seq_lens": LENGTHS, "outputs": ("entropy",),
    }  # fmt: skip
    ours = fused_linear_dpo(*args, workspace=workspace, **options)
    right = known(fused_linear_dpo, *args, workspace=workspace, **options)
    for name in ("loss", "losses", "logps", "ref_logps"):
        torch.testing.assert_close(getattr(ours, name), getattr(right, name), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.token_stats, right.token_stats, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    expected = gradients(right.loss, case)
    for name, grad in gradients(ours.loss, case).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)
    case.target[5] = 53
    assert fused_linear_dpo(*args, **options).loss.isnan()


@pytest.mark.parametrize("compact", [False, True])
def test_liger_s_class_over_padded_rows(unknown, compact):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(53, 16, generator=g).requires_grad_()
    hidden, reference = (torch.randn(4, 9, 16, generator=g) for _ in range(2))
    labels = torch.randint(53, (4, 9), generator=g)
    labels[0, 5:], labels[2, :3], labels[3] = -100, -100, -100
    loss_of = FusedLinearDPOLoss(backend=unknown, compact=compact, average_log_prob=True)
    ours = loss_of(weight, hidden, labels, ref_input=reference)[0]
    right = known(loss_of, weight, hidden, labels, ref_input=reference)[0]
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, weight)[0] for loss in (ours, right)), rtol=1e-5, atol=1e-6
    )


def test_check_by_environment_raises_with_the_value(unknown, monkeypatch):
    monkeypatch.setenv("DPO_FAST_CHECK", "1")
    case = make_case(12, 16, 53)
    case.target[7] = -5
    with pytest.raises(ValueError, match=r"target\[7\] = -5 is outside"):
        linear_logprobs(case.hidden, case.weight, case.target, backend=unknown)
    case.target[7] = 5
    cu = torch.tensor([0, 7, 3, 12, 12])
    with pytest.raises(ValueError, match="never decrease"):
        fused_linear_dpo(
            case.hidden, case.weight, case.target, cu, ref_logps=torch.zeros(4),
            loss=SigmoidLoss(), backend=unknown,
        )  # fmt: skip
