"""What must hold between cells, whatever their sizes; and the choice among them."""

from dataclasses import replace

import pytest

from dpo_fast.perf import PEAK_FLOPS
from dpo_fast.plan import (
    DEVICES,
    Batches,
    Cell,
    Device,
    Run,
    Setting,
    batches_of_dataset,
    batches_of_lengths,
    find_device,
    plan_cells,
    settings,
    why_not_layouts,
)
from dpo_fast.plan.choose import choose
from tests.plan.cases import CASES

GPU = Device("made up", "cuda", 2**36, 4e14, 4e13, 2e12, "for tests")


@pytest.fixture(scope="module")
def cells() -> dict[Setting, Cell]:
    case = CASES["full-fp32-padded-frozen"]
    batches = batches_of_lengths(4, [100, 60], [50, 140], [40, 30])
    wanted = settings(checkpointing=(True, False))
    planned = plan_cells(case.config(), batches, wanted, Run(GPU), case.lora())
    return {cell.setting: cell for cell in planned}


def test_every_combination_that_exists_has_a_cell(cells: dict[Setting, Cell]) -> None:
    # Two precisions of checkpointing, three layouts; "adapter" only with an adapter.
    assert len(cells) == 2 * 3 * (3 + 4)


def test_what_saves_saves(cells: dict[Setting, Cell]) -> None:
    for setting, cell in cells.items():
        assert sum(cell.shares().values()) == pytest.approx(1.0)
        if not setting.checkpointing:
            other = cells[replace(setting, checkpointing=True)]
            assert other.peak < cell.peak
            assert other.step_seconds > cell.step_seconds
        if setting.layout == "padded":
            packed = cells[replace(setting, layout="packed")]
            shared = cells[replace(setting, layout="shared_prefix")]
            assert shared.tokens < packed.tokens < cell.tokens
            assert shared.step_seconds < packed.step_seconds < cell.step_seconds
        if setting.reference == "frozen":
            precomputed = cells[replace(setting, reference="precomputed")]
            weights = cell.memory["weights"]
            assert cell.memory["reference"] == weights
            assert precomputed.memory["reference"] == 0
            assert precomputed.peak <= cell.peak - weights
            assert precomputed.step_seconds < cell.step_seconds
            assert precomputed.once > 0.0


def test_an_adapter_has_few_gradients_and_states(cells: dict[Setting, Cell]) -> None:
    full = cells[Setting("full", "mixed", True, "packed", "frozen")]
    lora = cells[Setting("lora", "mixed", True, "packed", "frozen")]
    assert lora.memory["optimizer"] < 0.2 * full.memory["optimizer"]
    assert lora.memory["weights"] > full.memory["weights"]  # the adapter comes on top
    ema = cells[Setting("lora", "mixed", True, "packed", "ema")]
    assert ema.memory["reference"] == lora.memory["optimizer"] // 2
    adapter = cells[Setting("lora", "mixed", True, "packed", "adapter")]
    assert adapter.memory["reference"] == 0


def test_the_backbone_flops_are_six_a_parameter_and_token(cells: dict[Setting, Cell]) -> None:
    """Two forward, four backward, and attention on top: less than a tenth at these lengths."""
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 640
    all_but_keys = layer - 2 * 256 * 128
    scored = 2 * (50 + 140) + 2 * (40 + 30)  # lengths in turn
    for layout in ("padded", "packed"):
        cell = cells[Setting("full", "mixed", False, layout, "precomputed")]
        flops = cell.seconds["policy"] * GPU.bf16 * Run(GPU).efficiency
        left_out = (cell.tokens - scored) * all_but_keys if layout == "packed" else 0
        assert 1.0 <= flops / (6 * (4 * layer * cell.tokens - left_out)) < 1.1
    cell = cells[Setting("full", "mixed", False, "padded", "precomputed")]
    again = cells[Setting("full", "mixed", True, "padded", "precomputed")]
    # A third on top, without each layer's last product: nothing that the backward needs.
    twice = 1 + (layer - 256 * 640) / (3 * layer)
    assert again.seconds["policy"] / cell.seconds["policy"] == pytest.approx(twice, rel=0.03)


def test_the_best_is_the_fastest_that_fits(cells: dict[Setting, Cell]) -> None:
    everything = list(cells.values())
    roomy = choose(everything, GPU)
    assert roomy.best is not None
    # One epoch: a reference that is computed once costs as much as a frozen one, and less memory.
    assert roomy.best.setting == Setting("full", "mixed", False, "shared_prefix", "precomputed")
    tight = replace(GPU, memory=1.1 * roomy.best.peak)
    assert choose(everything, tight).best == roomy.best
    tighter = replace(GPU, memory=1.0 * roomy.best.peak)
    second = choose(everything, tighter)
    assert second.best is not None
    assert second.best.setting.checkpointing and second.best.setting.kind == "full"
    full = min(c.peak for c in everything if c.setting.kind == "full")
    small = replace(GPU, memory=float(full))
    lora = choose(everything, small)
    assert lora.best is not None
    assert lora.best.setting.kind == "lora"
    assert "no full fine-tuning fits" in lora.reason
    nothing = choose(everything, replace(GPU, memory=2.0**20))
    assert nothing.best is None
    assert "nothing fits" in nothing.reason


def test_a_data_set_gives_the_longest_pairs_for_memory_and_a_spread_for_time() -> None:
    rows = [
        {"prompt_ids": [5] * n, "chosen_ids": [1] * 3, "rejected_ids": [2] * 4}
        for n in range(1, 101)
    ]
    from datasets import Dataset

    batches = batches_of_dataset(Dataset.from_list(rows), 4, None, "keep_start")
    assert [len(row["prompt_ids"]) for row in batches.largest] == [97, 98, 99, 100]
    assert [len(row["prompt_ids"]) for row in batches.typical] == [13, 38, 63, 88]


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt="):
        batches_of_lengths(2, [0], [1], [1])
    with pytest.raises(ValueError, match="RTX4090"):
        find_device("abacus")


def test_devices_agree_with_the_rates_of_mfu() -> None:
    for device in DEVICES.values():
        for name, rate in PEAK_FLOPS.items():
            if name in device.name:
                assert device.bf16 == rate
    assert find_device("h100", memory=1.0).memory == 1.0
    assert find_device("cpu").fp32 > 0.0


def test_architectures_that_mix_neighbours_have_padded_rows_only() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "mamba", hidden_size=64, num_hidden_layers=2, vocab_size=256, state_size=8
    )
    assert set(why_not_layouts(config)) == {"packed", "shared_prefix"}


def test_a_quantised_config_is_refused() -> None:
    case = CASES["full-fp32-padded-frozen"]
    config = case.config()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    rows = case.rows()
    with pytest.raises(ValueError, match="quantised"):
        list(plan_cells(config, Batches(rows, rows, ""), [case.setting], Run(GPU), None))
