"""The table of combinations: what is asked for, flags, adapters, reference models, data sets."""

import itertools
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset, IterableDataset

from dpo_fast.config import DPOConfig
from dpo_fast.reference import (
    AdapterReference,
    EmaReference,
    FrozenReference,
    PrecomputedReference,
    build_reference,
    choose_reference,
)
from dpo_fast.reference.choose import Situation, decide
from dpo_fast.reference.estimate import count_tokens, reference_seconds, size_text, weight_bytes
from tests.reference.common import collator, perturb, plain_logps, planned_batch, token_rows
from tests.tiny import tiny_model

# What is asked for, the flags, whether a ref_model is given, the adapter -> the strategy that
# answers.
VALID: list[tuple[dict[str, Any], str, str]] = [
    ({}, "frozen", "full fine-tuning"),
    ({"peft": "new"}, "adapter", "new adapter"),
    ({"peft": "continued"}, "adapter", "goes on training"),
    ({"ref_model": True}, "frozen", "ref_model was given"),
    ({"ref_model": True, "peft": "new"}, "frozen", "ref_model was given"),
    ({"ref_model": True, "peft": "continued"}, "frozen", "ref_model was given"),
    ({"precompute_flag": True}, "precomputed", "precompute_ref_log_probs=True"),
    ({"precompute_flag": True, "ref_model": True}, "precomputed", "precompute_ref_log_probs=True"),
    ({"precompute_flag": True, "peft": "new"}, "precomputed", "precompute_ref_log_probs=True"),
    ({"sync_flag": True}, "ema", "sync_ref_model=True"),
    ({"sync_flag": True, "ref_model": True}, "ema", "sync_ref_model=True"),
    ({"sync_flag": True, "peft": "new"}, "ema", "sync_ref_model=True"),
    ({"sync_flag": True, "peft": "continued"}, "ema", "sync_ref_model=True"),
    ({"asked": "frozen"}, "frozen", "asked for"),
    ({"asked": "frozen", "peft": "new"}, "frozen", "asked for"),
    ({"asked": "adapter", "peft": "new"}, "adapter", "asked for"),
    ({"asked": "adapter", "peft": "continued"}, "adapter", "asked for"),
    ({"asked": "precomputed"}, "precomputed", "asked for"),
    ({"asked": "precomputed", "precompute_flag": True}, "precomputed", "asked for"),
    ({"asked": "precomputed", "ref_model": True, "peft": "continued"}, "precomputed", "asked for"),
    ({"asked": "ema"}, "ema", "asked for"),
    ({"asked": "ema", "sync_flag": True}, "ema", "asked for"),
    ({"asked": "ema", "ref_model": True}, "ema", "asked for"),
    ({"asked": "ema", "peft": "continued"}, "ema", "asked for"),
    ({"streamed": "train"}, "frozen", "full fine-tuning"),
    ({"streamed": "train", "peft": "new"}, "adapter", "new adapter"),
    ({"streamed": "eval", "sync_flag": True}, "ema", "sync_ref_model=True"),
    ({"trained": False}, "frozen", "full fine-tuning"),
    ({"needs_reference": False}, "none", "the loss needs none"),
    ({"needs_reference": False, "peft": "new"}, "none", "the loss needs none"),
    ({"needs_reference": False, "ref_model": True}, "frozen", "ref_model was given"),
    ({"needs_reference": False, "precompute_flag": True}, "precomputed", "precompute_ref"),
    ({"needs_reference": False, "asked": "frozen"}, "frozen", "asked for"),
    ({"offload": True}, "frozen", "full fine-tuning"),
    ({"offload": True, "ref_model": True, "peft": "new"}, "frozen", "ref_model was given"),
    ({"offload": True, "asked": "frozen", "peft": "continued"}, "frozen", "asked for"),
]

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"asked": "froze"}, r"'froze' is unknown; use 'auto' or one of 'frozen', 'adapter'"),
    ({"precompute_flag": True, "sync_flag": True}, r"exclude each other.*Drop one"),
    (
        {"asked": "ema", "precompute_flag": True, "sync_flag": True},
        r"exclude each other.*Drop one",
    ),
    ({"asked": "frozen", "precompute_flag": True}, r"drop precompute_ref_log_probs, or set"),
    ({"asked": "adapter", "precompute_flag": True, "peft": "new"}, r"reference='precomputed'"),
    ({"asked": "ema", "precompute_flag": True}, r"name two references"),
    ({"asked": "frozen", "sync_flag": True}, r"drop sync_ref_model, or set reference='ema'"),
    ({"asked": "adapter", "sync_flag": True, "peft": "new"}, r"name two references"),
    ({"asked": "precomputed", "sync_flag": True}, r"name two references"),
    ({"asked": "adapter"}, r"pass peft_config \(or a PeftModel\), or use reference='frozen'"),
    ({"asked": "adapter", "peft": "new", "ref_model": True}, r"drop ref_model, or use"),
    ({"asked": "adapter", "ref_model": True}, r"drop ref_model, or use"),
    ({"asked": "precomputed", "streamed": "train"}, r"'train' is a stream.*without streaming"),
    ({"precompute_flag": True, "streamed": "valid"}, r"'valid' is a stream.*reference='frozen'"),
    ({"sync_flag": True, "peft": "new", "ref_model": True}, r"averages the adapter's weights"),
    ({"asked": "ema", "peft": "continued", "ref_model": True}, r"drop ref_model"),
    ({"asked": "ema", "trained": False}, r"nothing would ever change.*is_trainable=True"),
    ({"offload": True, "peft": "new"}, r"reference='adapter': .*Drop ref_offload, or set"),
    ({"offload": True, "asked": "precomputed"}, r"reference='precomputed': .*Drop ref_offload"),
    ({"offload": True, "sync_flag": True}, r"reference='ema': sync_ref_model.*Drop ref_offload"),
    ({"offload": True, "needs_reference": False}, r"reference='none': .*Drop ref_offload"),
    ({"offload": True, "asked": "adapter", "peft": "new", "ref_model": True}, r"drop ref_model"),
]


