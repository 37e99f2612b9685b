"""OpenRLHF's own Actor, patched and unpatched."""

import logging
from typing import Any

import pytest
import torch

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from tests.integrations_trl024.support import NEEDED, classic_trl
from tests.peers import absent
from tests.tiny import tiny_model

classic_trl()
pytest.importorskip("openrlhf", reason=f"openrlhf is not installed; {NEEDED}")


def unpad_input(hidden: torch.Tensor, mask: torch.Tensor) -> tuple[Any, ...]:
    """flash-attn's, which is plain torch in a package that needs a GPU to be installed."""
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[indices], indices, ends, int(lengths.max()), lengths


def pad_input(hidden: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """flash-attn's."""
    out = hidden.new_zeros(batch * length, *hidden.shape[1:])
    return out.index_copy(0, indices, hidden).unflatten(0, (batch, length))


def rearrange(tensor: torch.Tensor, pattern: str) -> torch.Tensor:
    """einops', for the one pattern that the Actor uses."""
    assert pattern == "b s ... -> (b s) ..."
    return tensor.flatten(0, 1)


FLASH = {
    "index_first_axis": lambda tensor, indices: tensor[indices],
    "pad_input": pad_input,
    "rearrange": rearrange,
    "unpad_input": unpad_input,
}


@pytest.fixture(scope="module")
def peer() -> Any:
    """The module of its Actor."""
    with pytest.MonkeyPatch.context() as patched:
        absent(patched, "deepspeed")
        absent(patched, "flash_attn")
        absent(patched, "flash_attn.bert_padding", **FLASH)
        absent(patched, "flash_attn.utils")
        absent(patched, "flash_attn.utils.distributed", all_gather=None)
        import openrlhf.models.actor as module

        yield module


def actor(peer: Any, family: str = "llama", *, packing: bool = False, **options: Any) -> Any:
    made = peer.Actor(tiny_model(family), **options)
    # Both are set where it loads the model itself; with a cache, sdpa sees no borders of samples.
    made.packing_samples, made.model.config.use_cache = packing, False
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences ``[4, 12]``, padded on both sides as rollouts are, and their mask."""
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -4:] = 0
    mask[3, :2], mask[3, -1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def gradient(made: Any, logps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    made.zero_grad()
    (logps * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_log_probs_of_its_dpo_trainer(peer: Any, family: str) -> None:
    ids, mask = batch()
    scored = (mask[:, 1:] * mask[:, :-1]).float()  # what the trainer's masks may keep
    weight = scored * torch.linspace(-1, 1, scored.numel()).view_as(scored)
    call = {"attention_mask": mask, "return_output": True, "return_logprobs": True}
    made = actor(peer, family)
    expected, theirs = made(ids, **call)
    expected_grad = gradient(made, expected, weight)
    with dpo_fast.patch("openrlhf"):
        found, output = made(ids, **call)
        grad = gradient(made, found, weight)
    assert found.shape == expected.shape
    torch.testing.assert_close(found * scored, expected * scored, rtol=1e-5, atol=2e-5)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    assert ("aux_loss" in output) == ("aux_loss" in theirs) == (family == "qwen3_moe")
    if "aux_loss" in output:
        torch.testing.assert_close(output.aux_loss, theirs.aux_loss)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_packed_samples(peer: Any, family: str) -> None:
    """One row without padding for both; and the log-probs of padded rows."""
    ids, mask = batch()
    scored = (mask[:, 1:] * mask[:, :-1]).float()
    weight = scored * torch.linspace(-1, 1, scored.numel()).view_as(scored)
    call = {"attention_mask": mask, "return_output": True, "return_logprobs": True}
    made = actor(peer, family, packing=True, temperature=0.8)
    seen: list[torch.Size] = []
    made.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[:2])
    )
    expected, theirs = made(ids, **call)
    expected_grad = gradient(made, expected, weight)
    with dpo_fast.patch("openrlhf"):
        found, output = made(ids, **call)
        grad = gradient(made, found, weight)
        actions = made(ids, action_mask=mask[:, -5:], attention_mask=mask)
    assert seen == [(1, int(mask.sum()))] * 3
    assert found.shape == expected.shape
    torch.testing.assert_close(found * scored, expected * scored, rtol=1e-5, atol=2e-5)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    if family == "qwen3_moe":
        torch.testing.assert_close(output.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(actions, made(ids, action_mask=mask[:, -5:], attention_mask=mask))
    made.packing_samples = False
    padded = made(ids, **call)[0]
    torch.testing.assert_close(found * scored, padded * scored, rtol=1e-4, atol=1e-4)


def test_log_probs_of_actions(peer: Any) -> None:
    ids, mask = batch()
    actions = mask[:, -5:].clone()
    call = {"action_mask": actions, "attention_mask": mask}
    made = actor(peer, temperature=0.7)
    expected = made(ids, **call)
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    expected_grad = gradient(made, expected, weight)
    with dpo_fast.patch("openrlhf"):
        found = made(ids, **call)
        grad = gradient(made, found, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


def test_what_is_left_to_openrlhf(peer: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = batch()
    made = actor(peer)
    calls: list[dict[str, Any]] = [
        {"return_output": True},
        {"return_output": True, "return_logprobs": True, "return_entropy": True},
        {"return_logprobs": True, "ring_attn_group": object()},  # without packing: not looked at
    ]
    with caplog.at_level(logging.INFO, logger="dpo_fast"), dpo_fast.patch("openrlhf"):
        logits = made(ids, attention_mask=mask, **calls[0])
        entropy = made(ids, attention_mask=mask, **calls[1])[1].entropy
        made(ids, attention_mask=mask, **calls[2])
    assert logits["logits"].shape[-1] == 320 and entropy.requires_grad
    assert "openrlhf 0.11.2: the call wants the logits" in caplog.text
    assert "the call wants the entropy" in caplog.text
    assert "ring attention" in caplog.text


def test_patch_and_restore(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = peer.Actor.forward
    with dpo_fast.patch("openrlhf"):
        assert peer.Actor.forward is not original
    assert peer.Actor.forward is original
    monkeypatch.setattr(peer.Actor, "forward", lambda self, sequences, mask: None)
    with pytest.raises(
        InterfaceChanged, match=r"openrlhf 0\.11\.2 takes \(self, sequences, mask\)"
    ):
        dpo_fast.patch("openrlhf")
