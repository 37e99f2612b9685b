"""A peer's method replaced: put in place, taken away, refused; and the rows that adapters score.

The peers themselves are tested in their own environments: ``make test-integrations``.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from dpo_fast.integrations.methods import MethodPatch, import_peer
from dpo_fast.integrations.padded_rows import score_rows
from tests.integrations.test_patch_model import batch, from_logits, gradients
from tests.tiny import tiny_model


class Peer:
    """What is patched: a method that doubles, or ours, that adds what the backend is called."""

    def method(self, value: Any) -> Any:
        return value * 2


def make(original: Any, backend: str) -> Any:
    def method(self: Any, value: Any) -> Any:
        return f"{original(self, value)} {backend}"

    return method


@pytest.fixture
def patch() -> Iterator[MethodPatch]:
    module = ModuleType("peer_of_tests")
    module.Peer = Peer  # type: ignore[attr-defined]
    sys.modules["peer_of_tests"] = module
    made = MethodPatch(
        package="pytest",
        module="peer_of_tests",
        class_name="Peer",
        method="method",
        parameters=("self", "value"),
        make=make,
        remedy="pip install it",
    )
    yield made
    made.restore()
    del sys.modules["peer_of_tests"]


def test_applied_once_and_restored(patch: MethodPatch) -> None:
    original = Peer.method
    assert patch.apply("auto") and Peer().method(3) == "6 auto"
    assert not patch.apply("auto") and Peer().method(3) == "6 auto"
    with pytest.raises(ValueError, match=r"Peer\.method is patched already, with backend='auto'"):
        patch.apply("naive")
    patch.restore()
    assert Peer.method is original
    patch.restore()
    assert Peer().method(3) == 6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda self, other: None, r"of pytest \d\S+ takes \(self, other\)"),
        (property(lambda self: None), "not a method"),
    ],
)
def test_another_interface_is_refused(
    patch: MethodPatch, monkeypatch: pytest.MonkeyPatch, value: Any, message: str
) -> None:
    monkeypatch.setattr(Peer, "method", value)
    with pytest.raises(InterfaceChanged, match=message):
        patch.apply("auto")
    assert vars(Peer)["method"] is value


def test_a_class_that_is_gone(patch: MethodPatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["peer_of_tests"], "Peer", None)
    with pytest.raises(InterfaceChanged, match="has no class Peer"):
        patch.apply("auto")


def test_missing_peers_are_named() -> None:
    for target in ("llamafactory", "openrlhf"):
        if target in sys.modules:
            pytest.skip(f"{target} is installed here")
        with pytest.raises(ImportError, match=f"{target} is not installed: pip install {target}"):
            dpo_fast.patch(target)
        dpo_fast.unpatch(target)
    with pytest.raises(ImportError, match="axolotl is not installed"):
        __import__("dpo_fast.integrations.axolotl")
    with pytest.raises(InterfaceChanged, match=r"pytest \d\S+ has no module pytest\.moved"):
        import_peer("pytest.moved", "pytest", "pip install pytest")


@pytest.mark.parametrize("flattened", [False, True])
def test_scored_rows_are_those_of_the_logits(flattened: bool) -> None:
    """Sums, positions, lengths and gradients; also where the model gets the rows as one."""
    model = tiny_model("gemma2")
    data = batch()
    expected = from_logits(model, data)
    expected_grads = gradients(model, expected)
    mask = data["attention_mask"]
    inputs = {"input_ids": data["input_ids"], "attention_mask": mask}
    if flattened:
        kept = mask.bool()
        positions = (mask.cumsum(1) - 1)[kept]
        inputs = {"input_ids": data["input_ids"][kept][None], "position_ids": positions[None]}
    scores = score_rows(
        model, data["labels"], flattened=mask.bool() if flattened else None, **inputs
    )
    found = scores.per_position(scores.tokens.logps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(scores.sums(), expected.sum(1), rtol=1e-5, atol=1e-4)
    assert scores.lengths().tolist() == (data["labels"] != -100).sum(1).tolist()
    for name, grad in gradients(model, found).items():
        scale = float(expected_grads[name].abs().max())
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5 * (1 + scale))
