"""The C++ attention of packed rows: against dense attention, and what it refuses.

Legend: L tokens, D head size, Hq and Hkv heads of queries and of keys.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_fast.backends.compiled import compiled
from dpo_fast.layouts import Segment, Segments
from dpo_fast.layouts.attention import choose_backend
from dpo_fast.layouts.attention_compiled import compiled_segments, why_not_compiled
from dpo_fast.layouts.attention_sdpa import sdpa_segments
from tests.layouts.brute import dense_attention, segment_rows, visible

HEADS = [(2, 2), (4, 2), (3, 1)]
LONG = Segments([Segment(0, 200), Segment(200, 90, 0, 130), Segment(290, 1), Segment(291, 140)])


@pytest.fixture(autouse=True)
def _processor() -> None:
    query = torch.zeros(1, 1, 1, 32)
    reason = why_not_compiled(query, query, None, 0.0)
    if reason is not None:
        pytest.skip(f"C++ attention: {reason}")


def draw(
    length: int, heads: tuple[int, int], size: int = 32, value_size: int | None = None
) -> list[Tensor]:
    """float64, ``[1, H, L, D]`` as transformers makes them: views of ``[1, L, H, D]``."""
    generator = torch.Generator().manual_seed(length)
    sizes = zip((heads[0], heads[1], heads[1]), (size, size, value_size or size), strict=True)
    return [
        torch.randn(1, length, n, d, generator=generator, dtype=torch.float64).transpose(1, 2)
        for n, d in sizes
    ]


def run(
    attend: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype, **how: Any
) -> list[Tensor]:
    """Output and gradients, float64, for a fixed upstream gradient."""
    at = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = attend(*at, **how)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, at, upstream))]


def assert_near(ours: Sequence[Tensor], gold: Sequence[Tensor], tolerance: float) -> None:
    for name, mine, exact in zip(("out", "dq", "dk", "dv"), ours, gold, strict=True):
        bound = tolerance * float(exact.abs().max().clamp(min=1.0))
        assert float((mine - exact).abs().max()) <= bound, name


@settings(max_examples=60, deadline=None)
@given(
    segment_rows(120),
    st.sampled_from([None, 1, 5, 30, 77]),
    st.sampled_from(HEADS),
    st.sampled_from([(16, 16), (32, 48), (64, 64)]),
)
def test_is_dense_attention(
    segments: Segments, window: int | None, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    inputs = draw(segments.length, heads, *sizes)
    ours = run(
        compiled_segments, inputs, torch.float32, segments=segments, scale=0.2, window=window
    )

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, visible(segments, window), 0.2, None)

    assert_near(ours, run(dense, inputs, torch.float64), 2e-5)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_has_the_accuracy_of_the_fused_kernel(window: int | None, spread: float) -> None:
    """``spread``: how sharp the softmax is."""
    inputs = draw(LONG.length, (4, 2), 64)
    how = {"segments": LONG, "scale": 0.125 * spread, "window": window}
    gold = run(sdpa_segments, inputs, torch.float64, **how)
    eager = run(sdpa_segments, inputs, torch.float32, **how)
    ours = run(compiled_segments, inputs, torch.float32, **how)
    for mine, theirs, exact in zip(ours, eager, gold, strict=True):
        allowed = 2 * float((theirs - exact).norm()) + 1e-6 * float(exact.norm())
        assert float((mine - exact).norm()) <= allowed


def test_same_bits_for_any_number_of_threads_and_any_strides() -> None:
    inputs = draw(LONG.length, (4, 2))
    how: dict[str, Any] = {"segments": LONG, "scale": 0.2, "window": None}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(compiled_segments, inputs, torch.float32, **how))
    finally:
        torch.set_num_threads(before)
    results.append(run(compiled_segments, [x.contiguous() for x in inputs], torch.float32, **how))
    scattered = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    results.append(run(compiled_segments, scattered, torch.float32, **how))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_reaches_those_who_see_it_and_no_other_sequence() -> None:
    segments = Segments([Segment(0, 60), Segment(60, 30, 0, 40), Segment(90, 50)])
    query, key, value = (x.float() for x in draw(140, (2, 2)))
    key[0, 0, 30] = torch.nan  # in the prompt, seen by both answers of the first pair
    value[0, 1, 100] = torch.nan
    out = compiled_segments(query, key, value, segments, scale=0.2)
    seen = visible(segments, None)
    bad = ~out.isfinite().all(dim=-1)[0]
    assert torch.equal(bad[:, 0], seen[:, 30])
    assert bool(bad[seen[:, 100], 1].all())
    assert not bool(bad[:90, 1].any())


def test_without_gradients() -> None:
    inputs = [x.float() for x in draw(LONG.length, (4, 2))]
    expected = sdpa_segments(*inputs, LONG, scale=0.2)
    with torch.inference_mode():
        out = compiled_segments(*inputs, LONG, scale=0.2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_what_it_refuses_by_name_and_where_auto_passes_it_over() -> None:
    query = torch.zeros(1, 2, 5, 32)
    assert choose_backend("auto", query, query, None, 0.0) is compiled_segments
    for dtype, size, softcap, dropout, why in (
        (torch.bfloat16, 32, None, 0.0, "float32"),
        (torch.float32, 32, 0.7, 0.0, "soft cap"),
        (torch.float32, 32, None, 0.1, "dropout"),
        (torch.float32, 24, None, 0.0, "multiples of 16"),
    ):
        one = torch.zeros(1, 2, 5, size, dtype=dtype)
        with pytest.raises(ValueError, match=why):
            choose_backend("compiled", one, one, softcap, dropout)
        chosen: Any = choose_backend("auto", one, one, softcap, dropout)
        assert chosen.func is sdpa_segments


def test_a_value_of_another_type_is_not_read_as_float32() -> None:
    """Under autocast rotated queries and keys are float32, and values are bfloat16."""
    query, key, value = (x.float() for x in draw(LONG.length, (4, 2)))
    assert choose_backend("auto", query, value, None, 0.0) is compiled_segments
    chosen: Any = choose_backend("auto", query, value.bfloat16(), None, 0.0)
    assert chosen.func is sdpa_segments
    for wrong in ((query.bfloat16(), key, value), (query, key.double(), value)):
        with pytest.raises(TypeError, match="float32"):
            compiled_segments(*wrong, LONG, scale=0.2)
    with pytest.raises(TypeError, match=r"value is torch\.bfloat16"):
        compiled_segments(query, key, value.bfloat16(), LONG, scale=0.2)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([(0, 3, 0, 0)], "cover 3 of 5"),
        ([(0, 3, 0, 0), (4, 1, 0, 0)], "segment 1"),
        ([(0, 3, 0, 0), (3, 2, 0, 4)], "segment 1"),
        ([(0, 3, 0, 0), (3, 2, 1, 1)], "segment 1"),
        ([(0, 5, 0, 1)], "segment 0"),
    ],
)
def test_tables_that_are_no_segments_raise(rows: list[tuple[int, ...]], why: str) -> None:
    module: Any = compiled()
    table, x = torch.tensor(rows), torch.zeros(5, 16)
    view = (x.data_ptr(), 16, 16)
    sizes = {"query_heads": 1, "kv_heads": 1, "length": 5, "size": 16, "value_size": 16}
    with pytest.raises(ValueError, match=why):
        module.Attention(
            *(view, view, view), **sizes, segments=table.data_ptr(), num_segments=len(rows),
            scale=1.0, window=0, num_threads=1,
        )  # fmt: skip
