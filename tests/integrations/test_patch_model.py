"""``dpo_fast.patch_model``: log-probs of a patched model against its own full logits.

Legend: B rows, T padded length, V vocabulary.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpo_fast
from dpo_fast.models import install_scoring, uninstall_scoring
from tests.tiny import FAMILIES, tiny_model

B, T = 3, 11


def batch(rows: int = B) -> dict[str, Tensor]:
    """Ragged rows, padded on the right, with prompts of 2 or 3 tokens that are not scored."""
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 300, (rows, T), generator=rng)
    lengths = torch.tensor([T - 2 * row for row in range(rows)])
    attention = (torch.arange(T) < lengths[:, None]).long()
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :2] = -100
    labels[0, 2] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def from_logits(model: nn.Module, data: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """``[B, T - 1]`` of the unpatched path: the definition."""
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    target = data["labels"][:, 1:]
    logps = (logits[:, :-1].float() / temperature).log_softmax(-1)
    return logps.gather(-1, target.clamp_min(0)[..., None])[..., 0].masked_fill(target == -100, 0.0)


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weight = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    (logps * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, data: dict[str, Tensor]) -> None:
    """Values and gradients of the patched ``model`` are those of its logits."""
    expected = from_logits(model, data)
    expected_grads = gradients(model, expected)
    out = model(**data, return_logprobs=True)
    grads = gradients(model, out.logps)
    torch.testing.assert_close(out.logps, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(out.mask, data["labels"][:, 1:] != -100)
    assert grads.keys() == expected_grads.keys() and grads
    for name, grad in grads.items():
        scale = float(expected_grads[name].abs().max())
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5 * (1 + scale))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = tiny_model(family)
    assert dpo_fast.patch_model(model) is model
    assert_same(model, batch())


@pytest.mark.parametrize("rows", [1, 2])
def test_any_number_of_rows(rows: int) -> None:
    assert_same(dpo_fast.patch_model(tiny_model()), batch(rows))


def test_sequence_sums() -> None:
    model = dpo_fast.patch_model(tiny_model())
    out = model(**batch(), return_logprobs="sequence")
    torch.testing.assert_close(out.logps, from_logits(model, batch()).sum(1), rtol=1e-5, atol=1e-4)
    assert out.logps.shape == (B,) and out.logps.requires_grad


def test_temperature_and_statistics() -> None:
    model = dpo_fast.patch_model(
        tiny_model("gemma2"), temperature=0.6, outputs=("entropy", "mean_logit", "is_top1")
    )
    data = batch()
    out = model(**data, return_logprobs=True)
    torch.testing.assert_close(out.logps, from_logits(model, data, 0.6), rtol=1e-5, atol=2e-5)
    logits = model(data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1] / 0.6
    logp = logits.log_softmax(-1)
    expected = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top1": logits.argmax(-1) == data["labels"][:, 1:],
    }
    for name, values in expected.items():
        wanted = torch.where(out.mask, values, torch.zeros_like(values))
        torch.testing.assert_close(out[name], wanted, rtol=1e-5, atol=2e-5)
    assert out.log_sum_sq_probs is None


def test_labels_need_not_be_the_tokens() -> None:
    model = dpo_fast.patch_model(tiny_model())
    data = batch()
    data["labels"] = torch.where(data["labels"] == -100, -100, (data["labels"] + 7) % 300)
    assert_same(model, data)


def test_nothing_to_score() -> None:
    model = dpo_fast.patch_model(tiny_model())
    data = batch()
    data["labels"][:] = -100
    for kind in ("token", "sequence"):
        out = model(**data, return_logprobs=kind)
        assert not out.logps.any() and not out.mask.any()
        out.logps.sum().backward()


def test_without_return_logprobs_the_forward_is_the_models_own() -> None:
    model = tiny_model()
    data = batch()
    before = model(**data)
    sample = {"input_ids": data["input_ids"][:1, :5], "max_new_tokens": 6, "do_sample": False}
    text = model.generate(**sample)
    dpo_fast.patch_model(model)
    after = model(**data)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    assert torch.equal(model.generate(**sample), text)
    with pytest.raises(ValueError, match="return_logprob_"):
        model.generate(**sample, return_logprob_=True)


def test_mixture_of_experts_reports_its_balance() -> None:
    model = dpo_fast.patch_model(tiny_model("qwen3_moe"))
    data = batch()
    out = model(**data, return_logprobs=True)
    torch.testing.assert_close(out.aux_loss, model(**data).aux_loss)
    assert dpo_fast.patch_model(tiny_model())(**data, return_logprobs=True).aux_loss is None


def lora(**own: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **own)


@pytest.mark.parametrize("first", ["peft", "patch"])
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_peft(first: str, modules: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    if first == "patch":
        dpo_fast.patch_model(model)
    model = peft.get_peft_model(model, lora(target_modules=modules))
    if first == "peft":
        assert dpo_fast.patch_model(model) is model
    assert_same(model, batch())
    with model.disable_adapter():
        off = model(**batch(), return_logprobs=True).logps
        torch.testing.assert_close(off, from_logits(model, batch()), rtol=1e-5, atol=2e-5)
    assert (off - model(**batch(), return_logprobs=True).logps).abs().max() > 1e-3


def test_prompt_adapter_lengthens_the_rows_on_the_left() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = dpo_fast.patch_model(peft.get_peft_model(tiny_model(), config))
    data = batch()
    out = model(**data, return_logprobs=True)
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    target = data["labels"][:, 1:]
    logps = logits[:, 4:-1].log_softmax(-1).gather(-1, target.clamp_min(0)[..., None])[..., 0]
    assert out.logps.shape == (B, T - 1 + 4) and not out.mask[:, :4].any()
    torch.testing.assert_close(out.logps[:, 4:], logps.masked_fill(target == -100, 0.0))


def test_unpatch_and_patch_again() -> None:
    model = tiny_model()
    keys = set(model.__dict__)
    dpo_fast.patch_model(model)
    dpo_fast.patch_model(model)
    dpo_fast.unpatch_model(model)
    assert set(model.__dict__) == keys and model.forward.__func__ is type(model).forward
    dpo_fast.unpatch_model(model)
    assert_same(dpo_fast.patch_model(model), batch())


def test_unpatch_leaves_a_trainers_scoring_alone() -> None:
    model = tiny_model()
    install_scoring(model)
    scored = model.forward
    dpo_fast.unpatch_model(dpo_fast.patch_model(model))
    assert model.forward == scored
    assert model(**batch(), scoring=lambda hidden, head: hidden.shape).value == (B, T, 32)


def test_patch_survives_uninstall_scoring() -> None:
    """What takes off the forward takes off the patch: unpatching is done, patching works again."""
    for again in (dpo_fast.unpatch_model, dpo_fast.patch_model):
        model = dpo_fast.patch_model(tiny_model())
        uninstall_scoring(model)
        again(model)
        assert model(**batch()).logits.shape[:2] == (B, T)
    assert_same(model, batch())


def test_a_wrapper_around_the_patch_comes_off_first() -> None:
    model = dpo_fast.patch_model(tiny_model())
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(RuntimeError, match="wrapped by something else"):
        dpo_fast.unpatch_model(model)
    assert model(**batch(), return_logprobs=True).logps.shape == (B, T - 1)
    model.forward = inner
    assert "forward" not in dpo_fast.unpatch_model(model).__dict__


def test_a_deepcopy_scores_itself() -> None:
    model = dpo_fast.patch_model(tiny_model())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_input_embeddings().weight.mul_(1.5)
    assert_same(twin, batch())


def test_inside_of_accelerate() -> None:
    """Patched, then prepared with bf16 autocast: fp32 log-probs, as near to the truth as logits."""
    accelerate = pytest.importorskip("accelerate")
    data = batch()
    gold = from_logits(tiny_model(), data)
    reset = accelerate.state.AcceleratorState._reset_state  # a trainer may have been here before
    reset(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(dpo_fast.patch_model(tiny_model()))
        out = model(**data, return_logprobs=True)
        eager = from_logits(model, data)
        with pytest.raises(ValueError, match=r"before accelerator\.prepare"):
            dpo_fast.patch_model(accelerator.prepare(tiny_model()))
    finally:
        reset(reset_partial_state=True)
    assert out.logps.dtype == torch.float32
    error, allowed = (out.logps - gold).abs().max(), (eager - gold).abs().max()
    assert 0 < error <= 2 * allowed


def test_under_ddp(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(dpo_fast.patch_model(tiny_model()))
        assert_same(model, batch())
    finally:
        torch.distributed.destroy_process_group()


def test_under_fsdp2(tmp_path: Any) -> None:
    """Layers and root sharded: the root's hooks gather the head, or its own where it is apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = tiny_model()
    expected = from_logits(plain, batch())
    expected_grads = gradients(plain, expected)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, apart = (dpo_fast.patch_model(tiny_model()) for _ in range(2))
        fully_shard(apart.lm_head, mesh=mesh)
        for lm in (model, apart):
            for layer in lm.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(lm, mesh=mesh)
        for lm in (model, apart):
            logps = lm(**batch(), return_logprobs=True).logps
            grads = gradients(lm, logps)
            torch.testing.assert_close(logps, expected, rtol=1e-5, atol=2e-5)
            for name, grad in grads.items():
                torch.testing.assert_close(
                    grad.full_tensor(), expected_grads[name], rtol=1e-4, atol=1e-4
                )
    finally:
        torch.distributed.destroy_process_group()


def test_calls_that_cannot_work() -> None:
    model = dpo_fast.patch_model(tiny_model())
    data = batch()
    with pytest.raises(ValueError, match="needs labels"):
        model(data["input_ids"], return_logprobs=True)
    with pytest.raises(ValueError, match="return_logprobs='sum'"):
        model(**data, return_logprobs="sum")
    with pytest.raises(ValueError, match=r"labels \(3, 10\) must have the shape \(3, 11\)"):
        model(**{**data, "labels": data["labels"][:, 1:]}, return_logprobs=True)
    with pytest.raises(ValueError, match=r"temperature=1\.0"):
        dpo_fast.patch_model(model, temperature=0.5)
    with pytest.raises(ValueError, match="temperature=0"):
        dpo_fast.patch_model(tiny_model(), temperature=0.0)
    with pytest.raises(ValueError, match="unknown"):
        dpo_fast.patch_model(tiny_model(), outputs=("logits",))
    other = dpo_fast.patch_model(tiny_model(), backend="no-such")
    with pytest.raises(ValueError, match="no-such"):
        other(**data, return_logprobs=True)
    with pytest.raises(ValueError, match="Linear has no LM head"):
        dpo_fast.patch_model(nn.Linear(2, 2))
