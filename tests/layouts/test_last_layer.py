"""The last layer computes scored rows only: which rows its parts see, and that nothing changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpo_fast.batch import PlannedCollator
from dpo_fast.data import DataCollatorForPreference
from dpo_fast.layouts import last_layer, segment_attention_in
from dpo_fast.layouts.joined_rows import join_rows
from dpo_fast.layouts.last_layer import position_wise_parts, scored_index, scored_rows_in_last_layer
from dpo_fast.layouts.segments import Segment, Segments
from dpo_fast.models import base_causal_lm, forward_scored, install_scoring
from dpo_fast.models.backbone import run_backbone
from dpo_fast.models.layers import layer_list
from tests.layouts.compare import AWKWARD, collators, global_error, run_step
from tests.tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")


@contextmanager
def seen_by_parts(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Rows that each part of the last layer computes, call by call; of the one before, as well."""
    layers = layer_list(model)
    assert layers is not None
    found: dict[str, list[int]] = {}

    def note(name: str) -> Any:
        # Of the linear layers inside, which get what the hooks of the part hand on.
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(name, []).append(output.shape[-2])

        return hook

    handles = []
    for place, layer in (("last", layers[-1]), ("other", layers[-2])):
        for part in position_wise_parts(layer):
            linear = [m for m in part.modules() if isinstance(m, nn.Linear)][-1:]
            if not linear:
                continue  # experts hold their weights as parameters
            name = f"{place} {next(n for n, m in layer.named_modules() if m is part)}"
            if linear[0] is part:  # a hook of the part itself would see what `widen` made
                inner = part.forward
                part.forward = counted(inner, found.setdefault(name, []))
                handles.append(part)
            else:
                handles.append(linear[0].register_forward_hook(note(name)))
    try:
        yield found
    finally:
        for handle in handles:
            if isinstance(handle, nn.Module):
                del handle.__dict__["forward"]
            else:
                handle.remove()


def counted(forward: Any, rows: list[int]) -> Any:
    def call(x: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[-2])
        return forward(x)

    return call