@pytest.mark.parametrize(("situation", "name", "reason"), VALID)
def test_valid_combinations(situation: dict[str, Any], name: str, reason: str) -> None:
    plan = decide(Situation(**situation))
    assert plan.name == name and reason in plan.reason
    assert plan.line() == f"reference={name!r}: {plan.reason}."


@pytest.mark.parametrize(("situation", "message"), INVALID)
def test_invalid_combinations_raise_with_the_remedy(
    situation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decide(Situation(**situation))


def expected(s: Situation) -> str | None:
    """The rules once more, as a person would state them; None: must raise."""
    if s.precompute_flag and s.sync_flag:
        return None
    flagged = "precomputed" if s.precompute_flag else "ema" if s.sync_flag else None
    if s.asked != "auto" and flagged not in (None, s.asked):
        return None
    name = flagged if s.asked == "auto" else s.asked
    if name is None:
        name = "adapter" if s.peft != "no" and not s.ref_model else "frozen"
        if not s.ref_model and not s.needs_reference:
            name = "none"
    impossible = {
        "adapter": s.peft == "no" or s.ref_model,
        "precomputed": s.streamed is not None,
        "ema": (s.peft != "no" and s.ref_model) or not s.trained,
    }
    if s.offload and name != "frozen":
        return None
    return None if impossible.get(name) else name


def test_the_whole_table() -> None:
    """All 1920 combinations are either answered or refused with a remedy."""
    axes: dict[str, tuple[Any, ...]] = {
        "asked": ("auto", "frozen", "adapter", "precomputed", "ema"),
        "precompute_flag": (False, True),
        "sync_flag": (False, True),
        "ref_model": (False, True),
        "peft": ("no", "new", "continued"),
        "streamed": (None, "train"),
        "needs_reference": (True, False),
        "trained": (True, False),
        "offload": (False, True),
    }
    counts = {"answered": 0, "refused": 0}
    for values in itertools.product(*axes.values()):
        situation = Situation(**dict(zip(axes, values, strict=True)))
        answer = expected(situation)
        if answer is None:
            counts["refused"] += 1
            with pytest.raises(ValueError, match=r"[Dd]rop|pass|load it|unfreeze") as raised:
                decide(situation)
            assert len(str(raised.value)) > 80
        else:
            counts["answered"] += 1
            assert decide(situation).name == answer, situation
    assert counts == {"answered": 308, "refused": 1612}


# -- from real arguments to a working reference
# ------------------------------------------------------


def config(tmp_path: Path, **kwargs: Any) -> DPOConfig:
    fields = {"bf16": False, "use_cpu": True, "report_to": "none", "num_train_epochs": 3}
    fields |= {"output_dir": str(tmp_path), "ref_cache_dir": str(tmp_path / "cache")}
    return DPOConfig(**{**fields, **kwargs})


def adapter_policy(trainable: bool = True) -> Any:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny_model(), lora)
    perturb(policy)
    return policy if trainable else policy.requires_grad_(False)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["full", "new", "continued"])
