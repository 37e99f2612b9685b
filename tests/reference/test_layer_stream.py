"""A reference whose layers wait in host memory answers with the same bits, from two slots."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

from dpo_fast.config import DPOConfig
from dpo_fast.reference import build_reference, choose_reference
from dpo_fast.reference.frozen import FrozenReference
from dpo_fast.reference.layer_stream import decoder_layers
from tests.layouts.compare import AWKWARD, collators
from tests.reference.common import collator, perturb, planned_batch
from tests.tiny import FAMILIES, tiny_model
from tests.trainer.parity import (
    assert_same_log,
    config_kwargs,
    relative_update_error,
    train,
)

CPU = torch.device("cpu")


def five_layers(family: str, **config: Any) -> nn.Module:
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_model(family, **{name: 5}, **config)


def slots_of(reference: FrozenReference) -> list[torch.Tensor]:
    assert reference.stream is not None
    return [flat for slot in reference.stream.slots for flat in slot.flat.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_a_reference_that_stays(family: str) -> None:
    policy = five_layers(family)
    stays, streams = FrozenReference.copy_of(policy), FrozenReference.copy_of(policy)
    streams.offload_layers(CPU)
    for flat in slots_of(streams):
        flat.fill_(float("nan"))  # nothing is read that was not fetched
    for seed in range(3):
        batch = planned_batch(seed=seed)
        assert torch.equal(streams.logps(batch), stays.logps(batch))
        for found, expected in zip(streams.hidden(batch), stays.hidden(batch), strict=True):
            if isinstance(found, torch.Tensor):
                assert torch.equal(found, expected)
            else:
                assert torch.equal(found.weight, expected.weight)
    assert streams.fingerprint() == stays.fingerprint()


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_packed_rows(layout: str) -> None:
    policy = five_layers("llama")
    stays, streams = FrozenReference.copy_of(policy), FrozenReference.copy_of(policy)
    streams.offload_layers(CPU)
    batch = collators()[layout](AWKWARD)
    assert torch.equal(streams.logps(batch), stays.logps(batch))


def test_two_slots_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is copied once a forward, before it is needed but for the very first; it computes
    from a slot, and what is outside of its forward is the host's.
    """
    reference = FrozenReference.copy_of(five_layers("llama"))
    whole = {n: p.clone() for n, p in reference.model.named_parameters()}
    stream = reference.offload_layers(CPU)
    events: list[tuple[str, int]] = []
    fetch = stream._fetch

    def spy(number: int, slot: Any) -> None:
        events.append(("copy", number))
        fetch(number, slot)

    monkeypatch.setattr(stream, "_fetch", spy)
    inside = {s.untyped_storage().data_ptr() for s in slots_of(reference)}
    assert len(inside) == 2

    def look(module: nn.Module, args: Any, output: Any) -> None:
        events.append(("run", decoder_layers(reference.model).index(module)))
        storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
        assert len(storages) == 1 and storages < inside

    for layer in decoder_layers(reference.model):
        layer.mlp.register_forward_hook(lambda m, a, o, layer=layer: look(layer, a, o))
    for _ in range(2):
        reference.logps(planned_batch())
        ahead = [e for i in range(5) for e in (("copy", (i + 1) % 5), ("run", i))]
        assert events in ([("copy", 0), *ahead], ahead)
        events.clear()
    for name, param in reference.model.named_parameters():
        assert torch.equal(param, whole[name]), name
        assert param.untyped_storage().data_ptr() not in inside


def test_what_stands_on_the_device_is_two_layers() -> None:
    reference = FrozenReference.copy_of(five_layers("llama"))
    layers = decoder_layers(reference.model)
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    stream = reference.offload_layers(CPU)
    padding = 256 * len(list(layers[0].parameters()))
    assert sum(sizes) <= stream.host_bytes <= sum(sizes) + 5 * padding
    assert 2 * max(sizes) <= stream.slot_bytes <= 2 * (max(sizes) + padding)
    assert "wait in host memory" in stream.describe()


