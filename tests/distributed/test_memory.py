"""FSDP2 with a frozen reference: two models' shards, and of what is gathered never more than one
root group and two layers.
"""

from pathlib import Path

import pytest

from tests.distributed.launch import launch


def test_gathered_weights_and_the_example(tmp_path: Path) -> None:
    spec = {"engine": "fsdp2", "ranks": 2, "folder": str(tmp_path)}
    for found in launch(2, "memory", spec, tmp_path):
        allowed = found["root"] + 2 * found["layer"]
        assert allowed < 0.7 * found["model"]  # else one root gather of the reference would pass
        assert found["looks"] > 60
        assert found["layer"] <= found["gathered"] <= allowed
        assert found["example"] == pytest.approx(0.5, abs=0.01)
    saved = tmp_path / "runs" / "fsdp2" / "model"
    assert (saved / "model.safetensors").is_file() and (saved / "config.json").is_file()
