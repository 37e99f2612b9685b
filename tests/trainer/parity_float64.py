"""Whose rounding is it? A third run, ours in float64, between our log and TRL's in float32."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dpo_fast
from tests.trainer.parity import METRICS, Run, relative_update_error, train

# Differences of far larger sums, and the norm of a gradient at weights that steps of AdamW moved:
# float32 leaves them fewer digits than 1e-5, in TRL as here, so float64 judges between both.
CANCELLING = (
    "grad_norm",
    "logits/chosen",
    "logits/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
)
FLOAT32_EPS = torch.finfo(torch.float32).eps


def assert_log_of_trl(
    ours: Run, theirs: Run, gold: Callable[[], Run], metrics: tuple[str, ...] = METRICS
) -> None:
    """Every metric of every log line within 1e-5 of TRL's, relative; ``gold`` runs the same
    training of ours in float64, which is asked for only where that fails.

    A metric may fail it that is within 1e-5 of float64: then the rounding is TRL's. Metrics in
    ``CANCELLING`` also may if they lie within 1e-5 of TRL's absolute (relative above 1; the
    gradient's norm within 1e-4), and if the error of all steps against float64 is at most twice
    TRL's own, beside the resolution of float32.
    """
    assert len(ours.log) == len(theirs.log) > 0
    doubtful = [k for k in metrics if not agree(column(ours, k), column(theirs, k))]
    if not doubtful:
        return
    exact = gold()
    for key in doubtful:
        mine, expected, truth = column(ours, key), column(theirs, key), column(exact, key)
        if agree(mine, truth):
            continue
        assert key in CANCELLING, (key, mine, expected, truth)
        loose = 1e-4 if key == "grad_norm" else 1e-5
        bound = loose * expected.abs().clamp_min(1.0)
        assert (mine - expected).abs().le(bound).all(), (key, mine, expected, truth)
        error = (mine - truth).norm()
        allowed = 2 * (expected - truth).norm() + float32_resolution(exact, key).norm()
        assert error <= allowed, (key, error, allowed, mine, expected, truth)


def assert_update_of_trl(ours: Run, theirs: Run, gold: Callable[[], Run], tolerance: float) -> None:
    """The whole update within ``tolerance`` of TRL's, relative to its norm; or, where TRL's
    rounding is larger than that, within it of ``gold``'s and nearer to it than TRL's.

    Losses with an exponential of log-ratios amplify the rounding of those, on some processors.
    """
    error = relative_update_error(ours, theirs)
    if error <= tolerance:
        return
    exact = gold()
    mine, trl = relative_update_error(ours, exact), relative_update_error(theirs, exact)
    assert mine <= min(tolerance, trl), (error, mine, trl)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether all entries agree within 1e-5, relative."""
    return bool((found - expected).abs().le(1e-5 * expected.abs()).all())


def column(run: Run, key: str) -> Tensor:
    """One metric of all log lines, float64."""
    return torch.tensor([entry[key] for entry in run.log], dtype=torch.float64)


def float32_resolution(run: Run, key: str) -> Tensor:
    """One unit in the last place of what ``key`` is a difference or mean of, per log line."""
    kind, _, side = key.partition("/")
    if kind == "logits":  # means of logits of either sign, which are of size 1 in tiny models
        return torch.full((len(run.log),), FLOAT32_EPS, dtype=torch.float64)
    if kind == "grad_norm":
        return FLOAT32_EPS * column(run, key)
    sides = ("chosen", "rejected") if side == "margins" else (side,)
    summed = sum(column(run, f"logps/{name}").abs() for name in sides)
    return FLOAT32_EPS * run.trainer.args.beta * summed


class _Float64Norm(nn.Module):
    """RMSNorm in its input's precision: transformers' own goes through float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def in_float64(model: nn.Module | None) -> nn.Module | None:
    """A float64 copy of ``model`` without the float32 islands of its norms."""
    if model is None:
        return None
    model = copy.deepcopy(model).double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
                setattr(parent, name, _Float64Norm(child))
    return model


def ours_in_float64(
    model: nn.Module, *, ref_model: nn.Module | None = None, config: dict[str, Any], **kwargs: Any
) -> Run:
    """Our training of the same arguments as ``both``, one precision up."""
    config = {**config, **kwargs.pop("own_config", {})}
    return train(
        dpo_fast.Trainer,
        dpo_fast.DPOConfig,
        in_float64(model),
        ref_model=in_float64(ref_model),
        config=config,
        **kwargs,
    )