@pytest.mark.parametrize("asked", ["auto", "frozen", "adapter", "precomputed", "ema"])
def test_every_valid_combination_answers_rightly(
    tmp_path: Path, asked: str, kind: str, given: bool
) -> None:
    args = config(tmp_path, reference=asked, ld_alpha=0.5)
    policy = tiny_model() if kind == "full" else adapter_policy()
    ref_model = tiny_model(seed=1) if given else None
    data = Dataset.from_list(token_rows(5))
    arguments = {"model": policy, "ref_model": ref_model, "adapter_is_new": kind == "new"}
    situation = Situation(asked=asked, ref_model=given, peft="no" if kind == "full" else kind)  # type: ignore[arg-type]
    if expected(situation) is None:
        with pytest.raises(ValueError, match=r"drop|pass"):
            choose_reference(args, **arguments, train_dataset=data)
        return
    batch = collator(args.max_length)(token_rows(5))
    answers = ref_model if given else policy
    if kind == "new" and not given and asked in ("auto", "adapter", "precomputed"):
        answers = tiny_model()
    wanted = plain_logps(answers, batch, ld_alpha=0.5)
    plan = choose_reference(args, **arguments, train_dataset=data)
    reference: Any = build_reference(
        plan, args, policy=policy, ref_model=ref_model, collator=collator(args.max_length)
    )
    if isinstance(reference, PrecomputedReference):
        attached = reference.attach(data)
        reference.release()
        batch = collator(args.max_length)(list(attached))
    perturb(policy, seed=2)
    torch.testing.assert_close(reference.logps(batch).double(), wanted, rtol=2e-6, atol=2e-5)
    kinds = {
        "frozen": FrozenReference,
        "adapter": AdapterReference,
        "precomputed": PrecomputedReference,
        "ema": EmaReference,
    }
    assert type(reference) is kinds[plan.name] and reference.name == plan.name


def test_no_reference_where_the_loss_needs_none(tmp_path: Path) -> None:
    args = config(tmp_path)
    plan = choose_reference(args, model=tiny_model(), needs_reference=False)
    assert build_reference(plan, args, policy=tiny_model(), collator=collator()) is None


def test_streams_are_named_wherever_they_are(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(token_rows(3)))
    rows = Dataset.from_list(token_rows(3))
    args = config(tmp_path, precompute_ref_log_probs=True)
    for datasets, name in (
        ({"train_dataset": stream}, "train"),
        ({"train_dataset": rows, "eval_dataset": stream}, "eval"),
        ({"train_dataset": rows, "eval_dataset": {"a": rows, "b": stream}}, "b"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' is a stream"):
            choose_reference(args, model=tiny_model(), **datasets)


def test_the_same_object_twice_raises(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="same object"):
        choose_reference(config(tmp_path), model=model, ref_model=model)


def test_a_policy_without_trained_parameters_cannot_be_followed(tmp_path: Path) -> None:
    args = config(tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match="is_trainable=True"):
        choose_reference(args, model=adapter_policy(trainable=False))


def test_trls_flags_reach_the_moving_reference(tmp_path: Path) -> None:
    args = config(tmp_path, sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=7)
    policy = tiny_model()
    plan = choose_reference(args, model=policy)
    reference: Any = build_reference(plan, args, policy=policy, collator=collator())
    assert (reference.alpha, reference.every) == (0.25, 7)


def test_mixed_precision_and_head_options_reach_the_reference(tmp_path: Path) -> None:
    args = config(tmp_path, bf16=True, lm_head_backend="naive")
    policy = tiny_model()
    plan = choose_reference(args, model=policy)
    reference: Any = build_reference(plan, args, policy=policy, collator=collator())
    assert reference.scoring.autocast_dtype == torch.bfloat16
    assert reference.scoring.backend == "naive"
    exact = plain_logps(policy, planned_batch())
    assert 1e-4 < (reference.logps(planned_batch()) - exact).abs().max() < 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reference.logps(planned_batch())
    assert torch.equal(inside, reference.logps(planned_batch()))


def test_the_log_says_which_why_and_what_precomputed_would_save(
    tmp_path: Path, caplog: Any
) -> None:
    args, policy = config(tmp_path), tiny_model()
    data = Dataset.from_list(token_rows(50))
    plan = choose_reference(args, model=policy)
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        build_reference(plan, args, policy=policy, collator=collator(), train_dataset=data)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("reference=")]
    assert lines[0].startswith("reference='frozen': full fine-tuning, so a copy")
    size = re.escape(size_text(weight_bytes(policy)))
    assert re.search(
        rf"reference='precomputed' would free {size} and save about [\d,.]+ s", lines[1]
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        build_reference(
            plan, args, policy=policy, collator=collator(), train_dataset=data, log=False
        )
    assert not [r for r in caplog.records if "reference=" in r.getMessage()]


def test_the_estimate_counts_tokens_and_is_of_the_right_size() -> None:
    rows = token_rows(30)
    data = Dataset.from_list(rows)
    for limit in (None, 9):
        batch = collator(limit)(rows)
        assert count_tokens(data, limit) == int(batch["attention_mask"].sum())
    model = tiny_model(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    device = torch.device("cpu")
    one = reference_seconds(model, 10_000, device, torch.float32)
    assert 1e-4 < one < 60


def test_names_are_loaded_at_first_use() -> None:
    code = (
        "import sys; import dpo_fast.reference as r; before = set(sys.modules);bad = [m for m in "
        "('torch', 'transformers', 'peft', 'datasets', 'trl') if m in before];assert not bad, "
        "bad; r.REFERENCE_NAMES; r.PrecomputedReference; r.FrozenReference;bad = [m for m in "
        "('transformers', 'peft', 'datasets', 'trl', 'triton') if m in sys.modules];assert not "
        "bad, bad;assert all(hasattr(r, n) for n in r.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
