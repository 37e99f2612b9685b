"""Names, orders and defaults that users rely on: TRL's where there is a feature of TRL's, and the
fused ops' own.
"""

import dataclasses
import inspect
from typing import Any

import pytest

import dpo_fast
from dpo_fast.cli.app import COMMANDS
from dpo_fast.config import DPOConfig

# Fields whose default is not TRL's on purpose; the docstring of DPOConfig says why.
OWN_DEFAULTS = {"logging_nan_inf_filter"}

HEAD = (
    *("bias", "softcap", "logit_scale", "temperature", "ignore_index", "lora", "group", "backend"),
    *("mode", "workspace"),
)
OPS = {
    "linear_logprobs": (("hidden", "weight", "target"), (*HEAD, "outputs")),
    "sequence_logprobs": (("hidden", "weight", "target", "cu_seqlens"), HEAD),
    "fused_linear_dpo": (
        ("policy_hidden", "weight", "target", "cu_seqlens"),
        (*HEAD, "outputs", "ref_hidden", "ref_weight", "ref_logps", "loss"),
    ),
    "ema_": (("refs", "policies", "alpha"), ("rounding", "shadow", "seed", "step", "offsets")),
}


def positional(function: Any) -> list[str]:
    """Names that can be given by position, in order."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]


def default_of(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def test_trainer_and_collator_take_what_trls_take() -> None:
    trl = pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    assert positional(dpo_fast.Trainer) == positional(trl.DPOTrainer)
    for name in positional(trl.DPOTrainer):
        theirs = inspect.signature(trl.DPOTrainer).parameters[name].default
        assert inspect.signature(dpo_fast.Trainer).parameters[name].default == theirs, name
    ours = inspect.signature(dpo_fast.DataCollatorForPreference).parameters
    wanted = inspect.signature(DataCollatorForPreference).parameters
    assert list(ours) == list(wanted)
    assert all(ours[name].default == wanted[name].default for name in wanted)


def test_config_has_trls_fields_and_defaults() -> None:
    trl = pytest.importorskip("trl")
    theirs = {f.name: default_of(f) for f in dataclasses.fields(trl.DPOConfig)}
    ours = {f.name: default_of(f) for f in dataclasses.fields(DPOConfig)}
    assert not theirs.keys() - ours.keys()
    assert {name for name in theirs if ours[name] != theirs[name]} == OWN_DEFAULTS
    assert all(name in str(DPOConfig.__doc__) for name in OWN_DEFAULTS)


@pytest.mark.parametrize("name", OPS)
def test_fused_ops(name: str) -> None:
    """Tensors by position, everything else by name."""
    tensors, options = OPS[name]
    function = getattr(dpo_fast.functional, name)
    assert tuple(positional(function)) == tensors
    parameters = inspect.signature(function).parameters
    assert all(parameters[option].kind == inspect.Parameter.KEYWORD_ONLY for option in options)
    assert not any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def test_every_loss_takes_four_vectors() -> None:
    from dpo_fast.losses import LOSSES

    vectors = ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    for name in LOSSES:
        function = getattr(dpo_fast.losses, name)
        assert positional(function) == vectors, name
        stats = inspect.signature(function).parameters["stats"]
        assert stats.kind == inspect.Parameter.KEYWORD_ONLY and stats.default is None


def test_public_names_and_commands() -> None:
    names = {"DPOConfig", "DataCollatorForPreference", "FusedLinearDPOLoss", "Trainer"}
    names |= {"patch", "unpatch", "patch_model", "unpatch_model", "__version__"}
    assert set(dpo_fast.__all__) == names
    assert all(hasattr(dpo_fast, name) for name in dpo_fast.__all__)
    commands = {"train", "precompute", "plan", "doctor", "demo", "bench", "inspect-data"}
    assert set(COMMANDS) == commands
