"""Attention functions against a dense mask, and what they refuse.

Legend: L tokens, D head size, Hq and Hkv heads of queries and of keys.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpo_fast.layouts import Segment, Segments, segment_attention_in
from dpo_fast.layouts.attention import (
    UnsupportedAttention,
    choose_backend,
    implementation_name,
    segment_attention,
)
from dpo_fast.layouts.attention_flex import flex_segments
from dpo_fast.layouts.attention_sdpa import sdpa_segments
from dpo_fast.layouts.attention_varlen import flash_attn_segments, varlen_segments
from dpo_fast.layouts.backend_check import _compare
from tests.layouts.brute import dense_attention, segment_rows, visible
from tests.tiny import tiny_model

ROW = Segments([Segment(0, 200), Segment(200, 90, 0, 130), Segment(290, 1), Segment(291, 40)])


def draw_qkv(
    length: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64, size: int = 8
):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, n, length, size, generator=generator, dtype=dtype).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]


@settings(max_examples=40)
@given(
    segment_rows(20),
    st.sampled_from([None, 1, 5, 30]),
    st.sampled_from([None, 0.7]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
def test_sdpa_by_segment_is_dense_attention(segments, window, softcap, heads):
    inputs = draw_qkv(segments.length, heads)
    out = sdpa_segments(*inputs, segments, scale=0.4, window=window, softcap=softcap)
    expected = dense_attention(*inputs, visible(segments, window), 0.4, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(out.shape, dtype=out.dtype)
    for ours, gold in zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, gold, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 50])
def test_flex_computes_dense_attention(window, softcap):
    inputs = [x.detach() for x in draw_qkv(ROW.length, (4, 2), torch.float32, 16)]
    out = flex_segments(*inputs, ROW, scale=0.4, window=window, softcap=softcap)
    expected = dense_attention(*inputs, visible(ROW, window), 0.4, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_backend_that_aligns_differently_is_found_out():
    query, _, value = draw_qkv(8, (4, 2), torch.float32)

    def shifted(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **options: Any) -> Tensor:
        spans = [s._replace(prefix_length=max(s.prefix_length - 1, 0)) for s in segments.spans]
        return sdpa_segments(q, k, v, Segments(spans), **options)

    def windowless(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **options: Any) -> Tensor:
        return sdpa_segments(q, k, v, segments, scale=options["scale"])

    def detached(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **options: Any) -> Tensor:
        return sdpa_segments(q, k, v.detach(), segments, **options) + 0 * v.sum()

    assert _compare(sdpa_segments, query, value, None) is None
    for wrong, what in ((shifted, "output"), (windowless, "window 24"), (detached, "dv")):
        assert what in str(_compare(wrong, query, value, None))


def attend(module: nn.Module | None = None, segments: Segments = ROW, **kwargs: Any) -> Tensor:
    inputs = draw_qkv(segments.length, (4, 2))
    module = module or nn.Identity()
    return segment_attention(module, *inputs, None, pair_segments=segments, **kwargs)[0]


def test_unknown_arguments_are_refused_by_name():
    attend(position_ids=torch.zeros(1), use_cache=False, output_attentions=None)
    for name, value in (
        ("s_aux", torch.zeros(4)),
        ("position_bias", torch.zeros(1)),
        ("output_attentions", True),
        ("cu_seq_lens_q", torch.zeros(2)),
        ("head_mask", torch.ones(4)),
    ):
        with pytest.raises(UnsupportedAttention, match=name):
            attend(**{name: value})
    with pytest.raises(UnsupportedAttention, match="not causal"):
        attend(is_causal=False)
    module = nn.Identity()
    module.is_causal = False
    with pytest.raises(UnsupportedAttention, match="not causal"):
        attend(module)


def test_windows_that_contradict_the_layer_type_are_refused():
    class Config:
        layer_types = ("full_attention", "sliding_attention")

    module = nn.Identity()
    module.config, module.layer_idx = Config(), 0
    attend(module)
    with pytest.raises(UnsupportedAttention, match="sliding_window=5"):
        attend(module, sliding_window=5)
    module.layer_idx = 1
    attend(module, sliding_window=5)
    with pytest.raises(UnsupportedAttention, match="sliding_attention"):
        attend(module)


def test_segments_of_another_row_are_refused():
    inputs = draw_qkv(5, (2, 2))
    with pytest.raises(ValueError, match="do not belong"):
        segment_attention(nn.Identity(), *inputs, None, pair_segments=ROW)


def test_a_backend_asked_for_by_name_runs_or_raises():
    query, _, value = draw_qkv(5, (2, 2), torch.float32)
    for name, why in (("varlen", "CUDA"), ("flash_attn", "flash-attn|CUDA"), ("flex", "backward")):
        with pytest.raises(ValueError, match=why):
            choose_backend(name, query, value, None, 0.0)
    assert choose_backend("auto", query, value, None, 0.0).func is sdpa_segments
    with pytest.raises(ValueError, match="unknown"):
        implementation_name("fastest")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_padded_rows_and_generation_go_on_working(family):
    """Without segments the implementation is the family's own attention, to rounding."""
    overrides: dict[str, dict[str, Any]] = {
        "gemma2": {"sliding_window": 8, "attn_implementation": "eager"},
        "mistral": {"sliding_window": 8},
    }
    model = tiny_model(family, **overrides.get(family, {}))
    before = model.config._attn_implementation
    ids = torch.randint(1, 300, (3, 20))
    mask = (torch.arange(20) < torch.tensor([20, 11, 5])[:, None]).long()
    expected = model(input_ids=ids, attention_mask=mask).logits
    text = model.generate(ids[:1], max_new_tokens=12, do_sample=False)
    with segment_attention_in(model, None):
        assert model.config._attn_implementation == "dpo_fast" != before
        with segment_attention_in(model):  # nested: nothing to do
            found = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model.generate(ids[:1], max_new_tokens=12, do_sample=False), text)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before


