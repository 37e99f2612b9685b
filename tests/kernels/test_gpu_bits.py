"""Bits on a GPU: what must agree exactly, between kernels, variants, batches and runs."""

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from tests.kernels.test_gpu_head import make

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [1024, 1023], ids=["tma", "pointers"])
def test_target_logit_has_the_bits_of_the_gemm(width):
    """k = zy and a scale of 2^20 make E of the target's own column exactly 1 if the bits agree."""
    from dpo_fast_kernels.exp_gemm import exp_gemm
    from dpo_fast_kernels.operands import make_operands, plan_launch
    from dpo_fast_kernels.problem import new_e
    from dpo_fast_kernels.target_logit import target_logits

    leaves, target, _ = make(1000, width, 9001, rank=8, bias=True)
    tensors = {k: v.detach() for k, v in leaves.items()}
    for lora in (None, (tensors["a"], tensors["b"], 0.5)):
        for stats in (False, True):
            operands, _ = make_operands(
                tensors["hidden"], tensors["weight"], None if lora is None else tensors["bias"],
                lora, None, 2.0**20,
            )  # fmt: skip
            launch = plan_launch(operands, stats)
            options = dict(ignore_index=-100, vocab_start=0, vocab_total=9001)
            rows = target_logits(operands, launch, target, **options)
            e = new_e(1000, 9001, torch.bfloat16, target, None)
            elsewhere = torch.full_like(rows.col, -1)
            open_rows = rows._replace(k=rows.zy, col=elsewhere)
            exp_gemm(operands, launch, open_rows, e=e, stats=stats)
            own = e.gather(1, target[:, None])[:, 0]
            assert (own == 1.0).all(), f"{int((own != 1).sum())} of 1000 rows differ"


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_log_ratio_of_equal_models_is_zero_in_bits(softcap):
    leaves, target, _ = make(1000, 512, 32001)
    hidden, weight = leaves["hidden"], leaves["weight"]
    options = dict(backend="triton", softcap=softcap)
    with torch.no_grad():
        alone = linear_logprobs(hidden, weight, target, **options)
        stats = linear_logprobs(hidden, weight, target, outputs=("entropy",), **options).logps
    stored = linear_logprobs(hidden, weight, target, mode="store", **options)
    assert torch.equal(alone, stored) and torch.equal(alone, stats)
    part = linear_logprobs(hidden[300:500], weight, target[300:500], **options)
    assert torch.equal(part, alone[300:500])  # a row's bits do not depend on its batch


@pytest.mark.parametrize("mode", ["store", "min-memory"])
def test_two_runs_agree_bit_for_bit(mode):
    leaves, target, _ = make(2000, 1024, 50257)
    leaves = [leaves["hidden"], leaves["weight"]]
    upstream = torch.randn(2000, device="cuda")

    def run():
        logps = linear_logprobs(*leaves, target, backend="triton", mode=mode)
        return logps.detach(), *torch.autograd.grad(logps, leaves, upstream)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
