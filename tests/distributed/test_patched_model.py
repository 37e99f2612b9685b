"""``patch_model`` inside the hooks that gather weights: two ranks equal one process."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import has_deepspeed, launch

NEEDS_DEEPSPEED = pytest.mark.skipif(
    not has_deepspeed(), reason="deepspeed: not installed (make test does)"
)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_log_probs_and_gradients(engine: str, tmp_path: Path) -> None:
    for rank in launch(2, "patched_model", {"engine": engine, "ranks": 2}, tmp_path):
        assert (rank["logps"] - rank["expected"]).norm() <= 1e-6 * rank["expected"].norm()
        assert rank["grads"].keys() == rank["whole"].keys()
        total = torch.stack([g.square().sum() for g in rank["whole"].values()]).sum().sqrt()
        assert total > 1e-2
        for name, grad in rank["grads"].items():
            # both ranks have the same batch: the mean over ranks is the gradient of one
            assert (grad - rank["whole"][name]).norm() <= 2e-5 * total, name
