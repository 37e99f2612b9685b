"""The shipped table: complete, obeys the kernels' rules, chosen from by sizes, said in the log."""

import json
import logging

import pytest
import torch

from benchmarks.tile_sweep import new_table, table_rows, text_of, tiles_of
from dpo_fast_kernels import choice, operands
from dpo_fast_kernels.choice import decide, engine_name, forget
from dpo_fast_kernels.operands import Operands
from dpo_fast_kernels.tiles import (
    ARCHITECTURES,
    INTERPRETER,
    PATH,
    VARIANTS,
    Row,
    Table,
    Tile,
    architecture,
    choose_tile,
    parsed,
    pick,
    table,
)

TILE = Tile(128, 256, 64, 64, 8, 8, 3)


def test_a_row_holds_for_every_size():
    for arch in ARCHITECTURES:
        for variant in VARIANTS:
            assert isinstance(choose_tile(arch, variant, 1, 1), Tile)
            if variant != "stats":
                row = pick(table().engines, arch, "bfloat16", variant, 1, 1)
                assert row.value in choice.ENGINES


def test_tiles_obey_the_kernels_rules():
    found = [(row.variant, row.value) for row in table().tiles]
    for variant, tile in [*found, *INTERPRETER.items()]:
        for side in tile[:4]:
            assert side & (side - 1) == 0 and side >= 16
        assert tile.block_v % tile.unit == 0
        assert variant != "stats" or tile.block_v == tile.unit
    assert len({t.unit for _, t in found}) == 1  # partial sums agree in bits
    for variant in VARIANTS:  # and so do those of what a sweep may put there
        assert all(t.unit == 128 and t.block_v % 128 == 0 for t in tiles_of(variant))
        assert variant != "stats" or all(t.block_v == t.unit for t in tiles_of(variant))


def test_architectures():
    for capability, tma, name in (
        ((9, 0), True, "sm_90"), ((9, 0), False, "sm_90-pointer"), ((8, 0), False, "sm_80"),
        ((8, 9), False, "sm_80"), ((12, 0), False, "sm_80"), (None, True, "interpreter"),
    ):  # fmt: skip
        assert architecture(capability, tma) == name
    with pytest.raises(ValueError, match=r"7\.5"):
        architecture((7, 5), False)


def test_pick_takes_the_largest_class_of_h_then_of_v():
    key = ("sm_90", "bfloat16", "plain")
    rows = tuple(
        Row(*key, h, v, f"{h} {v}") for h, v in ((0, 0), (2048, 0), (0, 200_000), (2048, 200_000))
    )
    for hidden, vocab, name in (
        (1024, 151936, "0 0"), (1024, 256000, "0 200000"), (4096, 128256, "2048 0"),
        (2048, 200_000, "2048 200000"), (2047, 199_999, "0 0"),
    ):  # fmt: skip
        assert pick(rows, *key, hidden, vocab).value == name


def test_choice_is_said_once_with_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(operands, "capability_of", lambda x: (9, 0))
    rows = (Row("sm_90", "bfloat16", "plain", 0, 0, "triton"),
            Row("sm_90", "bfloat16", "plain", 0, 900, "cublas"))  # fmt: skip
    shipped = Table(rows, (Row("sm_90", "bfloat16", "plain", 0, 0, TILE),), {"sm_90": "a GPU"})
    for module in (choice, operands.__dict__["choose_tile"].__globals__):
        patch = monkeypatch.setitem if isinstance(module, dict) else monkeypatch.setattr
        patch(module, "table", lambda: shipped)
    forget()
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        for vocab, engine in ((800, "triton"), (1000, "cublas"), (800, "triton")):
            problem = Operands(x, torch.zeros(vocab, 64, dtype=x.dtype), None, None, None, 1.0)
            assert decide(None, problem) == engine
            assert decide("triton", problem) == "triton"
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 4
    assert "'triton', tile 128x256x64 with 8 warps" in said[0] and "V >= 0; measured" in said[0]
    assert "'cublas'" in said[2] and "V >= 900; measured on a GPU" in said[2]
    assert "asked for by name" in said[1]
    wide = Operands(x.float(), torch.zeros(9, 64), None, None, None, 1.0)
    assert decide(None, wide) == "cublas"
    with pytest.raises(ValueError, match="16-bit operands"):
        decide("triton", wide)
    forget()


def test_statistics_do_not_change_the_engine():
    """Else the log-probs of a logging step would not be those of the reference beside it."""
    assert all(row.variant != "stats" for row in table().engines)
    with pytest.raises(ValueError, match="engine='fast' is unknown"):
        engine_name("fast", torch.bfloat16)


def part(tile_ms, triton, cublas):
    tiles = [
        {"tile": list(t), "cublas_ms": 2.0, "store_ms": 2 * ms, "no_store_ms": 1.9}
        for t, ms in tile_ms.items()
    ]
    engines = {"gemm_ms": 1.0, "triton_ms": triton, "cublas_ms": cublas}
    return {"tiles": tiles, "engines": engines}


def test_a_sweep_writes_rows_that_the_library_reads():
    other = TILE._replace(block_v=128, num_stages=4)
    parts = {
        "llama-3-8b plain": part({TILE: 1.1, other: 1.3}, 1.2, 1.4),
        "qwen2.5-7b plain": part({TILE: 1.4, other: 1.15}, 1.2, 1.4),
        "qwen3-0.6b plain": part({TILE: 1.9, other: 1.5}, 1.6, 1.4),
        "gemma-2-9b softcap": part({TILE: 1.9, other: 1.5}, 1.2, 1.1),
    }
    new = new_table(json.loads(PATH.read_text()), parts, "a GPU")
    read = parsed(json.loads(text_of(new)))
    assert read.measured == {"sm_90": "a GPU"}
    key = ("sm_90", "bfloat16", "plain")
    assert pick(read.tiles, *key, 4096, 128256).value == other  # 2.45 against 2.5 over both models
    assert pick(read.tiles, *key, 512, 1000).value == other
    assert pick(read.engines, *key, 4096, 128256).value == "triton"
    assert pick(read.engines, *key, 1024, 151936).value == "cublas"
    assert pick(read.engines, "sm_90", "bfloat16", "softcap", 8, 8).value == "cublas"
    for arch in ARCHITECTURES:  # nothing else was lost
        for variant in VARIANTS:
            assert pick(read.tiles, arch, "bfloat16", variant, 1, 1)
    kept = [r for r in table().tiles if r.arch != "sm_90" or r.variant == "stats"]
    assert set(kept) <= set(read.tiles)
    assert sorted({name for name, _ in table_rows(parts)}) == ["engines", "tiles"]
