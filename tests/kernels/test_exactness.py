"""The exactness promise on emulated tensor cores, with bfloat16 inputs and stored bfloat16 E.

Sequence log-probs to 1e-3 + 1e-5 * |logp| nats, dX and dW to 4e-3 in relative L2, for rows of every
confidence, weights with a common mean, rows off range; upstream gradients of 1e-6.
"""

import pytest
import torch

from tests.functional.cases import Case
from tests.functional.test_exactness import gold_of, rows_of_confidence
from tests.kernels.emulation import tensor_cores, towards_zero
from tests.kernels.support import interpreted, run
from tests.tolerances import relative_error

pytestmark = interpreted


def test_the_emulated_sum_truncates():
    import numpy as np

    values = np.array([1 + 2.0**-24 + 2.0**-26, -(1 + 2.0**-23 + 2.0**-25), 3.0])
    assert towards_zero(values).tolist() == [1.0, -(1 + 2.0**-23), 3.0]


@pytest.fixture
def big_tiles(monkeypatch):
    """Tiles of 64 x 128 x 64: the interpreter's time goes per tile."""
    from dpo_fast_kernels import tiles

    big = tiles.Tile(64, 128, 64, 16, 2, 4, 2, 128)
    monkeypatch.setattr(tiles, "INTERPRETER", dict.fromkeys(tiles.INTERPRETER, big))


@pytest.mark.parametrize("mean", [0.0, 8.0])
@pytest.mark.parametrize("odds", [-200.0, -100.0, -85.0, -20.0, 0.0, 5.0, 15.0, 25.0, 32.0])
def test_every_confidence(odds, mean, big_tiles):
    hidden, weight, target = rows_of_confidence(odds, torch.bfloat16, mean)
    upstream = torch.full((24,), 1e-6)
    logps, dhidden, dweight = gold_of(hidden, weight, target, upstream)
    case = Case(hidden, weight, target)
    for store in (True, False):
        with tensor_cores():
            ours = run(case, "triton", store=store, upstream=upstream)
        total = logps.sum()
        assert abs(ours.logps.double().sum() - total) <= 1e-3 + 1e-5 * total.abs()
        assert ours.grads["hidden"].dtype == ours.grads["weight"].dtype == torch.bfloat16
        assert relative_error(ours.grads["hidden"], dhidden) <= 4e-3
        assert relative_error(ours.grads["weight"], dweight) <= 4e-3


def test_softcap_and_scale(big_tiles):
    hidden, weight, target = rows_of_confidence(3.0, torch.bfloat16, 0.0, 16)
    case = Case(hidden, weight, target, {"softcap": 30.0, "temperature": 0.7})
    from tests.kernels.support import gold

    upstream = torch.full((16,), 1e-6)
    exact = Case(hidden.double().requires_grad_(), weight.double().requires_grad_(), target,
                 case.kwargs)  # fmt: skip
    right = gold(exact, upstream=upstream)
    with tensor_cores():
        ours = run(case, "triton", upstream=upstream)
    assert abs(ours.logps.double().sum() - right.logps.sum()) <= 1e-3
    for name, grad in ours.grads.items():
        assert relative_error(grad, right.grads[name]) <= 4e-3, name


def test_the_targets_logit_must_come_from_the_matrix_units(big_tiles, monkeypatch):
    """512 tokens: the accumulator's errors cancel against its own, not against an exact dot's."""
    from dpo_fast_kernels import scoring
    from dpo_fast_kernels.operands import make_operands, plan_launch
    from dpo_fast_kernels.scoring import Vocabulary, score_rows

    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 512, generator=g) * 0.2 + 0.5).bfloat16()
    hidden = (torch.randn(512, 512, generator=g) + 1.0).bfloat16()
    target = torch.randint(256, (512,), generator=g)
    z = hidden.double() @ weight.double().T
    exact = z.log_softmax(1).gather(1, target[:, None]).sum()
    operands, _ = make_operands(hidden, weight, None, None, None, 1.0)
    launch = plan_launch(operands, False)

    def total() -> float:
        with tensor_cores():
            found = score_rows(
                operands, launch, target, e=None, e_dtype=torch.bfloat16, stats=False,
                vocabulary=Vocabulary(),
            )  # fmt: skip
        return float(found.state.logps.double().sum())

    ours = abs(total() - float(exact))
    assert ours <= 1e-3 + 1e-5 * abs(float(exact))
    plain = scoring.target_logits

    def from_exact_dot(*args, **kwargs):
        rows = plain(*args, **kwargs)
        zy = z.gather(1, target[:, None])[:, 0].float()
        return rows._replace(zy=zy, k=zy + 24.0)

    monkeypatch.setattr(scoring, "target_logits", from_exact_dot)
    other = abs(total() - float(exact))
    assert other > 2e-2 and other > 5 * ours