def rows_seen(model: nn.Module, batch: dict[str, Any], **options: Any) -> dict[str, set[int]]:
    with seen_by_parts(model) as found:
        run_step(model, batch, **options)
    return {name: set(rows) for name, rows in found.items()}


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_of_the_last_layer_see_scored_rows_only(layout: str, checkpointing: bool) -> None:
    model = tiny_model("llama").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collators()[layout](AWKWARD)
    segments = batch["pair_segments"]
    scored = len(set(batch["token_index"].tolist()))
    assert scored < 0.9 * segments.length
    assert rows_seen(model, batch) == {
        "last mlp": {scored}, "last self_attn.q_proj": {scored}, "last self_attn.o_proj": {scored},
        "other mlp": {segments.length}, "other self_attn.q_proj": {segments.length},
        "other self_attn.o_proj": {segments.length},
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_values_and_gradients_are_those_of_the_whole_layer(
    family: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).double()
    batch = collators()[layout](AWKWARD)
    found = run_step(model, batch)
    monkeypatch.setattr(last_layer, "_WORTH", 0.0)
    whole = run_step(model, batch)
    # Some families keep float32 islands; their rounding depends on the rows beside.
    assert (found.logps - whole.logps).norm() <= 1e-10 * whole.logps.norm()
    assert global_error(found.grads, whole.grads) < 1e-9


# Parallel residuals, one projection for all, norms behind, no gate, layers that run in cycles.
STRUCTURES = ("cohere", "gpt_neox", "olmo2", "opt", "hrm_text")


@pytest.mark.parametrize("family", STRUCTURES)
def test_other_structures(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200,
        "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0,
        "initializer_range": 0.3,
    }  # fmt: skip
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in sizes.items() if hasattr(known, k)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    batch = collators()["shared_prefix"](AWKWARD)
    found = run_step(model, batch)
    monkeypatch.setattr(last_layer, "_WORTH", 0.0)
    whole = run_step(model, batch)
    assert (found.logps - whole.logps).norm() <= 1e-10 * whole.logps.norm()
    assert global_error(found.grads, whole.grads) < 1e-9


def test_two_passes_before_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint runs the layer again with the rows of its own pass."""
    model = tiny_model("qwen3").double().train()
    install_scoring(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [collators()["shared_prefix"](AWKWARD[i::2]) for i in range(2)]

    def grads() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with segment_attention_in(model):
            values = [
                forward_scored(model, b, lambda h, head: h[:, :7].sum()).value for b in batches
            ]
            (values[0] * values[1]).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = grads()
    monkeypatch.setattr(last_layer, "_WORTH", 0.0)
    assert global_error(found, grads()) < 1e-9


def test_joined_rows_know_what_is_scored() -> None:
    collator = PlannedCollator(DataCollatorForPreference(pad_token_id=0), plan_rows=join_rows)
    batch = collator(AWKWARD)
    joined = batch["row_groups"]
    flat = batch["input_ids"].flatten()[batch["token_index"]]
    row = torch.cat([ids[:n] for ids, n in zip(batch["input_ids"], joined.lengths, strict=True)])
    assert torch.equal(
        row[torch.from_numpy(joined.segments.scored)].sort().values, flat.sort().values
    )
    model = tiny_model("llama")
    install_scoring(model)
    with segment_attention_in(model), seen_by_parts(model) as seen:
        forward_scored(model, batch, lambda hidden, head: hidden)
    assert set(seen["last mlp"]) == {len(batch["token_index"])}
    assert set(seen["other mlp"]) == {sum(joined.lengths)}


def test_all_rows_are_computed_for_whoever_reads_them() -> None:
    model = tiny_model("llama")
    batch = collators()["packed"](AWKWARD)
    given = {k: batch[k] for k in ("input_ids", "position_ids", "pair_segments")}
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool)
    with segment_attention_in(model), seen_by_parts(model) as seen:
        hidden = base_causal_lm(model).base_model(**given, attention_mask=mask)[0]
    assert set(seen["last mlp"]) == {batch["pair_segments"].length}
    assert hidden.abs().sum(-1).min() > 0


def test_router_statistics_are_of_all_tokens() -> None:
    model = tiny_model("qwen3_moe")
    batch = collators()["packed"](AWKWARD)
    length = batch["pair_segments"].length
    assert rows_seen(model, batch, aux_loss=True)["last self_attn.q_proj"] == {length}
    assert rows_seen(model, batch)["last self_attn.q_proj"] == {len(batch["token_index"])}


def test_adapters_of_the_last_layer_get_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model("qwen2"), config).double()
    batch = collators()["shared_prefix"](AWKWARD)
    found = run_step(model, batch)
    monkeypatch.setattr(last_layer, "_WORTH", 0.0)
    whole = run_step(model, batch)
    assert any("layers.1.mlp" in name for name in found.grads)
    assert global_error(found.grads, whole.grads) < 1e-9


class FeedForwardFirst(nn.Module):
    """A decoder layer whose feed-forward part runs before its attention."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return self.q_proj(x)

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = self.Attention(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        fed = self.mlp(x)
        return fed, self.self_attn(x, **kwargs)


def test_a_part_that_runs_before_the_attention_computes_all_rows() -> None:
    """It cannot know whose rows: without the layer's hooks it would take those of another pass."""
    layer = FeedForwardFirst()
    model = nn.Module()
    model.layers = nn.ModuleList([FeedForwardFirst(), layer])
    x = torch.randn(1, 10, 4)
    with scored_rows_in_last_layer(model):
        for scored in ([1, 2], [3, 4, 5]):
            segments = Segments([Segment(0, 10)], np.array(scored)).for_scored()
            # As a checkpoint calls it again: no hooks of the layer.
            for run in (layer, layer.forward):
                fed, queries = run(x, pair_segments=segments)
                segments.scored_pass.is_over = True
                assert torch.equal(fed, nn.functional.linear(x, layer.mlp.weight, layer.mlp.bias))
                rows = queries[0].abs().sum(-1).nonzero().flatten().tolist()
                assert rows == segments.scored.tolist()


class RunsTwice(nn.Module):
    """A layer that mixes tokens in its attention; the model's forward runs the stack twice."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = FeedForwardFirst.Attention(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.self_attn(x, **kwargs).cumsum(1)
        return x + self.mlp(x).tanh()


def test_a_model_that_runs_its_last_layer_again_gets_all_rows() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([RunsTwice(), RunsTwice()]).double()
    x = torch.randn(1, 10, 4, dtype=torch.float64)
    runs = []

    def backbone(**kwargs: Any) -> torch.Tensor:
        runs.append(kwargs["pair_segments"].scored_pass is not None)
        hidden = x
        for _ in range(2):
            for layer in model.layers:
                hidden = layer(hidden, **kwargs)
        return hidden

    segments = Segments([Segment(0, 10)], np.array([7, 8]))
    expected = backbone(pair_segments=segments)
    with scored_rows_in_last_layer(model):
        for expected_runs in ([False, True, False], [False, True, False, True]):
            found = run_backbone(backbone, {"pair_segments": segments.for_scored()})
            assert torch.equal(found, expected) and runs == expected_runs


def test_inside_twice_is_inside_once() -> None:
    """A reference is, in a training whose layout has entered it and its own pass again."""
    model = tiny_model("llama")
    batch = collators()["packed"](AWKWARD)
    with segment_attention_in(model, model), segment_attention_in(model):
        found = rows_seen(model, batch)
        with seen_by_parts(model) as seen:
            forward_scored(model, batch, lambda hidden, head: hidden)
    assert found["last mlp"] == {len(batch["token_index"])}
    assert all(len(rows) == 1 for rows in seen.values())


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_model("llama")
    modules = list(model.modules())
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    with segment_attention_in(model):
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] != before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] == before


def test_rows_are_selected_where_it_pays() -> None:
    spans = [Segment(0, 100)]
    for scored, selects in ((range(10), True), (range(90), True), (range(91), False), ([], False)):
        segments = Segments(spans, np.array(list(scored), dtype=np.int64))
        assert scored_index(segments, CPU) is None
        index = scored_index(segments.for_scored(), CPU)
        assert (index is not None) == selects
        if index is not None:
            assert index.tolist() == list(scored)
    assert scored_index(Segments(spans).for_scored(), CPU) is None
    with pytest.raises(ValueError, match="from 3 to 100 do not lie in a row of 100"):
        Segments(spans, np.array([3, 100]))
