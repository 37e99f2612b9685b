"""``dpo_fast.patch("trl")``: put in place, taken away, refused."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from dpo_fast.integrations.trl import FORWARD, NAME, FusedLogProbs

utils = pytest.importorskip("trl.trainer.utils")
ORIGINAL = getattr(utils, NAME)


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    dpo_fast.unpatch("trl")
    assert getattr(utils, NAME) is ORIGINAL


def installed() -> Any:
    return getattr(utils, NAME)


def test_patch_and_unpatch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        dpo_fast.patch("trl")
    assert isinstance(installed(), FusedLogProbs)
    assert "trl 1." in caplog.text
    dpo_fast.unpatch("trl")
    assert installed() is ORIGINAL
    dpo_fast.unpatch("trl")
    assert installed() is ORIGINAL


def test_context_manager_restores_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), dpo_fast.patch("trl") as patch:
        assert patch.applied and isinstance(installed(), FusedLogProbs)
        raise ZeroDivisionError
    assert installed() is ORIGINAL


def test_patching_twice_is_patching_once() -> None:
    with dpo_fast.patch("trl"):
        adapter = installed()
        with dpo_fast.patch("trl") as inner:
            assert not inner.applied and installed() is adapter
        assert installed() is adapter, "the inner block took the outer one's patch away"
    assert installed() is ORIGINAL


def test_another_backend_needs_an_unpatch() -> None:
    dpo_fast.patch("trl", backend="naive")
    with pytest.raises(ValueError, match="backend='naive'"):
        dpo_fast.patch("trl")
    assert installed().backend == "naive"


def test_unknown_target() -> None:
    for function in (dpo_fast.patch, dpo_fast.unpatch):
        with pytest.raises(
            ValueError, match="'liger' must be one of 'trl', 'llamafactory', 'openrlhf'"
        ):
            function("liger")


def test_what_somebody_else_put_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    dpo_fast.patch("trl")
    other = type("Other", (torch.autograd.Function,), {})
    with monkeypatch.context() as patched:
        patched.setattr(utils, NAME, other)
        dpo_fast.unpatch("trl")
        assert installed() is other


class _SevenArguments(torch.autograd.Function):
    """The interface of TRL's main in July 2026."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        last_hidden: Any,
        weight: Any,
        targets: Any,
        temperature: Any,
        chunk_size: Any,
        softcap: Any,
        logit_scale: Any,
    ) -> Any: ...


class _MoreOutputs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Any,
        weight: Any,
        bias: Any,
        targets: Any,
        temperature: Any,
        chunk_size: Any,
        final_logit_softcapping: Any = None,
        logit_scale: Any = 1.0,
        outputs: Any = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "varentropy"),
    ) -> Any: ...


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is None|is missing"),
        (torch.nn.functional.linear, "autograd.Function"),
        (_SevenArguments, "last_hidden, weight, targets"),
        (_MoreOutputs, "varentropy"),
    ],
)
def test_changed_function_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: Any, message: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(utils, NAME, value)
        with pytest.raises(InterfaceChanged, match=message) as error:
            dpo_fast.patch("trl")
        assert installed() is value
    assert "trl 1." in str(error.value) and NAME in str(error.value)


def test_older_trl_without_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.delattr(utils, NAME)
        patched.setattr("trl.__version__", "0.24.0")
        with pytest.raises(InterfaceChanged, match=r"of trl 0\.24\.0 is missing"):
            dpo_fast.patch("trl")


def test_a_caller_that_binds_the_function_early_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def add_fused_lm_head(model: Any, function: Any = ORIGINAL) -> Any:
        return function.apply(model)

    with monkeypatch.context() as patched:
        patched.setattr(utils, "add_fused_lm_head", add_fused_lm_head)
        with pytest.raises(InterfaceChanged, match="add_fused_lm_head"):
            dpo_fast.patch("trl")
    assert installed() is ORIGINAL


def test_the_known_interface_is_the_installed_one() -> None:
    """So that the refusals above differ from it in one thing each."""
    import inspect

    assert tuple(inspect.signature(ORIGINAL.forward).parameters) == FORWARD


def test_trl_that_is_not_installed() -> None:
    program = """
import sys
sys.modules["trl"] = None
import dpo_fast
try:
    dpo_fast.patch("trl")
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError
dpo_fast.unpatch("trl")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
