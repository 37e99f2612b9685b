"""From arguments to a trainer that is ready to run: what is cheap to refuse comes first."""

import logging
from typing import TYPE_CHECKING

import torch

from dpo_fast.cli.arguments import ModelArguments
from dpo_fast.cli.checks import check_before_loading
from dpo_fast.cli.data import load_data
from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.parser import Arguments
from dpo_fast.cli.policy import load_arguments, model_arguments
from dpo_fast.config import DPOConfig
from dpo_fast.models.given import check_config, is_adapter

if TYPE_CHECKING:
    from dpo_fast.trainer import Trainer

logger = logging.getLogger("dpo_fast")


def build_trainer(arguments: Arguments, trainer_class: "type[Trainer] | None" = None) -> "Trainer":
    """The trainer that ``dpo-fast train`` would run.

    Args:
        trainer_class: None: :class:`dpo_fast.Trainer`.

    Raises:
        UsageError: paths, names, splits. ValueError, TypeError, OSError: as the trainer.
    """
    from dpo_fast.trainer import Trainer

    model, data, args = arguments
    check_before_loading(model, data, args)
    check_configs(model, args)
    unused = model.unused_lora_options()
    if unused:
        logger.warning("Ignored without --use_peft: %s.", ", ".join(unused))
    train, evaluation = load_data(data, evaluated=args.eval_strategy != "no")
    trainer = (trainer_class or Trainer)(
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        **model_arguments(model, args),
    )
    if data.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()
        masks = [name for name, buffer in buffers if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = masks
    return trainer


def check_configs(model: ModelArguments, args: DPOConfig) -> None:
    """Read the models' configs, which are small, before anything large.

    Raises:
        UsageError: one cannot be had, or is not understood.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **load_arguments(model, args)}
    for name, revision, flag in (
        (model.model_name_or_path, kwargs.get("revision", "main"), "--model_name_or_path"),
        (model.ref_model_name_or_path, model.ref_model_revision, "--ref_model_name_or_path"),
    ):
        if name is None or is_adapter(name):
            continue
        try:
            check_config(name, flag, **{**kwargs, "revision": revision})
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{flag}: {name!r} cannot be loaded: {error}") from error
