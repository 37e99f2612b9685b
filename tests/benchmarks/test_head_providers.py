"""The providers of benchmarks/head_gpu.py compute one and the same step; interpreted, float32."""

import pytest
import torch

from benchmarks.head_providers import FORWARD, PROVIDERS, Shape, make_inputs
from tests.kernels.support import interpreted
from tests.tolerances import relative_error

pytestmark = interpreted

SETTINGS = [(False, True), (False, False), (True, True), (True, False)]


def inputs(frozen, online, softcap=None):
    return make_inputs(
        Shape(16, 67, softcap), 24, 2, frozen=frozen, online=online, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(("frozen", "online"), SETTINGS)
@pytest.mark.parametrize("name", ["ours", "ours-composed", "ours-min-memory", "trl"])
def test_a_provider_s_step_is_the_naive_one(name, frozen, online):
    x = inputs(frozen, online, softcap=20.0)
    found, right = PROVIDERS[name](x)(), PROVIDERS["naive"](x)()
    for part in ("logps", "dhidden", "dweight"):
        ours, gold = getattr(found, part), getattr(right, part)
        assert (ours is None) == (gold is None)
        if gold is not None:
            assert relative_error(ours, gold) < 1e-5, part


@pytest.mark.parametrize(("frozen", "online"), SETTINGS)
def test_the_floor_has_as_many_products_as_the_setting(frozen, online, monkeypatch):
    x = inputs(frozen, online)
    step, calls, plain = PROVIDERS["gemms"](x), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(1) or plain(*a, **k))
    step()
    assert len(calls) == x.shape.num_gemms


@pytest.mark.parametrize("name", [n for n in FORWARD if n != "gemms"])
def test_parts_of_the_scoring_pass_give_the_log_probs(name):
    x = inputs(False, False)
    right = torch.log_softmax(x.hidden.detach() @ x.weight.detach().T, -1)
    right = right.gather(1, x.target[:, None])[:, 0]
    torch.testing.assert_close(FORWARD[name](x)()[0][:24], right, rtol=1e-5, atol=1e-5)
