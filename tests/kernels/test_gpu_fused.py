"""The fused loss on a GPU: groups, references, the masked rows."""

import pytest
import torch

from dpo_fast.functional import fused_linear_dpo
from tests.functional.cases import SigmoidLoss
from tests.kernels.test_gpu_head import make
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu


def test_fused_dpo_in_groups():
    leaves, target, _ = make(4000, 512, 32001)
    borders = torch.tensor([0, 700, 1000, 2000, 2100, 3000, 4000], device="cuda")
    lens = borders.diff().tolist()
    args = (leaves["hidden"], leaves["weight"], target, borders)
    reference = (leaves["hidden"].detach() + 0.1).bfloat16()
    both = [leaves["hidden"], leaves["weight"]]

    def run(backend, workspace=None):
        out = fused_linear_dpo(
            *args, ref_hidden=reference, loss=SigmoidLoss(), seq_lens=lens, backend=backend,
            workspace=workspace,
        )  # fmt: skip
        return out, torch.autograd.grad(out.loss * 3, both)

    exact, expected = run("naive")
    for workspace in (None, 2 * 32064 * 1500):
        found, grads = run("triton", workspace)
        torch.testing.assert_close(found.logps, exact.logps, rtol=1e-3, atol=2.0)  # naive: bf16
        for a, b in zip(grads, expected, strict=True):
            assert relative_error(a, b) < 3e-2  # the naive twin's own bfloat16 logits
    same = fused_linear_dpo(
        *args, ref_hidden=leaves["hidden"].detach(), loss=SigmoidLoss(), seq_lens=lens,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(same.logps, same.ref_logps)
    torch.testing.assert_close(same.losses, torch.full_like(same.losses, 0.6931471805599453))


def test_masked_rows_may_hold_anything():
    leaves, target, _ = make(600, 256, 8001)
    with torch.no_grad():
        leaves["hidden"][[7, 300]] = torch.nan
    target[[7, 300]] = -100
    borders = torch.tensor([0, 150, 300, 450, 600], device="cuda")
    out = fused_linear_dpo(
        leaves["hidden"], leaves["weight"], target, borders, loss=SigmoidLoss(), backend="triton",
        ref_logps=torch.zeros(4, device="cuda"),
    )  # fmt: skip
    dhidden, dweight = torch.autograd.grad(out.loss, [leaves["hidden"], leaves["weight"]])
    assert torch.isfinite(dweight).all() and (dhidden[[7, 300]] == 0).all()
    keep = torch.ones(600, dtype=torch.bool, device="cuda")
    keep[[7, 300]] = False
    lens = torch.tensor([0, 149, 299, 448, 598], device="cuda")
    part = [leaves["hidden"].detach()[keep].requires_grad_(), leaves["weight"]]
    alone = fused_linear_dpo(
        *part, target[keep], lens, ref_logps=torch.zeros(4, device="cuda"), loss=SigmoidLoss(),
        backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(out.logps, alone.logps, rtol=1e-6, atol=1e-5)
    right = torch.autograd.grad(alone.loss, part)
    assert relative_error(dhidden[keep], right[0]) < 3e-3
    assert relative_error(dweight, right[1]) < 3e-3


def two_pairs():
    leaves, target, _ = make(600, 256, 8001)
    borders = torch.tensor([0, 150, 300, 450, 600], device="cuda")
    return [leaves["hidden"], leaves["weight"]], (target, borders)


def fused(leaves, rows, workspace):
    return fused_linear_dpo(
        *leaves, *rows, ref_logps=torch.zeros(4, device="cuda"), loss=SigmoidLoss(),
        backend="triton", workspace=workspace, seq_lens=[150] * 4,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_upstream_gradient_of_several_groups_is_rounded_once(factor):
    leaves, rows = two_pairs()
    out = fused(leaves, rows, 2 * 8064 * 300)
    whole = [t.clone() for t in out.loss.grad_fn.saved_tensors if t is not None]
    grads = torch.autograd.grad(out.loss * factor, leaves)
    for grad, wide in zip(grads, whole, strict=True):
        assert grad.dtype == torch.bfloat16 and wide.dtype == torch.float32
        assert torch.equal(grad, (wide * torch.tensor(factor, device="cuda")).bfloat16())


def test_one_group_takes_its_gradients_in_the_backward():
    """Scaled before the product: nothing of the head's size in float32, and the same bits again."""
    leaves, rows = two_pairs()
    out = fused(leaves, rows, None)
    head = leaves[1].numel()
    kept = [t for t in out.loss.grad_fn.saved_tensors if t is not None]
    assert all(t.numel() < head or t.dtype == torch.bfloat16 for t in kept)
    once, again, quarter = (
        torch.autograd.grad(out.loss * factor, leaves, retain_graph=True)
        for factor in (1.0, 1.0, 0.25)
    )
    several = torch.autograd.grad(fused(leaves, rows, 2 * 8064 * 300).loss, leaves)
    for a, b, c, d in zip(once, again, quarter, several, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b) and torch.equal(a * 0.25, c)
        assert relative_error(a, d) < 3e-3  # two roundings to bfloat16 apart
