"""Any shape, any features, any layout in memory: log-probs and gradients of every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_fast.functional import linear_logprobs
from dpo_fast.naive import HeadLoRA, naive_linear_logprobs
from tests.functional.conftest import NAMES
from tests.kernels.support import interpreted

BACKENDS = [*NAMES, pytest.param("triton", marks=interpreted)]


@st.composite
def calls(draw):
    """Leaves, targets and options of one call."""
    rows, width = draw(st.integers(0, 9)), draw(st.integers(1, 19))
    vocab, rank = draw(st.sampled_from([1, 2, 3, 16, 31, 64, 65, 130])), draw(st.integers(0, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    size = draw(st.sampled_from([1e-4, 0.3, 3.0, 40.0, 1e4]))  # of the logits' spread

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=g) * scale
        if draw(st.booleans()):  # a view into something wider, no unit stride
            wide = torch.full((*shape[:-1], 2 * shape[-1] + 3), torch.nan)
            view = wide[..., 1 : 1 + 2 * shape[-1] : 2]
            value = view.copy_(value)
        return value.requires_grad_()

    common = draw(st.sampled_from([0.0, 5.0]))
    leaves = {
        "hidden": normal(rows, width, scale=(size / width) ** 0.5),
        "weight": normal(vocab, width, scale=(size / width) ** 0.5),
    }
    with torch.no_grad():
        leaves["weight"] += common * (size / width) ** 0.5
    target = torch.randint(vocab, (rows,), generator=g)
    for row in range(rows):
        if draw(st.integers(0, 3)) == 0:
            target[row] = -100
    if draw(st.booleans()):
        leaves["bias"] = normal(vocab, scale=min(size, 3.0))
    if rank:
        leaves["a"], leaves["b"] = normal(rank, width), normal(vocab, rank, scale=0.3)
    options = {
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.03, 7.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
    }
    mode = draw(st.sampled_from([None, "store", "min-memory"]))
    return leaves, target, options, mode


def scored(function, leaves, target, options, **more):
    lora = HeadLoRA(leaves["a"], leaves["b"], 0.5) if "a" in leaves else None
    return function(
        leaves["hidden"], leaves["weight"], target, bias=leaves.get("bias"), lora=lora, **options,
        **more,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(calls())
def test_values_and_gradients(backend, call):
    leaves, target, options, mode = call
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    eager = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    gold = scored(naive_linear_logprobs, exact, target, options)
    plain = scored(naive_linear_logprobs, eager, target, options)
    ours = scored(linear_logprobs, leaves, target, options, backend=backend, mode=mode)
    upstream = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(ours).all() and (ours <= 0).all()
    assert (ours[target == -100] == 0).all()
    found = torch.autograd.grad(ours, list(leaves.values()), upstream)
    right = torch.autograd.grad(gold, list(exact.values()), upstream.double())
    theirs = torch.autograd.grad(plain, list(eager.values()), upstream)
    scale = 1 + sum(float(leaf.detach().norm()) for leaf in leaves.values())
    size = largest_logit(exact, options)
    near(ours, plain, gold, "logps", size)
    for name, a, b, c in zip(leaves, found, theirs, right, strict=True):
        near(a, b, c, name, size, scale)


def largest_logit(leaves, options) -> float:
    """What no part of a row's logits exceeds, before the softcap."""
    row = lambda name: float(leaves[name].detach().norm(dim=1).max()) if leaves[name].numel() else 0
    size = row("hidden") * row("weight")
    if "a" in leaves:
        size += 0.5 * row("hidden") * float(leaves["a"].detach().norm()) * row("b")
    if "bias" in leaves:
        size += float(leaves["bias"].detach().abs().max())
    return size * options["logit_scale"] / options["temperature"]


def near(
    ours: Tensor, eager: Tensor, gold: Tensor, what: str, size: float, scale: float = 1.0
) -> None:
    """In L2: within four times torch's own float32 error, a few roundings of the values, one of the
    logits (``size``), which a probability has relative to itself, and some of the float64 gold:
    where p is near 1 it says 0, and ours may be the exact 1e-17 (``scale``: of the gold's terms).
    """
    assert ours.shape == gold.shape and torch.isfinite(ours).all(), what
    distance = (ours.double() - gold).norm()
    relative = 3e-6 + 8 * 2.0**-24 * size
    allowed = 4 * (eager.double() - gold).norm() + relative * gold.norm() + 1e-15 * scale
    assert distance <= allowed, (what, float(distance), float(allowed))
