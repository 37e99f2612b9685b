"""The trainer in every batch layout: TRL's trajectory, references, evaluation, what is logged."""

import logging
from pathlib import Path
from typing import Any

import pytest

import dpo_fast
from dpo_fast.layouts import PackedCollator, SharedPrefixCollator
from dpo_fast.models import SegmentsIgnored
from dpo_fast.models.layers import layer_list
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import STRATEGIES, strategy_arguments
from tests.trainer.parity import (
    Run,
    assert_same_log,
    config_kwargs,
    perturbed,
    relative_update_error,
    rows,
    train,
)

LAYOUTS = ("padded", "packed", "shared_prefix")
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3}


def ours(**config: Any) -> Run:
    arguments = {k: config.pop(k) for k in ("dataset", "trainer_kwargs") if k in config}
    reference = config.pop("ref_model", perturbed(tiny_model("llama")))
    model = config.pop("model", None) or tiny_model("llama")
    return train(
        dpo_fast.Trainer,
        dpo_fast.DPOConfig,
        model,
        ref_model=reference,
        config=config_kwargs(**config),
        **arguments,
    )


@pytest.fixture(scope="module")
def trl_run() -> Run:
    import trl

    model = tiny_model("llama")
    config = config_kwargs(max_steps=30)
    return train(trl.DPOTrainer, trl.DPOConfig, model, ref_model=perturbed(model), config=config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_thirty_steps_follow_trl(layout: str, trl_run: Run) -> None:
    run = ours(batch_layout=layout, max_steps=30)
    assert run.trainer.layout.name == layout
    assert_same_log(run, trl_run, 1e-4)
    assert relative_update_error(run, trl_run) < 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_every_reference_in_every_layout(layout: str, strategy: str, tmp_path: Path) -> None:
    arguments, shared, own = strategy_arguments(strategy)
    common = {**SGD, **shared, **own}
    arguments.setdefault("ref_model", None)
    # one cache each: log-probs that padded rows left would be found by packed ones
    padded, packed = (
        ours(batch_layout=name, ref_cache_dir=str(tmp_path / name), **common, **arguments)
        for name in ("padded", layout)
    )
    assert packed.trainer.layout.name == layout
    assert relative_update_error(packed, padded) < 1e-5
    for a, b in zip(packed.log, padded.log, strict=True):
        for key in ("loss", "rewards/margins", "logps/rejected", "num_tokens", "entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key


def test_the_cache_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    computed = {}
    for layout in LAYOUTS:
        config = {"reference": "precomputed", "ref_cache_dir": str(tmp_path), "max_steps": 1}
        computed[layout] = ours(batch_layout=layout, **config).trainer.reference.computed
    assert computed["padded"] > 0 and computed["packed"] == computed["shared_prefix"] == 0


def test_the_attention_is_restored(tmp_path: Path) -> None:
    trainer = ours(batch_layout="shared_prefix", max_steps=1).trainer
    models = (trainer.model, trainer.ref_model)
    assert [m.config._attn_implementation for m in models] == ["sdpa", "sdpa"]
    with trainer.layout_attention():
        assert [m.config._attn_implementation for m in models] == ["dpo_fast", "dpo_fast"]
    batch = trainer.batch_collator(list(trainer.train_dataset.select(range(2))))
    with pytest.raises(SegmentsIgnored):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_checkpointing_and_adapters(layout: str) -> None:
    arguments, _, own = strategy_arguments("adapter")
    common = {**SGD, **own, **arguments, "ref_model": None}
    plain = ours(batch_layout="padded", **common)
    again = ours(batch_layout=layout, gradient_checkpointing=True, **common)
    assert relative_update_error(again, plain) < 1e-5


def test_evaluation_in_every_layout() -> None:
    losses = []
    for layout in LAYOUTS:
        run = ours(batch_layout=layout, max_steps=1)
        losses.append(run.trainer.evaluate(rows(7, seed=5)))
    for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_num_tokens"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-5)
        assert losses[2][key] == pytest.approx(losses[0][key], rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [{"batch_layout": "padded"}, {"batch_layout": "shared_prefix"}, {"reference": "precomputed"}],
)
def test_predict_takes_raw_rows_as_evaluate_does(config: dict[str, Any], tmp_path: Any) -> None:
    trainer = ours(max_steps=1, ref_cache_dir=str(tmp_path), **config).trainer
    expected = trainer.evaluate(rows(7, seed=5))
    output = trainer.predict(rows(7, seed=5))
    assert output.predictions.shape[0] == 14 == output.label_ids.shape[0]
    assert output.predictions.shape[-1] == trainer.model.config.vocab_size
    for key in ("loss", "rewards/margins", "logps/chosen", "num_tokens"):
        assert output.metrics[f"test_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-5)
    # nothing of the prediction is left for the next evaluation
    again = trainer.evaluate(rows(3, seed=6))
    assert again["eval_rewards/margins"] != pytest.approx(expected["eval_rewards/margins"])
    assert again == pytest.approx(trainer.evaluate(rows(3, seed=6)) | _timings(again))


def _timings(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k.endswith(("runtime", "_per_second"))}


def test_metrics_of_logits_are_computed_on_padded_rows() -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"one": 1.0}

    run = ours(
        batch_layout="shared_prefix",
        max_steps=1,
        trainer_kwargs={"compute_metrics": metrics, "eval_dataset": rows(6, seed=5)},
    )
    assert run.trainer.evaluate()["eval_one"] == 1.0
    assert seen[0][0][:2] == seen[0][1] and seen[0][0][0] == 12
    assert isinstance(run.trainer.data_collator, SharedPrefixCollator)


def test_what_was_saved_is_logged() -> None:
    logs = {layout: ours(batch_layout=layout, max_steps=1).log[0] for layout in LAYOUTS}
    padded, packed, shared = (logs[layout] for layout in LAYOUTS)
    # on a CPU padded rows of this family run joined
    assert padded["perf/padding_saved"] == packed["perf/padding_saved"] > 0.05
    assert packed["perf/padding_saved"] == shared["perf/padding_saved"]
    assert padded["perf/prefix_saved"] == packed["perf/prefix_saved"] == 0.0
    assert 0.0 < shared["perf/prefix_saved"] < 0.5
    assert padded["num_tokens"] == packed["num_tokens"] == shared["num_tokens"]


def test_padding_free_means_packed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dpo_fast"):
        run = ours(padding_free=True, max_steps=1)
    assert type(run.trainer.data_collator) is PackedCollator
    assert "batch_layout=packed" in caplog.text


def test_auto_chooses_by_the_data_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dpo_fast"):
        assert ours(max_steps=1).trainer.layout.name == "shared_prefix"
    assert "batch_layout=auto: shared_prefix" in caplog.text and "24 pairs" in caplog.text


def test_a_callers_collator_stays_padded(caplog: pytest.LogCaptureFixture) -> None:
    inner = dpo_fast.DataCollatorForPreference(pad_token_id=0, max_length=24)
    with caplog.at_level(logging.INFO, "dpo_fast"):
        run = ours(
            batch_layout="packed", max_steps=1, trainer_kwargs={"data_collator": lambda r: inner(r)}
        )
    assert run.trainer.layout.name == "padded" and "caller's own" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_layout": "dense"}, "batch_layout='dense'"),
        ({"padding_free": True, "batch_layout": "padded"}, "drop one"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(max_steps=1, **config)


@pytest.mark.parametrize("strategy", ["frozen", "adapter", "ema"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_each_model_runs_its_layers_once(layout: str, strategy: str) -> None:
    """Policy and reference, a forward each: a pass that had to run again would cost its time."""
    arguments, shared, own = strategy_arguments(strategy)
    config = config_kwargs(**{**shared, **own, "max_steps": 2, "batch_layout": layout})
    trainer = dpo_fast.Trainer(
        tiny_model("llama"),
        arguments.get("ref_model"),
        dpo_fast.DPOConfig(**config),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        **arguments.get("trainer_kwargs", {}),
    )
    models = [trainer.model, getattr(trainer.reference, "module", None)]
    layers = {list_[0] for list_ in (layer_list(m) for m in models if m is not None) if list_}
    runs = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    trainer.train()
    assert len(runs) == 2 * 2  # two steps, policy and reference