def test_weights_that_layers_share_stay() -> None:
    model = five_layers("llama")
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    stays = FrozenReference.copy_of(model)
    streams = FrozenReference.copy_of(model)
    stream = streams.offload_layers(CPU)
    moved = {id(place.param) for layer in stream.layers for place in layer.places}
    layers = decoder_layers(streams.model)
    assert layers[3].mlp.up_proj.weight is layers[1].mlp.up_proj.weight
    assert id(layers[1].mlp.up_proj.weight) not in moved and len(moved) == 5 * 9 - 2
    assert torch.equal(streams.logps(planned_batch()), stays.logps(planned_batch()))


def test_an_error_in_a_layer_leaves_the_weights_where_they_belong() -> None:
    reference = FrozenReference.copy_of(five_layers("llama"))
    reference.offload_layers(CPU)
    expected = reference.logps(planned_batch())

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = decoder_layers(reference.model)[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        reference.logps(planned_batch())
    handle.remove()
    inside = {s.untyped_storage().data_ptr() for s in slots_of(reference)}
    assert all(p.untyped_storage().data_ptr() not in inside for p in reference.model.parameters())
    assert torch.equal(reference.logps(planned_batch()), expected)


def test_a_run_with_gradients_is_refused() -> None:
    reference = FrozenReference.copy_of(five_layers("llama"))
    reference.offload_layers(CPU)
    with pytest.raises(RuntimeError, match=r"run with gradients.*torch\.no_grad"):
        reference.model(torch.ones(1, 3, dtype=torch.long))


def test_models_that_cannot_be_streamed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 2 layers in a list.*drop ref_offload"):
        FrozenReference.copy_of(tiny_model("llama")).offload_layers(CPU)
    spread = FrozenReference.copy_of(five_layers("llama"))
    spread.model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"spread over devices.*reference='precomputed'"):
        spread.offload_layers(CPU)

    class Quantised(nn.Parameter):
        pass

    odd = FrozenReference.copy_of(five_layers("llama"))
    layer = decoder_layers(odd.model)[1]
    layer.mlp.up_proj.weight = Quantised(layer.mlp.up_proj.weight.data, requires_grad=False)
    with pytest.raises(ValueError, match=r"type Quantised on cpu"):
        odd.offload_layers(CPU)


def test_only_a_frozen_reference_can_wait_on_the_host(tmp_path: Any) -> None:
    policy = peft.get_peft_model(five_layers("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    args = DPOConfig(str(tmp_path), ref_offload=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=r"ref_offload=True keeps .* reference='adapter'"):
        choose_reference(args, model=policy, adapter_is_new=True)
    with pytest.raises(ValueError, match="reference='precomputed'"):
        args.precompute_ref_log_probs = True
        choose_reference(args, model=five_layers("llama"))


def test_it_is_made_on_the_host(tmp_path: Any) -> None:
    """A model that is given does not follow the policy to its device."""
    policy = five_layers("llama")
    args = DPOConfig(str(tmp_path), ref_offload=True, bf16=False, report_to="none")
    plan = choose_reference(args, model=policy)
    reference = build_reference(plan, args, policy=policy, collator=collator())
    assert isinstance(reference, FrozenReference) and reference.stream is None
    given = build_reference(
        plan, args, policy=policy.to("meta"), ref_model=reference.model, collator=collator()
    )
    assert isinstance(given, FrozenReference)
    assert {p.device.type for p in given.model.parameters()} == {"cpu"}


def test_a_training_with_it_is_the_same_training() -> None:
    policy = five_layers("llama")
    reference = five_layers("llama")
    perturb(reference, scale=0.02)
    runs = []
    for offload in (False, True):
        import dpo_fast

        config = config_kwargs(reference="frozen", ref_offload=offload, max_steps=3)
        runs.append(
            train(dpo_fast.Trainer, dpo_fast.DPOConfig, policy, ref_model=reference, config=config)
        )
    assert (runs[0].trainer.reference.stream, runs[1].trainer.reference.stream is None) == (
        None,
        False,
    )
    assert relative_update_error(runs[1], runs[0]) == 0.0
    assert_same_log(runs[1], runs[0], tolerance=0.0)
