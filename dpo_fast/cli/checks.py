"""What can be found wrong before anything big is read: paths, names, what is not installed."""

from importlib.util import find_spec
from pathlib import Path

from dpo_fast.cli.arguments import DataArguments, ModelArguments
from dpo_fast.cli.errors import UsageError
from dpo_fast.config import DPOConfig
from dpo_fast.files import probe_writable
from dpo_fast.hub_names import looks_like_path
from dpo_fast.models.given import check_model_name, is_adapter


def check_before_loading(model: ModelArguments, data: DataArguments, args: DPOConfig) -> None:
    """Raise for what would fail minutes later.

    Raises:
        UsageError: a path that is not there, a folder without a model, evaluation data that nobody
            would evaluate, bitsandbytes missing.
        ValueError: an unknown loss, a reference that does not go with the rest.
        OSError: the output folder cannot be written.
    """
    check_model(str(model.model_name_or_path), "--model_name_or_path")
    if model.ref_model_name_or_path is not None:
        check_model(model.ref_model_name_or_path, "--ref_model_name_or_path")
    check_data(data)
    if data.eval_dataset_name is not None and args.eval_strategy == "no":
        raise UsageError(
            "--eval_dataset_name is given, and nothing would be evaluated: add --eval_strategy "
            "steps (or epoch), or drop it."
        )
    check_quantisation(model)
    check_objective(model, data, args)
    probe_writable(str(args.output_dir))


def check_data(data: DataArguments) -> None:
    """What looks like a path must be there.

    Raises:
        UsageError: it is not.
    """
    for name, flag in (
        (data.dataset_name, "--dataset_name"),
        (data.eval_dataset_name, "--eval_dataset_name"),
    ):
        if name is not None and looks_like_path(name) and not Path(name).expanduser().exists():
            raise UsageError(f"{flag}: there is no file or folder {name!r}.")


def check_model(name: str, flag: str) -> None:
    """As the trainer checks its ``model``.

    Raises:
        UsageError: neither a folder with a model nor a hub name.
    """
    try:
        check_model_name(name, flag)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_objective(model: ModelArguments, data: DataArguments, args: DPOConfig) -> None:
    """The loss must exist, and the reference must go with everything else.

    Raises:
        ValueError: as the trainer would, once the model is loaded.
    """
    from dpo_fast.reference.choose import Situation, decide
    from dpo_fast.trainer.setup import build_objective_loss

    loss = build_objective_loss(args)
    goes_on = is_adapter(str(model.model_name_or_path))
    decide(
        Situation(
            asked=args.reference,
            precompute_flag=args.precompute_ref_log_probs,
            sync_flag=args.sync_ref_model,
            ref_model=model.ref_model_name_or_path is not None,
            peft="new" if model.use_peft else "continued" if goes_on else "no",
            streamed="train" if data.streaming else None,
            needs_reference=loss.needs_reference,
            offload=args.ref_offload,
        )
    )


def check_quantisation(model: ModelArguments) -> None:
    """Quantised weights cannot be trained themselves, and need bitsandbytes.

    Raises:
        UsageError: no adapter, or no bitsandbytes.
    """
    if not model.quantised:
        return
    flag = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{flag} needs bitsandbytes, which is not installed: pip install bitsandbytes, or load "
            "the weights with --dtype bfloat16."
        )
    if not model.use_peft and not is_adapter(str(model.model_name_or_path)):
        raise UsageError(f"{flag} freezes the weights: add --use_peft, so that an adapter trains.")
