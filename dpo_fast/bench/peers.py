"""The peers that the suites compare with: which are there, and whether they look as expected."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dpo_fast.bench.case import LeftOut
from dpo_fast.bench.machine import package_version
from dpo_fast.integrations.interface import check_parameters

PACKAGES = {
    "TRL": "trl",
    "Liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "torch": "torch",
}

_TRL_FORWARD = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_LIGER_CALL = (
    *("self", "lin_weight", "_input", "target", "bias"),
    *("ref_input", "ref_weight", "ref_bias"),
)
_CCE = (
    *("e", "c", "targets", "ignore_index", "softcap", "reduction", "shift"),
    *("filter_eps", "impl"),
)
_CCE_NEWER = ("e", "c", "targets", "bias", *_CCE[3:7])  # what follows differs by version


def versions() -> dict[str, str]:
    """``{peer: version}``; "absent" where it is not installed, and so will be left out."""
    return {name: package_version(package) for name, package in PACKAGES.items()}


def trl_logprob_function() -> tuple[Any, int]:
    """TRL's chunked log-prob ``autograd.Function`` and the chunk that its trainers use.

    Raises:
        LeftOut: TRL is not installed. InterfaceChanged: it takes other arguments.
    """
    utils = _module("trl.trainer.utils", "trl")
    name = "_ChunkedLogProbFunction"
    function = getattr(utils, name, None)
    forward = getattr(function, "forward", None)
    check_parameters(forward, _TRL_FORWARD, f"trl.trainer.utils.{name}.forward", _seen("trl"))
    return function, int(utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def liger_dpo_loss() -> Any:
    """``LigerFusedLinearDPOLoss``, the class.

    Raises:
        LeftOut: liger-kernel is not installed. InterfaceChanged: it is called differently.
    """
    loss = _module("liger_kernel.chunked_loss", "liger-kernel").LigerFusedLinearDPOLoss
    where = "liger_kernel.chunked_loss.LigerFusedLinearDPOLoss.forward"
    check_parameters(loss.forward, _LIGER_CALL, where, _seen("liger-kernel"))
    return loss


def cut_cross_entropy() -> Callable[..., Any]:
    """``linear_cross_entropy``.

    Raises:
        LeftOut: cut-cross-entropy is not installed. InterfaceChanged: it is called differently.
    """
    import inspect

    module = _module("cut_cross_entropy", "cut-cross-entropy")
    function: Callable[..., Any] = module.linear_cross_entropy
    found = tuple(inspect.signature(function).parameters)
    if found[: len(_CCE_NEWER)] != _CCE_NEWER:
        where = "cut_cross_entropy.linear_cross_entropy"
        check_parameters(function, _CCE, where, _seen("cut-cross-entropy"))
    return function


def _module(name: str, package: str) -> Any:
    top = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise LeftOut(f"{package} is not installed: pip install {package}") from None


def _seen(package: str) -> str:
    return f"{package} {package_version(package)}"