def test_the_implementation_is_restored_after_an_error():
    model, other = tiny_model("llama"), tiny_model("gemma2")
    before = [m.config._attn_implementation for m in (model, other)]
    with pytest.raises(KeyError), segment_attention_in(model, other, backend="sdpa"):
        assert other.config._attn_implementation == "dpo_fast_by_segment"
        raise KeyError
    assert [m.config._attn_implementation for m in (model, other)] == before


def test_the_implementation_is_not_saved(tmp_path):
    model = tiny_model("llama")
    with segment_attention_in(model):
        model.save_pretrained(tmp_path)
    assert "dpo_fast" not in (tmp_path / "config.json").read_text()


def test_import_is_free():
    code = (
        "import sys, torch, dpo_fast.layouts; "
        "bad = [m for m in ('transformers', 'triton', 'datasets', 'peft', 'torch._dynamo') "
        "if m in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name", ["varlen", "flash_attn", "flex"])
def test_gpu_backends_equal_dense_attention(name, window):
    inputs = [
        x.detach().to("cuda", torch.bfloat16).requires_grad_()
        for x in draw_qkv(ROW.length, (4, 2), torch.float32, 64)
    ]
    run = {"varlen": varlen_segments, "flash_attn": flash_attn_segments, "flex": flex_segments}
    try:
        choose_backend(name, inputs[0], inputs[2], None, 0.0)
    except ValueError as error:
        if "not installed" in str(error) or "has no torch.nn" in str(error):
            pytest.skip(str(error))
        raise
    out = run[name](*inputs, ROW, scale=0.125, window=window)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    gold = dense_attention(*wide, visible(ROW, window).cuda(), 0.125)
    upstream = torch.randn_like(gold)
    eager = sdpa_segments(*inputs, ROW, scale=0.125, window=window)
    wanted = [gold, *torch.autograd.grad(gold, wide, upstream)]
    ours = [out, *torch.autograd.grad(out, inputs, upstream.to(out))]
    theirs = [eager, *torch.autograd.grad(eager, inputs, upstream.to(eager))]
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        assert float((a - c).norm()) <= 2 * float((b - c).norm()) + 1e-3 * float(c.norm())


@pytest.mark.gpu
def test_flex_on_a_gpu_has_soft_caps_and_fp32():
    inputs = [x.detach().cuda() for x in draw_qkv(ROW.length, (4, 2), torch.float32, 64)]
    out = flex_segments(*inputs, ROW, scale=0.125, window=50, softcap=0.7)
    expected = dense_attention(*inputs, visible(ROW, 50).cuda(), 0.125, 0.7)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_masks_are_built_without_a_host_sync():
    inputs = [
        x.detach().to("cuda", torch.bfloat16)
        for x in draw_qkv(ROW.length, (4, 2), torch.float32, 64)
    ]
    attend = choose_backend("auto", inputs[0], inputs[2], None, 0.0)
    fresh = Segments(ROW.spans)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*inputs, fresh, scale=0.125, window=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
