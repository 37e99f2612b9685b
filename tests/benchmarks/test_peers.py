"""Peers that are absent are left out by name; peers that changed raise with what was seen."""

import sys
from typing import Any

import pytest

from dpo_fast.bench import peers
from dpo_fast.bench.case import LeftOut
from dpo_fast.integrations.interface import InterfaceChanged

PROBES = {
    "trl": ("trl", peers.trl_logprob_function),
    "liger-kernel": ("liger_kernel", peers.liger_dpo_loss),
    "cut-cross-entropy": ("cut_cross_entropy", peers.cut_cross_entropy),
}


@pytest.mark.parametrize("package", PROBES)
def test_absent(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, probe = PROBES[package]
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(LeftOut, match=f"pip install {package}"):
        probe()


def test_versions_name_every_peer() -> None:
    assert set(peers.versions()) == {"TRL", "Liger", "cut-cross-entropy", "torch"}


def test_a_changed_trl_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    utils: Any = pytest.importorskip("trl.trainer.utils")

    class Other:
        @staticmethod
        def forward(ctx: Any, hidden: Any, head: Any) -> None: ...

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(InterfaceChanged, match=r"of trl \d.*takes \(ctx, hidden, head\)"):
        peers.trl_logprob_function()


def test_a_changed_liger_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: Any = pytest.importorskip("liger_kernel.chunked_loss")

    class Other:
        def forward(self, x: Any) -> None: ...

    monkeypatch.setattr(losses, "LigerFusedLinearDPOLoss", Other)
    with pytest.raises(InterfaceChanged, match=r"of liger-kernel \d.*takes \(self, x\)"):
        peers.liger_dpo_loss()
