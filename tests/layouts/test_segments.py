"""Segments against brute force: masks, indices of variable-length kernels, block masks."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.layouts import Segment, Segments
from dpo_fast.layouts.block_mask import block_classes, make_block_mask
from dpo_fast.layouts.segments import segment_mask, varlen_index
from tests.layouts.brute import segment_rows, visible

CPU = torch.device("cpu")
windows = st.sampled_from([None, 1, 2, 7, 30])


@given(segment_rows(12), windows)
def test_masks_of_segments_equal_brute_force(segments: Segments, window: int | None) -> None:
    seen = visible(segments, window)
    for span in segments.spans:
        prefix = list(range(span.prefix_start, span.prefix_start + span.prefix_length))
        keys = prefix + list(range(span.start, span.stop))
        mask = segment_mask(span, window, torch.float32, CPU)
        assert torch.equal(mask == 0, seen[span.start : span.stop][:, keys])
        assert bool((mask[mask != 0] == float("-inf")).all())
        others = seen[span.start : span.stop].clone()
        others[:, keys] = False
        assert not others.any()


@given(segment_rows(12))
def test_varlen_index_names_the_keys_in_order(segments: Segments) -> None:
    index = varlen_index(segments, CPU)
    assert index.cu_q.dtype == index.cu_k.dtype == torch.int32
    rows = torch.arange(segments.length) if index.key_index is None else index.key_index
    assert index.cu_q[-1] == segments.length and index.cu_k[-1] == len(rows)
    assert index.max_q == int(index.cu_q.diff().max())
    assert index.max_k == int(index.cu_k.diff().max())
    seen = visible(segments)
    for g, span in enumerate(segments.spans):
        keys = rows[index.cu_k[g] : index.cu_k[g + 1]]
        # A kernel that is causal from the last query and key on sees, at the i-th query, all but
        # the last (length - 1 - i) keys.
        for i in range(span.length):
            at = keys[: len(keys) - (span.length - 1 - i)]
            assert sorted(at.tolist()) == seen[span.start + i].nonzero().squeeze(1).tolist()


def test_index_without_prefixes_gathers_nothing() -> None:
    assert varlen_index(Segments([Segment(0, 3), Segment(3, 2)]), CPU).key_index is None


@settings(max_examples=60)
@given(segment_rows(40), windows, st.sampled_from([4, 8, 16]))
def test_block_classes_equal_brute_force(
    segments: Segments, window: int | None, block: int
) -> None:
    seen = visible(segments, window)
    partial, full = block_classes(segments, window, block)
    for i in range(partial.shape[0]):
        for j in range(partial.shape[1]):
            tile = seen[i * block : (i + 1) * block, j * block : (j + 1) * block]
            assert (full[i, j] or partial[i, j]) == bool(tile.any())
            assert not (full[i, j] and partial[i, j])
            if full[i, j]:  # the mask function is not asked there
                assert tile.shape == (block, block) and bool(tile.all())


def test_blocks_below_the_diagonal_are_full() -> None:
    segments = Segments([Segment(0, 16), Segment(16, 8, 0, 8)])
    partial, full = block_classes(segments, None, 4)
    assert full.sum() == 6 + 4 + 1 and partial.sum() == 6
    assert full[4].tolist() == [True, True, False, False, False, False]
    assert block_classes(segments, 8, 4)[1].sum() == 3 + 1 + 1


@pytest.mark.parametrize("window", [None, 300])
def test_block_mask_is_the_mask(window: int | None) -> None:
    spans = [Segment(0, 384), Segment(384, 200, 0, 256), Segment(584, 3), Segment(587, 40)]
    segments = Segments(spans)
    mask = make_block_mask(segments, window, CPU)
    index = torch.arange(segments.length)
    seen = mask.mask_mod(None, None, index[:, None], index[None, :])
    assert torch.equal(seen, visible(segments, window))
    tiles = torch.zeros(5, 5, dtype=torch.bool)
    for i in range(5):
        for j in range(5):
            tiles[i, j] = seen[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].any()
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles)
    assert mask.full_kv_num_blocks.sum() > 0


def test_bad_segments_are_refused() -> None:
    for spans in (
        [Segment(1, 3)],
        [Segment(0, 3), Segment(4, 1)],
        [Segment(0, 0)],
        [Segment(0, 3), Segment(3, 2, 0, 4)],
        [Segment(0, 3), Segment(3, 2, 1, 2)],
        [Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 2, 3, 1)],
        [Segment(0, 3, 3, 1), Segment(3, 2)],
    ):
        with pytest.raises(ValueError, match="segment"):
            Segments(spans)


def test_segments_travel_and_derive_once() -> None:
    segments = Segments([Segment(0, 3), Segment(3, 2, 0, 1)])
    calls = []

    def build() -> torch.Tensor:
        calls.append(1)
        return torch.ones(1)

    with torch.inference_mode():
        made = segments.derived("key", build)
    assert not made.is_inference() and segments.derived("key", build) is made and calls == [1]
    for other in (pickle.loads(pickle.dumps(segments)), copy.deepcopy(segments)):
        assert other.spans == segments.spans and type(other.spans[1]) is Segment
        assert other.derived("key", build) is not made
