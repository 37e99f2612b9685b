"""The LM head's kernels against the naive twin: engines, modes, features, shapes; gradients too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.functional.cases import make_case
from tests.kernels.support import HEADS, gold, interpreted, naive, run, small_case
from tests.tolerances import assert_three_way, relative_error

pytestmark = interpreted

MODES = {
    "stored": {},
    "recomputed": {"store": False},
    "frozen": {"frozen": True},
}


def compare(case, engine, **options):
    dtype = case.hidden.dtype
    ours = run(case, engine, **options)
    eager, right = naive(case), gold(case)
    assert ours.logps.dtype == torch.float32
    assert_three_way(ours.logps, eager.logps, right.logps, dtype, "logps")
    wanted = {"hidden", "lora_a"} if options.get("frozen") else set(right.grads)
    assert set(ours.grads) == wanted & set(right.grads)
    for name, grad in ours.grads.items():
        if dtype == torch.float16:  # E and v X are rounded apart; eager rounds their product once
            assert relative_error(grad, right.grads[name]) < 1e-3, name
        else:
            assert_three_way(grad, eager.grads[name], right.grads[name], dtype, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_float32(engine, head, mode):
    compare(small_case(head), engine, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_float16_logits_with_the_rows_maximum(head, mode):
    compare(small_case(head, torch.float16), "cublas", **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_float16_inputs_of_the_exp_gemm(mode):
    compare(small_case("all", torch.float16), "triton", e_dtype=torch.float32, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_e_rounded_to_bfloat16(head, mode):
    case = small_case(head)
    ours, right = run(case, "triton", e_dtype=torch.bfloat16, **MODES[mode]), gold(case)
    assert relative_error(ours.logps, right.logps) < 1e-6
    for name, grad in ours.grads.items():
        assert 1e-5 < relative_error(grad, right.grads[name]) < 4e-3, name


@pytest.mark.parametrize(
    ("rows", "width", "vocab"),
    [(1, 1, 1), (1, 7, 2), (2, 3, 17), (17, 31, 127), (3, 8, 1031), (35, 5, 16), (16, 16, 64)],
)
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_odd_shapes(engine, rows, width, vocab):
    for options in MODES.values():
        compare(make_case(rows, width, vocab), engine, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_no_rows(engine, mode):
    ours = run(small_case("all", rows=0), engine, stats=True, **MODES[mode])
    assert ours.logps.shape == (0,)
    for name, grad in ours.grads.items():
        assert (grad == 0).all(), name
    if mode != "frozen":
        assert ours.grads["weight"].shape == (67, 24)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_statistics(engine, head):
    case = small_case(head)
    ours, eager, right = (
        run(case, engine, stats=True),
        naive(case, stats=True),
        gold(case, stats=True),
    )
    assert_three_way(ours.logps, eager.logps, right.logps, torch.float32, "logps")
    for name, values in ours.stats.items():
        if name == "is_top1":
            assert torch.equal(values != 0, right.stats[name])
        else:
            torch.testing.assert_close(
                values.double(), right.stats[name], rtol=1e-5, atol=1.5e-5, msg=name
            )
    assert ours.stats["is_top1"].any() and not ours.stats["is_top1"].all()
    assert ("mean_logit" in ours.stats) == ("softcap" in case.kwargs)


@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_ties_go_to_the_lowest_index(engine):
    case = make_case(6, 8, 40)
    with torch.no_grad():
        case.weight[7] = case.weight[21] = case.weight[33] = 3 * case.hidden[0]
        case.hidden[1:] = case.hidden[0]
        case.target.copy_(torch.tensor([7, 21, 33, 0, 7, 21]))
    found = run(case, engine, stats=True).stats["is_top1"]
    assert found.tolist() == [1, 0, 0, 0, 1, 0]


def test_groups_of_rows_under_a_frozen_head(monkeypatch):
    from dpo_fast_kernels import head as kernels

    monkeypatch.setattr(kernels, "GROUP_BYTES", 128 * 4 * 5)  # five rows of E at a time
    compare(small_case("all"), "triton", frozen=True)


@given(st.integers(1, 40_000), st.integers(1, 2**23))
def test_groups_are_even_whole_tiles_within_the_limit(rows, row_bytes):
    from dpo_fast_kernels.head import GROUP_BYTES, ROW_TILE, group_rows

    size = group_rows(rows, row_bytes)
    assert 1 <= size <= max(1, GROUP_BYTES // row_bytes)
    if size < rows:
        assert size % ROW_TILE == 0 or GROUP_BYTES // row_bytes < ROW_TILE
        last = rows - (-(-rows // size) - 1) * size
        assert 0 < last <= size


def test_literal_groups():
    from dpo_fast_kernels.head import group_rows

    assert group_rows(8192, 128256 * 2) == 2048
    assert group_rows(8192, 152064 * 2) == 1664
    assert group_rows(8192, 128256 * 2, 2**40) == 4096
    assert group_rows(8192, 128256 * 2, 2**20) == 2048
    assert group_rows(500, 128256 * 2) == 500


def test_slabs_grow_with_what_is_to_spare():
    from dpo_fast_kernels.recompute import slab_columns

    assert slab_columns(8192, 128256, 4096, 2, 0) == 2048
    assert slab_columns(8192, 128256, 4096, 2, 2**40) == 8192
    assert slab_columns(8192, 128256, 4096, 2, 2**27) == 4096
    assert slab_columns(512, 1000, 4096, 2, 2**40) == 1000


@pytest.mark.parametrize("spare", [0, 33 * (7 * 4 + 4 * 24), 2**40])
def test_wider_slabs_give_the_same(spare, monkeypatch):
    from dpo_fast_kernels import recompute

    monkeypatch.setattr(recompute, "SLAB_COLUMNS", 16)
    monkeypatch.setattr(recompute, "SLAB_ROWS", 7)
    compare(small_case("all"), "triton", store=False, spare=spare)


def test_slabs_and_blocks_of_the_recomputing_backward(monkeypatch):
    from dpo_fast_kernels import engine, recompute

    monkeypatch.setattr(recompute, "SLAB_COLUMNS", 32)
    monkeypatch.setattr(recompute, "SLAB_ROWS", 7)
    monkeypatch.setattr(engine, "LOGITS_BYTES", 4 * 32 * 3)
    compare(small_case("all"), "triton", store=False)
    compare(small_case("all"), "cublas", store=False)
    compare(small_case("all", torch.float16), "cublas", store=False)


def test_blocks_of_rows_in_the_forward(monkeypatch):
    from dpo_fast_kernels import scoring

    whole = run(small_case("all"), "triton", stats=True)
    monkeypatch.setattr(scoring, "ROW_BLOCK", 7)
    split = run(small_case("all"), "triton", stats=True)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_tma_alignment():
    from dpo_fast_kernels.operands import aligned

    for width, expected in ((24, True), (23, False)):
        case = make_case(9, width, 67)
        assert aligned(case.hidden.detach()) == aligned(case.weight.detach()) == expected
    plain = make_case(9, 24, 67)
    strided = make_case(9, 24, 67)
    strided.hidden = torch.empty(24, 9).T.copy_(plain.hidden.detach()).requires_grad_()
    strided.weight = torch.empty(67, 40)[:, 3:27].copy_(plain.weight.detach()).requires_grad_()
    assert not aligned(strided.hidden.detach())
    ours, right = run(strided, "triton"), run(plain, "triton")
    torch.testing.assert_close(ours.logps, right.logps, rtol=1e-6, atol=1e-6)
    for name, grad in ours.grads.items():
        torch.testing.assert_close(grad, right.grads[name], rtol=1e-5, atol=1e-6)


def test_low_rank_tail_is_exact_in_sixteen_bits():
    from dpo_fast_kernels.operands import low_rank_tail

    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=g).bfloat16()
    a = torch.randn(5, 32, generator=g)
    for b in (torch.randn(50, 5, generator=g), torch.randn(50, 5, generator=g).bfloat16()):
        bias = torch.randn(50, generator=g)
        tail_x, tail_w, low = low_rank_tail(x, torch.bfloat16, (a, b, 0.5), bias)
        product = 0.5 * (x.double() @ a.double().T) @ b.double().T
        right = product + bias.double()
        found = tail_x.double() @ tail_w.double().T
        assert tail_x.dtype == tail_w.dtype == torch.bfloat16 and tail_x.shape[1] % 16 == 0
        assert relative_error(found, right) < 2e-5
        assert relative_error(low.bfloat16().double() @ b.double().T, product) > 1e-3  # unsplit
    bias[3] = -torch.inf
    tail_x, tail_w, _ = low_rank_tail(x, torch.bfloat16, None, bias)
    found = tail_x.double() @ tail_w.double().T
    torch.testing.assert_close(found, bias.double().expand(40, 50), rtol=1e-7, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_to_be_scaled_or_summed_further_are_float32(mode):
    """The fused loss multiplies them once more, ranks add them: both before the one rounding."""
    case = small_case("lora", torch.float16)
    wide = run(case, "cublas", wide=True, **MODES[mode])
    assert {g.dtype for g in wide.grads.values()} == {torch.float32}
    narrow = run(case, "cublas", **MODES[mode])
    assert narrow.grads["hidden"].dtype == torch.float16
    assert torch.equal(narrow.grads["hidden"], wide.grads["hidden"].half())


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
@pytest.mark.parametrize("store", [True, False], ids=["stored", "recomputed"])
def test_float16_head_gradients_neither_underflow_nor_overflow(store, size):
    """v X alone would leave float16's range; the head's gradients may be float32."""
    case = small_case("lora", torch.float16)
    upstream = torch.full((19,), size)
    ours, right = (
        run(case, "cublas", store=store, upstream=upstream, wide=True),
        gold(case, upstream=upstream),
    )
    for name in ("weight", "lora_b"):
        assert ours.grads[name].dtype == torch.float32
        assert relative_error(ours.grads[name], right.grads[name]) < 1e-3, name
