"""FSDP2 with a frozen reference: two models' shards, and of what is gathered never more than one
root group and two layers.

Bytes are counted at every operation of a step (tests.distributed.census). What a step needs beside
weights, gradients and optimizer is its workspace; one process says how much.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch

SMALL = 16384  # batches, counters of the optimizer, buffers of rotary frequencies


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks measured."""
    return launch(2, "memory", {"engine": "fsdp2", "ranks": 2, "folder": str(folder)}, folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same micro-batch on one process, nothing sharded."""
    folder = tmp_path_factory.mktemp("one")
    return launch(1, "memory", {"engine": "single", "ranks": 1}, folder, alone=True)[0]


def test_gathered_weights(found: list[dict[str, Any]]) -> None:
    for rank in found:
        allowed = rank["root"] + 2 * rank["layer"]
        assert allowed < 0.7 * rank["model"]  # else one root gather of the reference would pass
        assert rank["looks"] > 60
        assert rank["layer"] <= rank["gathered"] <= allowed


def test_peak_of_the_references_forward(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Shards of both models and of AdamW's states, one root group, two layers (or one, and the flat
    memory into which FSDP2 gathers the next before it is laid out), the workspace.
    """
    workspace = one["peaks"]["reference"] - one["before"]
    for rank in found:
        shards = (1 + 2 + 1) * rank["model"] // 2
        assert abs(rank["before"] - shards) < SMALL
        assert 0 < workspace < 0.5 * rank["layer"]
        allowed = shards + rank["root"] + 2 * rank["layer"] + workspace + SMALL
        assert shards + rank["layer"] <= rank["peaks"]["reference"] <= allowed
        assert allowed < shards + rank["model"]  # a reference gathered at once would not pass


def test_the_reference_adds_its_shards_to_the_peak_of_a_step(found: list[dict[str, Any]]) -> None:
    for rank in found:
        added = rank["peaks"][""] - rank["peaks without"][""]
        assert abs(added - rank["model"] // 2) < SMALL


def test_peak_of_a_step(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """The backward holds the gradient of a layer, too, whole and as it is sent to its shards."""
    workspace = one["peaks"]["reference"] - one["before"]
    for rank in found:
        shards = (1 + 1 + 2 + 1) * rank["model"] // 2
        allowed = shards + rank["root"] + 2 * rank["layer"] + 2 * rank["layer"] + workspace + SMALL
        assert shards <= rank["peaks"][""] <= allowed < one["peaks"][""]


def test_the_example(found: list[dict[str, Any]], folder: Path) -> None:
    assert [rank["example"] for rank in found] == pytest.approx([0.5, 0.5], abs=0.01)
    saved = folder / "runs" / "fsdp2" / "model"
    assert (saved / "model.safetensors").is_file() and (saved / "config.json").is_file()
