"""Tensor-parallel models on two gloo processes: loss, statistics and gradients of one process.

The HF Trainer refuses tensor parallelism on a CPU, so this is the level below it: a transformers
model, forward_scored, fused_linear_dpo.
"""

import pytest
import torch

from tests.parallel.launch import run_ranks

CELLS = {
    "llama, transformers": 160,
    "llama, tied, transformers": 160,
    "llama, torch": 160,
    "llama, sequence parallel norm": 160,
    "gemma2, transformers": 160,
    "uneven vocabulary": 161,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    return run_ranks("tests.parallel.model_worker:model_cells", 2, folder)


@pytest.mark.parametrize("name", CELLS)
def test_a_split_model_gives_the_loss_and_gradients_of_a_whole_one(ranks, name):
    for rank, found in enumerate(cells[name] for cells in ranks):
        for key, value in found["found"].items():
            torch.testing.assert_close(value, found["right"][key], rtol=1e-5, atol=1e-5)
        assert found["grads"].keys() == found["expected"].keys() and len(found["grads"]) > 15
        total = torch.stack([g.square().sum() for g in found["expected"].values()]).sum().sqrt()
        assert total > 0.1
        for key, grad in found["grads"].items():
            assert grad.shape == found["expected"][key].shape
            assert (grad - found["expected"][key]).norm() <= 1e-5 * total, key
        # the head stayed split: half of its rows here, and no gather of it
        rows = CELLS[name] if rank == 0 else found["seen"][0][0][0] - CELLS[name]
        assert found["seen"][1] == ((rows, 32), True) and found["seen"][0][1] is False
        local, whole = found["numel"].get("lm_head.weight") or found["numel"][EMBEDDING]
        assert local == rows * 32 < whole
        assert found["check_head"] < 1e-3


EMBEDDING = "model.embed_tokens.weight"


def test_a_split_frozen_reference_answers_as_a_whole_one(ranks):
    for cells in ranks:
        found, right, message = cells["frozen"]
        for logps in found:  # given split; copied from a policy that then moved
            torch.testing.assert_close(logps, right, rtol=1e-5, atol=1e-4)
        assert "would run the policy's own weights: give ref_model" in message


def test_what_every_rank_holds_whole_gets_its_whole_gradient(ranks):
    """Else the copies of a bias or an adapter on a split head would drift apart."""
    for cells in ranks:
        cell = cells["whole beside split"]
        for found, right in zip(cell["found"], cell["right"], strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_heads_that_cannot_be_scored_are_refused_with_the_remedy(ranks):
    for cells in ranks:
        assert "Shard(dim=1)" in cells["refusals"]["rowwise"]
        assert "colwise_gather_output" in cells["refusals"]["rowwise"]
        assert "FSDP2 has not gathered it" in cells["refusals"]["fsdp"]


def test_the_weak_scaling_model_counts_the_bytes_of_a_real_step(ranks):
    """FSDP2 and DDP, two processes, float32: the closed form's volumes, byte for byte."""
    from benchmarks.scaling_model import Cluster, Model, Run, step_volume

    volumes = ranks[0]["volumes"]
    params = volumes["params"]
    tied = Model("tiny", params["layers"], params["layer"], params["root"], 1, tied=True)
    run = Run(reference="precomputed", gather_bytes=4, reduce_bytes=4)
    fsdp, ddp = (step_volume(tied, run, engine, 2, Cluster()) for engine in ("fsdp2", "ddp"))
    # half of each buffer leaves a rank of two
    assert sum(volumes["fsdp2"]["_allgather_base_"]) == 2 * fsdp.gather
    assert sum(volumes["fsdp2"]["_reduce_scatter_base_"]) == 2 * fsdp.reduce
    assert sum(volumes["ddp"]["allreduce_"]) == ddp.reduce
