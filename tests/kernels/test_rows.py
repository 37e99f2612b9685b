"""The small kernels around the GEMMs against torch: reductions, row scaling, segment sums."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.naive import naive_segment_sum
from tests.kernels.support import interpreted

pytestmark = interpreted


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 63, 33), (5, 130, 70)])
@pytest.mark.parametrize("maximum", [False, True])
def test_reduce_tiles(shape, maximum):
    from dpo_fast_kernels.rows import reduce_tiles

    part = torch.randn(shape)
    out = torch.full((shape[0], shape[2]), torch.nan)
    reduce_tiles(part, out, maximum=maximum, programs=3)
    right = part.amax(1) if maximum else part.double().sum(1).float()
    torch.testing.assert_close(out, right)


def test_reduce_tiles_of_some_rows():
    from dpo_fast_kernels.rows import reduce_tiles

    part = torch.randn(2, 9, 80)
    index = torch.randperm(80)[:50].int()
    rows = torch.cat((index, torch.full((30,), -7, dtype=torch.int32)))
    out = torch.full((2, 80), -1.0)
    count = torch.tensor([50], dtype=torch.int32)
    reduce_tiles(part, out, index=rows, count=count, programs=2)
    right = torch.full((2, 80), -1.0)
    right[:, index.long()] = part.sum(1)[:, :50]
    torch.testing.assert_close(out, right)


@given(st.lists(st.sampled_from([0, 0, 1, 2, 7, 511, 512, 513, 1300]), max_size=7))
def test_segment_sum(lengths):
    from dpo_fast_kernels.segment import segment_sum

    g = torch.Generator().manual_seed(len(lengths))
    values = torch.randn(sum(lengths), generator=g).requires_grad_()
    borders = torch.tensor([0, *accumulate(lengths)])
    found = segment_sum(values, borders)
    right = naive_segment_sum(values.double(), borders)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, rtol=1e-7, atol=1e-30)
    upstream = torch.randn(len(lengths), generator=g)
    if lengths:
        (grad,) = torch.autograd.grad(found, values, upstream)
        lens = torch.tensor(lengths)
        assert torch.equal(grad, upstream.repeat_interleave(lens))


def test_segment_sum_does_not_depend_on_the_place_in_the_batch():
    from dpo_fast_kernels.segment import segment_sum

    values = torch.randn(1000)
    alone = segment_sum(values, torch.tensor([0, 1000]))
    batch = segment_sum(
        torch.cat((torch.randn(37), values, torch.randn(5))), torch.tensor([0, 37, 1037, 1042])
    )
    assert torch.equal(alone[0], batch[1])


@pytest.mark.parametrize("shape", [(1, 1), (17, 130), (33, 257)])
def test_row_scale(shape):
    from dpo_fast_kernels.row_scale import row_scale

    n, h = shape
    c, s = torch.randn(n), torch.rand(n) + 0.5
    g, x = torch.randn(n, h), torch.randn(h, n).T
    dx, xs, v = row_scale(c, s, 0.7, g=g, x=x, dtype=torch.float32)
    right = (-c.double() * 0.7 / s.double()).unsqueeze(1)
    torch.testing.assert_close(v.double(), right[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(dx.double(), right * g.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(xs.double(), right * x.double(), rtol=1e-6, atol=0)
    unit = torch.tensor([1024.0])
    _, big, _ = row_scale(c, s, 0.7, x=x, dtype=torch.float32, unit=unit)
    assert torch.equal(big, xs * 1024)
    assert row_scale(c, s, 0.7, g=g, dtype=torch.float16)[1] is None


def test_row_scale_of_rows_without_weight_ignores_what_they_hold():
    from dpo_fast_kernels.row_scale import row_scale

    c, s = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, torch.inf, torch.nan])
    g = torch.full((3, 5), torch.nan)
    dx, _, v = row_scale(c, s, 1.0, g=g, dtype=torch.float32)
    assert (dx[:2] == 0).all() and dx[2].isnan().all() and v[2].isnan()


@pytest.mark.parametrize(("n", "width"), [(1, 1), (40, 200), (33, 128)])
def test_column_sum_adds_to_what_is_there(n, width):
    from dpo_fast_kernels.row_scale import column_sum

    e = torch.randn(n, width + 9)[:, :width]
    v, out = torch.randn(n), torch.randn(width)
    right = out.double() + e.double().T @ v.double()
    column_sum(e, v, out)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)


def test_gather_axpy_and_target_fix_touch_their_own_entries_only():
    from dpo_fast_kernels.row_scale import gather_axpy, target_fix

    col = torch.tensor([0, 6, -1, -2, -3, 7, 3], dtype=torch.int32)  # 7 columns here: 0 .. 6
    table, delta = torch.randn(7, 150), torch.randn(7)
    out = torch.randn(7, 150)
    right = out.clone()
    for row, column in enumerate(col.tolist()):
        if 0 <= column < 7:
            right[row] += delta[row] * table[column]
    gather_axpy(out, table, delta, col)
    torch.testing.assert_close(out, right)

    e = torch.full((7, 9), 5.0)[:, :4]  # columns 3 .. 6 of the vocabulary
    target_fix(e, delta, col, 3)
    right = torch.full((7, 4), 5.0)
    right[1, 3], right[6, 0] = delta[1], delta[6]
    assert torch.equal(e, right)
    assert (e.as_strided((7, 9), (9, 1))[:, 4:] == 5.0).all()
