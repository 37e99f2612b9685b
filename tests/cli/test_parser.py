"""Flags and config file: every field, TRL's names, flags over the file, and what is refused."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_fast.cli.arguments import DataArguments, ModelArguments
from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.fields import OptionTable
from dpo_fast.cli.parser import Arguments
from dpo_fast.cli.parser import parse as parse_words
from dpo_fast.config import REMOVED_FIELDS, DPOConfig

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def parse(*words: str, **config: Any) -> Arguments:
    """``words``, over a file that holds ``config``."""
    if config:
        Path("run.yaml").write_text(yaml.safe_dump(config))
        words = ("--config", "run.yaml", *words)
    return parse_words("dpo-fast train", "", [*NEEDED, *words])


def table() -> OptionTable:
    return OptionTable((DPOConfig, ModelArguments, DataArguments), REMOVED_FIELDS)


def test_every_field_is_an_option() -> None:
    options = table()
    for cls in (DPOConfig, ModelArguments, DataArguments):
        for f in dataclasses.fields(cls):
            if f.init:
                assert options.find(f.name, f.name).name == f.name


def test_trl_names_and_defaults() -> None:
    trl = pytest.importorskip("trl")
    options = table()
    for cls in (trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig):
        for f in dataclasses.fields(cls):
            assert options.find(f.name, f.name)
    own = {f.name: f.default for f in dataclasses.fields(ModelArguments)}
    for f in dataclasses.fields(trl.ModelConfig):
        assert own[f.name] == f.default, f.name


def test_defaults_are_the_configs_own() -> None:
    got, expected = parse().training, DPOConfig("m-DPO")
    for f in dataclasses.fields(DPOConfig):
        if f.init and f.name not in ("logging_dir", "run_name"):
            assert str(getattr(got, f.name)) == str(getattr(expected, f.name)), f.name


def test_file_and_flags_give_the_same() -> None:
    config = {
        "beta": 0.3,
        "learning_rate": "5e-6",  # YAML 1.1 reads 5e-6 as text
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1, 0.5],
        "gradient_checkpointing": False,
        "lr_scheduler_kwargs": {"min_lr": 1e-8},
        "lora_target_modules": ["q_proj", "v_proj"],
        "streaming": True,
        "eval-strategy": "epoch",
        "max_length": 99,
    }
    words = ["--beta", "0.3", "--learning_rate", "5e-6", "--loss_type", "sigmoid", "sft"]
    words += ["--loss_weights", "1", "0.5", "--no_gradient_checkpointing"]
    words += ["--lr_scheduler_kwargs", json.dumps({"min_lr": 1e-8}), "--dataset_streaming"]
    words += ["--lora_target_modules", "q_proj", "v_proj", "--eval-strategy=epoch"]
    words += ["--max-length", "99"]
    by_file, by_flags = parse(**config), parse(*words)
    assert by_file.model == by_flags.model and by_file.data == by_flags.data
    assert by_file.data.streaming and by_file.model.target_modules == ["q_proj", "v_proj"]
    for args in (by_file.training, by_flags.training):
        assert (args.beta, args.learning_rate, args.max_length) == (0.3, 5e-6, 99)
        assert args.loss_type == ["sigmoid", "sft"] and args.loss_weights == [1.0, 0.5]
        assert args.lr_scheduler_kwargs == {"min_lr": 1e-8}
        assert args.gradient_checkpointing is False and args.eval_strategy == "epoch"


def test_flags_win() -> None:
    file = {"beta": 0.3, "max_length": 99, "loss_type": ["ipo", "sft"], "gradient_checkpointing": 0}
    file["max_steps"] = 7
    args = parse(
        *("--beta", "0.7", "--max_length", "none", "--loss_type", "hinge"),
        *("--gradient_checkpointing", "true"),
        **file,
    ).training
    assert (args.beta, args.max_length, args.loss_type) == (0.7, None, ["hinge"])
    assert args.gradient_checkpointing and args.max_steps == 7


def test_last_flag_wins_and_none_is_a_value() -> None:
    assert parse("--max_length", "none").training.max_length is None
    assert parse("--max_length=none", "--max_length", "9").training.max_length == 9
    assert parse("--max_length=9", "--max_length", "none").training.max_length is None
    assert parse(max_length=None).training.max_length is None
    assert parse("--report_to", "none").training.report_to == []


def test_switches() -> None:
    assert parse("--bf16").training.bf16 is True
    assert parse("--bf16", "false").training.bf16 is False
    assert parse("--sync_ref_model", "--seed", "3").training.sync_ref_model
    assert parse("--no_disable_dropout").training.disable_dropout is False
    assert parse("--resume_from_checkpoint").training.resume_from_checkpoint == "true"
    assert parse(resume_from_checkpoint=True).training.resume_from_checkpoint == "true"


def test_yaml_reads_no_as_false() -> None:
    Path("no.yaml").write_text("eval_strategy: no\nsave_strategy: no\nbf16: no\n")
    args = parse("--config=no.yaml").training
    assert (args.eval_strategy, args.save_strategy, args.bf16) == ("no", "no", False)


def test_json_for_dicts() -> None:
    args = parse("--liger_kernel_config", '{"rms_norm": true}').training
    assert args.liger_kernel_config == {"rms_norm": True}
    assert parse(model_init_kwargs={"a": 1}).training.model_init_kwargs == {"a": 1}
    assert parse(report_to=["none"]).training.report_to == []


def test_output_dir_is_named_after_the_model() -> None:
    assert parse().training.output_dir == "m-DPO"
    assert parse("--model_name_or_path", "a/b-c/").training.output_dir == "b-c-DPO"
    assert parse(output_dir="x").training.output_dir == "x"


@pytest.mark.parametrize(("given", "expected"), [("q_proj", ["q_proj"]), (".*q_.*", ".*q_.*")])
def test_one_target_is_a_name_unless_it_is_a_pattern(given: str, expected: Any) -> None:
    model = parse("--use_peft", "--lora_target_modules", given).model
    assert model.target_modules == expected
    assert parse("--lora_target_modules", "all-linear").model.target_modules == "all-linear"


@pytest.mark.parametrize("name", sorted(set(REMOVED_FIELDS) | {"datasets", "env"}))
def test_removed_names_point_to_their_replacement(name: str) -> None:
    replacement = table().removed[name]
    for give in (
        lambda: parse(f"--{name}", "1"),
        lambda: parse(f"--{name.replace('_', '-')}=1"),
        lambda: parse(**{name: 1}),
    ):
        with pytest.raises(UsageError) as caught:
            give()
        assert name.split("_")[0] in str(caught.value) and replacement in str(caught.value)


REFUSED = {
    "unknown flag": (["--lerning_rate", "1"], {}, "did you mean --learning_rate"),
    "unknown key": ([], {"lerning_rate": 1}, "run.yaml: there is no option 'lerning_rate'"),
    "no abbreviations": (["--learning_r", "1"], {}, "did you mean --learning_rate"),
    "ill-typed flag": (["--beta", "much"], {}, "--beta.*'much'"),
    "ill-typed key": ([], {"beta": "much"}, "run.yaml: .*--beta.*'much'"),
    "choice": (["--eval_strategy", "often"], {}, "invalid choice: 'often'"),
    "stray value": (["--beta", "1", "2"], {}, "unexpected '2'"),
    "list for one": ([], {"beta": [1, 2]}, "takes one value"),
    "mapping for one": ([], {"beta": {"a": 1}}, "takes no mapping"),
    "null": ([], {"beta": None}, "needs a value, not null"),
    "twice": ([], {"streaming": True, "dataset_streaming": True}, "given twice"),
    "not JSON": (["--liger_kernel_config", "{"], {}, "takes JSON"),
    "config's own rule": (["--reference", "magic"], {}, "reference='magic' must be one of"),
    "transformers' rule": (["--fp16", "--bf16"], {}, "fp16"),
    "two quantisations": (["--load_in_4bit", "--load_in_8bit"], {}, "exclude each other"),
    "no such file": (["--config", "no.yaml"], {}, "there is no file 'no.yaml'"),
    "config without file": (["--config"], {}, "needs the path"),
    "config twice": (["--config", "a", "--config=b"], {}, "given twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    words, config, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        parse(*words, **config)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1\nb: 2", "not valid YAML.*line 2"), ("- a", "`name: value` lines.*list")],
)
def test_not_a_config_file(text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"(?s)bad.yaml.*{message}"):
        parse("--config", "bad.yaml")


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name"])
def test_model_and_data_are_needed(missing: str) -> None:
    words = {"model_name_or_path": "m", "dataset_name": "d"}
    del words[missing]
    with pytest.raises(UsageError, match=f"--{missing}"):
        parse_words("dpo-fast train", "", [w for k, v in words.items() for w in (f"--{k}", v)])


def test_an_empty_file_changes_nothing() -> None:
    Path("empty.yaml").write_text("# nothing yet\n")
    assert parse("--config", "empty.yaml").training.beta == 0.1
